"""What the documentation says: its snippets run, its tables are current, its links lead somewhere.

A snippet that cannot run here has a line `<!-- no-run -->` before it. Those of one page share their names, in order.
"""

from __future__ import annotations

import copy
import datetime
import functools
import inspect
import json
import operator
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer

import mgfc
from mgfc import viz

pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(<!-- no-run -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
sys.path.append(str(ROOT / "docs"))

import generate  # noqa: E402

created = functools.cache(timm.create_model)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def snippets(page: Path) -> list[str]:
    return [code for skipped, code in SNIPPET.findall(page.read_text()) if not skipped]


@pytest.fixture
def random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained backbones keep their shape and take random weights, so that nothing is downloaded."""
    from transformers import AutoModel, Dinov2Config, Dinov2Model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return copy.deepcopy(created(name, **options))

    def from_pretrained(name: str) -> torch.nn.Module:
        assert name == "facebook/dinov2-small"
        return Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)


@pytest.mark.filterwarnings("ignore:.*same shape but other weights")
@pytest.mark.usefixtures("random_weights")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page: Path, logged_in: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"loader": [(torch.randn(2, 3, 56, 70), torch.randint(11, (2, 56, 70)))]}
    for code in snippets(page):
        line = page.read_text()[: page.read_text().index(code)].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_few_snippets_do_not_run() -> None:
    skipped = [code for page in PAGES for mark, code in SNIPPET.findall(page.read_text()) if mark]
    assert len(skipped) <= 1
    for code in skipped:
        compile(code, "snippet", "exec")


def test_what_check_prints_is_what_the_page_says(random_weights: None) -> None:
    vit = mgfc.wrap_backbone(timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True))
    report = str(vit.calibration.check(torch.randn(1, 3, 224, 308))[0])
    page = (ROOT / "docs" / "getting-started.md").read_text()
    assert f"# {report}\n" in page.replace(",\n# ", ", ")  # a comment that goes on in the next line


def test_generated_parts_are_current() -> None:
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_results_appear_with_the_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert "Not measured yet" in generate.results(tmp_path)
    for name, miou, size in (("bare_head", 41.005, 3), ("adapter", 47.5, 1234)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.zeros(size), "coarse.source.total": torch.zeros(7)}, tmp_path / name / "model.safetensors")
        training = {
            "metrics": {"synth_town/val mIoU": 60.0, "camvid/day mIoU": miou},
            "recipe": "600 steps of 4 crops of 196 x 266, AdamW, learning rate 0.0003 (head 0.001), seed 0",
            "command": f"python examples/train_minimal.py --steps 600 --of {name}",
            "minutes": 30.4,
        }
        (tmp_path / name / "config.json").write_text(json.dumps({"training": training}))
    text = generate.results(tmp_path)
    assert "| calibrators and head | 1,234 | 60.00 | 47.50 |  |" in text
    for name in ("bare_head", "adapter"):
        command = f"python examples/train_minimal.py --steps 600 --of {name}"
        assert f"{command} \\\n  --test camvid:day camvid:dusk --out runs/{name}\n" in text
    training["recipe"] = training["recipe"].replace("600", "700")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"training": training}))
    with pytest.raises(ValueError, match="trained differently"):
        generate.results(tmp_path)


def test_the_refused_classes_are_those_of_the_tests() -> None:
    from test_wrapping import REFUSED

    assert generate.refusals().keys() == REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in generate.refusals().items())


@pytest.mark.parametrize("name", [*mgfc.__all__, *(f"viz.{name}" for name in viz.__all__)])
def test_public_names_are_documented(name: str) -> None:
    documented = inspect.getdoc(operator.attrgetter(name)(mgfc)) or ""
    assert len(documented) > 20
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert re.search(rf"^\.\. auto(function|class|exception|data):: mgfc\.{name}$", reference, re.MULTILINE)


def test_the_headings_that_docstrings_name_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "mgfc").rglob("*.py"))
    headings = set(re.findall(r"^## (.*)$", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    named = set(re.findall(r'docs/method\.md`,\s+"([^"]+)"', sources))
    assert len(named) == 5
    assert named <= headings


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


@every_page
def test_paths_in_code_exist(page: Path) -> None:
    for path in re.findall(r"`((?:examples|docs|mgfc|tests)/[\w./-]+)`", page.read_text()):
        later = path == "examples/adapter" and "Not measured yet" in (ROOT / "README.md").read_text()
        assert (ROOT / path).exists() or later, path


def test_navigation_lists_every_page_once_and_in_a_group() -> None:
    trees = re.findall(
        r"^```{toctree}\n:hidden:\n:caption: ([^\n]+)\n\n(.+?)^```$", (ROOT / "docs" / "index.md").read_text(), re.M | re.S
    )
    listed = [name for _, names in trees for name in names.split()]
    assert sorted(listed) == sorted({page.stem for page in PAGES[1:]} - {"index"})
    groups = ["Start", "How-to", "Hosts", "Concepts and method", "Benchmarks", "Reference", "Project"]
    assert [caption for caption, _ in trees] == groups


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_fits_88_columns(page: Path) -> None:
    for code in re.findall(r"^```\w+\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        assert [line for line in code.splitlines() if len(line) > 88] == []


@pytest.mark.parametrize(("name", "command"), [("demo", "python examples/segment.py"), ("test", "pytest -n 2 --cov")])
def test_the_commands_of_the_readme_can_be_extracted(name: str, command: str) -> None:
    readme = (ROOT / "README.md").read_text()
    (found,) = re.findall(rf"<!-- {name} command -->\n```bash\n(.*)\n```\n<!-- end -->", readme)
    assert found.endswith(command)
    assert f'pip install -e ".[{name}]"' in found
    assert re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_short_training_command_needs_nothing_beside_the_repository() -> None:
    import train_minimal

    readme = (ROOT / "README.md").read_text()
    (found,) = re.findall(r"<!-- short training command -->\n```bash\npython (\S+) (.*)\n```\n<!-- end -->", readme)
    assert (ROOT / found[0]).samefile(train_minimal.__file__)
    args = train_minimal.parse_arguments(found[1].split())
    assert args.data == Path("synth_town") and args.backbone is None and args.test == []
    # 60 steps, 40 images observed and 120 scored took 160 seconds of processor time on an AMD EPYC.
    assert args.steps <= 60 and args.batch_size <= 4 and args.observe <= 40 and args.size[0] * args.size[1] <= 140 * 196


def test_the_page_of_the_command_line_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    from mgfc.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert len(commands) >= 4 and set(re.findall(r"^\| `mgfc ([a-z-]+)", page, re.MULTILINE)) == set(commands)


def test_citation_and_changelog_name_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "references"} <= citation.keys()
    assert citation["version"] == mgfc.__version__
    (paper,) = citation["references"]
    assert "2508.03007" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Guo"]
    released = citation["date-released"]
    assert isinstance(released, datetime.date)
    assert f"## [{mgfc.__version__}] - {released}" in (ROOT / "CHANGELOG.md").read_text()
