"""`examples/publish.py`: the committed adapters on the loopback Hub, pushed by the real client."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard

from mgfc import load_head, wrap_backbone
from mgfc.storage.search import search

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import publish  # noqa: E402

Capture = pytest.CaptureFixture[str]
NAMES = [publication.name for publication in publish.PUBLICATIONS]
FILES = {"config.json", "model.safetensors", "head.safetensors", "README.md", "thumbnail.jpg", "LICENSE"}


def test_a_dry_run_shows_all_and_asks_nobody(hub: HubServer, capsys: Capture) -> None:
    assert publish.main([]) == 0
    printed = capsys.readouterr().out
    assert not hub.requests and len(NAMES) == 2
    for name in NAMES:
        assert f"organisation/{name} would hold:\n" in printed
        assert f'backbone = wrap_backbone(backbone, "organisation/{name}")' in printed
    assert all(printed.count(f"\n  {file} ") == 2 for file in FILES)
    assert printed.endswith("HF_TOKEN=hf_... python examples/publish.py --to ORGANISATION --push\n")


@pytest.mark.filterwarnings("ignore:.*same shape but other weights")
def test_one_command_publishes_what_can_be_found_and_loaded(logged_in: HubServer, capsys: Capture) -> None:
    from transformers import Dinov2Config, Dinov2Model

    assert publish.main(["--to", "org", "--push"]) == 0
    assert capsys.readouterr().out.count(f"{logged_in.endpoint}/org/") == 2
    found = {listing.name: listing for listing in search(base_model="facebook/dinov2-small")}
    assert found.keys() == {f"org/{name}" for name in NAMES}
    for publication in publish.PUBLICATIONS:
        repo_id = f"org/{publication.name}"
        files = logged_in.files(repo_id)
        assert files.keys() - {".gitattributes"} == FILES
        assert all(
            files[name] == (publication.directory / name).read_bytes() for name in FILES & {"config.json", "model.safetensors"}
        )
        assert (
            files["LICENSE"] == (ROOT / "LICENSE").read_bytes() and files["thumbnail.jpg"] == publication.picture.read_bytes()
        )
        card = ModelCard.load(repo_id)
        assert (card.data.license, card.data.library_name, card.data.datasets) == ("apache-2.0", "mgfc", ["synth_town"])
        assert card.data.thumbnail == f"{logged_in.endpoint}/{repo_id}/resolve/main/thumbnail.jpg"
        assert "![" in card.text and "](thumbnail.jpg)" in card.text and "organisation/name" not in card.text
        best = found[repo_id].best
        assert best is not None and best.value == max(result.metric_value for result in card.data.eval_results)
        backbone = wrap_backbone(Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)), repo_id)
        assert backbone.calibration.num_batches == 240
        assert load_head(repo_id)([torch.randn(1, 384, 2, 3)] * 4).shape[1] == 11


def test_what_is_published_already_makes_no_commit(logged_in: HubServer) -> None:
    publish.main(["--to", "org", "--push", "--private"])
    commits = {name: repo.at("main").sha for name, repo in logged_in.repos.items()}
    assert all(repo.private for repo in logged_in.repos.values())
    publish.main(["--to", "org", "--push"])
    assert commits == {name: repo.at("main").sha for name, repo in logged_in.repos.items()}


def test_a_card_edited_on_the_hub_stays(logged_in: HubServer) -> None:
    logged_in.put(f"org/{NAMES[0]}", {"README.md": b"# Mine\n"})
    assert publish.main(["--to", "org", "--push"]) == 0
    assert logged_in.files(f"org/{NAMES[0]}")["README.md"] == b"# Mine\n"


def test_without_a_token_or_a_network(hub: HubServer, capsys: Capture) -> None:
    assert publish.main(["--to", "org", "--push"]) == 1
    assert "log in with a token that may write" in capsys.readouterr().err and not hub.repos
    with hub.offline():
        assert publish.main(["--to", "org", "--push"]) == 1
    assert "could not be uploaded" in capsys.readouterr().err


@pytest.mark.parametrize("place", [[], ["--to", ""]])
def test_a_push_needs_a_place(place: list[str], logged_in: HubServer, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        publish.main(["--push", *place])
    assert exit_.value.code == 2 and "--to ORGANISATION" in capsys.readouterr().err and not logged_in.repos


@pytest.mark.parametrize("push", [[], ["--push"]])
@pytest.mark.parametrize("place", ["a/b", "a b", "-"])
def test_a_place_of_a_wrong_form(place: str, push: list[str], logged_in: HubServer, capsys: Capture) -> None:
    assert publish.main([f"--to={place}", *push]) == 1
    assert "publish.py: Repo id must" in capsys.readouterr().err and not logged_in.repos


def test_a_damaged_adapter_is_not_published(
    logged_in: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    first = publish.PUBLICATIONS[0]
    for path in first.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    broken = publish.Publication(tmp_path, first.name, first.picture, first.caption)
    monkeypatch.setattr(publish, "PUBLICATIONS", (broken,))
    assert publish.main(["--to", "org", "--push"]) == 1
    assert "damaged" in capsys.readouterr().err and not logged_in.repos
