"""Writes the generated parts of README.md and docs/: the supported classes, and what was measured.

python docs/generate.py            # writes them
python docs/generate.py --check    # only says whether they are current
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

from benchmarks import cost_table  # noqa: E402
from domain_generalization import plan, report, tables  # noqa: E402
from domain_generalization.report import markdown as table  # noqa: E402
from safetensors import safe_open  # noqa: E402
from street_benchmark import cost  # noqa: E402
from street_benchmark import table as street_table  # noqa: E402
from street_benchmark.__main__ import RESULTS  # noqa: E402
from zoo import Case, cases  # noqa: E402

from mgfc.backbones.detection import find_tower  # noqa: E402
from mgfc.errors import UnsupportedBackboneError  # noqa: E402

LIBRARIES = {"timm": "timm", "transformers": "Transformers", "authors": "authors' own"}
HOSTS = ("DPT", "Depth Anything", "EoMT", "Grounding DINO", "Mask2Former", "MaskFormer", "UperNet", "ViTMatte", "ZoeDepth")
SHAPES = {"NLC": "(B, N, C)", "NHWC": "(B, h, w, C)", "NCHW": "(B, C, h, w)", "windows": "windows along B"}
SCORES = {"synth_town/val": "synth_town, val", "camvid/day": "CamVid, day", "camvid/dusk": "CamVid, dusk"}
COSTS = ROOT / "examples" / "benchmarks" / "results" / "cpu.jsonl"
PICTURE = "docs/images/trier_basilica_parked_cars_segmented.jpg"


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def families(library: str, *tiers: int, hosts: bool = False) -> str:
    found = [case.family for case in cases(library=library) if case.tier in tiers and (case.family in HOSTS) == hosts]
    return ", ".join(sorted(unique(name.partition(" (")[0] for name in found), key=str.lower))


def summary() -> str:
    """The compact table of the README."""
    rows = [
        ["plain", families("timm", 1), families("transformers", 1)],
        ["windowed, hierarchical and others", families("timm", 2), families("transformers", 2)],
        ["hosts", "`features_only`, `forward_intermediates`", families("transformers", 1, 2, hosts=True)],
    ]
    found = [case for case in cases() if case.tier in (1, 2) and case.library != "authors"]
    classes = len({(case.library, case.architecture) for case in found})
    return table(["", "timm", "Transformers"], rows) + f"\n\n{len(found)} configurations of {classes} classes, each tested."


def by_class(tier: int) -> list[list[Case]]:
    def key(case: Case) -> tuple[str, str, str]:
        return case.library, case.architecture, case.family

    # Libraries in their order here, classes in that of the alphabet.
    places = list(LIBRARIES)
    ordered = sorted(cases(tier), key=lambda case: (places.index(case.library), case.architecture.lower(), case.family.lower()))
    return [list(group) for _, group in groupby(ordered, key)]


def extra_tokens(case: Case) -> str:
    leading = " then ".join(unique(str(n) for n in case.leading))
    trailing = " then ".join(unique(str(n) for n in case.trailing))
    return leading if trailing == "0" else f"{leading}, and {trailing} after"


def note(case: Case) -> str:
    skipped = "no grid, fine stage skipped" if None in case.grids else ""
    return "; ".join(filter(None, (case.note, skipped)))


def notes(group: list[Case]) -> str:
    """What is said of every case of a class, and what of some of them, by their tag."""
    found = unique(note(case) for case in group)
    tags = {text: [case.name.split("-", 2)[-1] for case in group if note(case) == text] for text in found}
    return "; ".join(text if len(tags[text]) == len(group) else f"({', '.join(tags[text])}) {text}" for text in found)


def full_table(tier: int) -> str:
    """One row a class and family."""
    rows = []
    for group in by_class(tier):
        first = group[0]
        rows.append(
            [
                f"{LIBRARIES[first.library]} `{first.architecture}`",
                first.family,
                ", ".join(unique(f"`{re.sub(r'[0-9]+', '*', name)}`" for case in group for name in case.blocks)),
                ", ".join(unique(SHAPES[case.layout] for case in group)),
                " or ".join(unique(extra_tokens(case) for case in group)),
                "yes" if any(case.dynamic for case in group) else "",
                notes(group),
            ]
        )
    return table(["class", "family", "blocks", "tokens", "extra tokens", "changing sizes", "notes"], rows)


@cache
def refusals() -> Mapping[str, str]:
    """What `wrap_backbone` says of each class that it refuses, by name of the case."""
    found = {}
    for case in cases(tier=3):
        try:
            find_tower(case.build())
        except UnsupportedBackboneError as error:
            reason = str(error).partition(": ")[2].partition("per image, but ")
            found[case.name] = (reason[2] or reason[0]).partition(". ")[0]
    return found


def refused() -> str:
    groups = [group for group in by_class(3) if group[0].name in refusals()]
    rows = [[f"{LIBRARIES[g[0].library]} `{g[0].architecture}`", g[0].family, refusals()[g[0].name]] for g in groups]
    return table(["class", "family", "why"], rows)


def best_effort() -> str:
    groups = [group for group in by_class(3) if group[0].name not in refusals()]
    rows = [[f"{LIBRARIES[g[0].library]} `{g[0].architecture}`", g[0].family, g[0].note] for g in groups]
    return table(["class", "family", "notes"], rows)


def num_parameters(path: Path) -> int:
    with safe_open(path, "pt") as file:
        trained = [key for key in file.keys() if ".source." not in key]  # noqa: SIM118  (those are running statistics)
        return sum(file.get_tensor(key).numel() for key in trained)


def results(examples: Path = ROOT / "examples") -> str:
    """The table of what the demo adapter and the bare head scored, and how."""
    places = {"head on the bare backbone": examples / "bare_head", "calibrators and head": examples / "adapter"}
    if not all((place / "config.json").exists() for place in places.values()):
        return "Not measured yet: the table appears with the demo adapter in `examples/adapter`."
    trained = {name: json.loads((place / "config.json").read_text())["training"] for name, place in places.items()}
    rows = []
    for name, place in places.items():
        count = sum(num_parameters(path) for path in place.glob("*.safetensors"))
        scores = [trained[name]["metrics"].get(f"{key} mIoU") for key in SCORES]
        rows.append([name, f"{count:,}", *("" if score is None else f"{score:.2f}" for score in scores)])
    header = ["trained on a frozen DINOv2-S/14", "parameters", *SCORES.values()]
    return "\n\n".join([table(header, rows), recipe(trained), *picture()])


def recipe(trained: Mapping[str, Mapping[str, Any]]) -> str:
    """How both were trained and scored, with the commands."""
    recipes = {item["recipe"].partition(", then ")[0] for item in trained.values()}
    if len(recipes) > 1:
        raise ValueError(f"The adapter and the bare head were trained differently: {recipes}.")
    how = "".join(f"; {line}" for line in unique(item["recipe"].partition(", then ")[2] for item in trained.values()))
    how += "".join(f"; {line}" for line in unique(item.get("evaluation", "") for item in trained.values()))
    minutes = max(item["minutes"] for item in trained.values())
    machine = "two CPU cores (AMD EPYC, shared with other work)"
    outs = zip(trained.values(), ("bare_head", "adapter"), strict=True)
    commands = "\n".join(f"{item['command']} \\\n  --test camvid:day camvid:dusk --out runs/{out}" for item, out in outs)
    return (
        f"mIoU in percent. Trained with {recipes.pop()}{how}. Each training took at most {minutes:.0f} minutes on {machine}."
        f"\n\n```bash\n{commands}\n```"
    )


def robust(directory: Path = ROOT / "examples" / "robust") -> str:
    """What the committed statistics bring to the head that they were gathered for."""
    notes = json.loads((directory / "config.json").read_text())["training"]
    before = dict(line.rsplit(" ", 1) for line in notes["without calibration"].split("; "))
    rows = []
    for name, value in notes["metrics"].items():
        rows.append([name.removesuffix(" mIoU"), before[name], f"{value:.2f}", f"{value - float(before[name]):+.2f}"])
    return table(["mIoU", "as trained", "calibrated", "change"], rows)


def picture() -> list[str]:
    if not (ROOT / PICTURE).exists():
        return []
    alt = "A photograph of a street, segmented with calibrators and with the head on the bare backbone"
    credit = "Photograph: Berthold Werner, public domain. Calibrators and heads were trained on rendered scenes alone."
    return [f"![{alt}]({PICTURE})", f"<sub>{credit}</sub>"]


def fill(text: str, marker: str, content: str) -> str:
    """Puts content between `<!-- marker: begin -->` and `<!-- marker: end -->`."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin} and {end}, found {text[:60]!r}...")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """What each page with generated parts should be."""
    docs = ROOT / "docs"
    measured, of_two = (tables.sections(plan.RESULTS, "medium", min_seeds=count) for count in (3, 2))
    # The one table that says how many seeds a row has.
    measured |= {name: text for name, text in of_two.items() if name.endswith(" peers")}
    ablations, gains = ({n: measured.pop(n) for n in list(measured) if f" {part}" in n} for part in ("ablations", "gains"))
    benchmark = {"benchmark": measured.pop("summary"), "gains": measured.pop("gains")}
    parts = {
        ROOT / "README.md": {"supported": summary(), "results": results(), **benchmark},
        docs / "index.md": {"gains": benchmark["gains"]},
        docs / "supported-backbones.md": {
            "plain": full_table(1),
            "others": full_table(2),
            "best effort": best_effort(),
            "refused": refused(),
        },
        docs / "benchmark.md": measured,
        docs / "cost.md": {"cost": cost_table.show(cost_table.read(COSTS))},
        docs / "field-benchmark.md": {"expected": cost.table(), "field": street_table.tables(report.read(RESULTS))},
        docs / "method.md": ablations,
        docs / "robust.md": {**gains, "robust example": robust()},
    }
    texts = {}
    for path, contents in parts.items():
        text = path.read_text(encoding="utf-8")
        for marker, content in contents.items():
            text = fill(text, marker, content)
        texts[path] = text
    return texts


def main() -> int:
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is not current" if "--check" in sys.argv else f"Written: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
