"""Adapters on the Hub: the real client against the loopback server of `hub_server.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from hub_server import HubServer, run_python
from huggingface_hub import ModelCard, constants, hf_hub_download
from tiny import calibrated, tiny_vit, untouched
from torch import Tensor, nn

from mgfc import (
    AdapterFileError,
    AdapterNotFoundError,
    ConfigError,
    MGFCConfig,
    SegmentationHead,
    load_head,
    wrap_backbone,
)
from mgfc.storage.card import CARD_MARK

REPO = "org/adapter"
NAMES = {"config.json", "model.safetensors", "README.md"}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def adapter_files(directory: Path, rank: int = 8, head: nn.Module | None = None) -> dict[str, bytes]:
    calibrated(tiny_vit(), MGFCConfig(rank=rank)).save_pretrained(directory, head=head)
    return files_of(directory)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an adapter of rank 8."""
    torch.manual_seed(0)
    return adapter_files(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of one of rank 4."""
    torch.manual_seed(1)
    return adapter_files(tmp_path_factory.mktemp("other"), rank=4)


def pulled(source: str = REPO, **options: Any) -> MGFCConfig:
    return wrap_backbone(tiny_vit(), source, **options).calibration.config


def refused(source: str, *facts: str, error: type[Exception] = AdapterNotFoundError, **options: Any) -> Exception:
    """Pulling fails with a message that holds the facts, and the backbone is as it was."""
    vit = tiny_vit()
    with untouched(vit), pytest.raises(error) as caught:
        wrap_backbone(vit, source, **options)
    assert [fact for fact in facts if fact not in str(caught.value)] == [], str(caught.value)
    return caught.value


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


# Push


def test_push_then_pull_gives_the_identical_adapter(logged_in: HubServer) -> None:
    vit, head = tiny_vit(), SegmentationHead([32], 5, hidden_dim=8)
    calibrated(vit)
    randomise(head)
    url = vit.calibration.push_to_hub(REPO, head=head)
    assert url == f"{logged_in.endpoint}/{REPO}/commit/{logged_in.repos[REPO].at('main').sha}"
    assert {*NAMES, "head.safetensors"} == logged_in.files(REPO).keys() - {".gitattributes"}
    again = wrap_backbone(tiny_vit(), REPO)
    assert again.calibration.config == vit.calibration.config
    assert equal(again.calibration.state_dict(), vit.calibration.state_dict())
    assert equal(load_head(REPO).state_dict(), head.state_dict())
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(again.forward_features(images), vit.forward_features(images))


def test_weights_go_through_lfs_and_text_does_not(logged_in: HubServer) -> None:
    calibrated(tiny_vit()).push_to_hub(REPO)
    blobs = logged_in.repos[REPO].at("main").files
    assert {name for name, blob in blobs.items() if blob.lfs} == {"model.safetensors"}
    assert [r.method for r in logged_in.requests if r.path.startswith("/cdn/")] == ["PUT"]


@pytest.mark.parametrize("private", [True, False])
def test_private_is_for_a_new_repository(logged_in: HubServer, private: bool) -> None:
    calibrated(tiny_vit()).push_to_hub(REPO, private=private)
    assert logged_in.repos[REPO].private == private
    calibrated(tiny_vit()).push_to_hub(REPO, private=not private)
    assert logged_in.repos[REPO].private == private


def test_push_to_a_branch_and_as_a_pull_request(logged_in: HubServer) -> None:
    first, second, third = (calibrated(tiny_vit(), MGFCConfig(rank=rank)) for rank in (8, 4, 2))
    first.push_to_hub(REPO)
    logged_in.repos[REPO].branches["dev"] = list(logged_in.repos[REPO].branches["main"])
    second.push_to_hub(REPO, revision="dev", commit_message="smaller")
    third.push_to_hub(REPO, create_pr=True)
    assert logged_in.repos[REPO].at("dev").title == "smaller"
    assert logged_in.repos[REPO].at("main").title == "Upload mgfc adapter"
    assert [pulled(revision=revision).rank for revision in (None, "dev", "refs/pr/1")] == [8, 4, 2]


def test_push_replaces_the_adapter_of_before(logged_in: HubServer) -> None:
    logged_in.put(REPO, {"notes.txt": b"mine"})
    calibrated(tiny_vit()).push_to_hub(REPO, head=SegmentationHead([32], 5, hidden_dim=8))
    calibrated(tiny_vit(), MGFCConfig(rank=4)).push_to_hub(REPO)
    assert logged_in.files(REPO).keys() == {*NAMES, "notes.txt"}, "an old head goes, other files stay"
    assert pulled().rank == 4 and b"of rank 4 " in logged_in.files(REPO)["README.md"]


@pytest.mark.parametrize("revision", [None, "dev"])
def test_an_edited_card_on_the_hub_stays(logged_in: HubServer, revision: str | None) -> None:
    logged_in.put(REPO, {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    logged_in.put(REPO, {}, revision="dev")
    calibrated(tiny_vit()).push_to_hub(REPO, revision=revision)
    assert logged_in.files(REPO, revision or "main")["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert pulled(revision=revision).rank == 8


def test_push_without_the_right_to(hub: HubServer, adapter: dict[str, bytes]) -> None:
    sha = hub.put(REPO, adapter)
    calibration = calibrated(tiny_vit())
    for token in (None, hub.stranger_token, "hf_unknown"):
        for repo_id in (REPO, "org/new"):
            with pytest.raises(
                AdapterNotFoundError, match=rf"(?s){repo_id} could not be uploaded.*log in with a token"
            ) as caught:
                calibration.push_to_hub(repo_id, token=token)
            assert caught.value.__cause__ is not None
    assert hub.repos[REPO].at("main").sha == sha and "org/new" not in hub.repos
    assert calibration.push_to_hub("org/new", token=hub.token)


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/", "", "a--b", "org/name@v1"])
def test_push_to_a_malformed_name(logged_in: HubServer, repo_id: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"could not be uploaded.*Check the name"):
        calibrated(tiny_vit()).push_to_hub(repo_id)
    assert not logged_in.repos


def test_push_to_a_missing_branch(logged_in: HubServer) -> None:
    logged_in.put(REPO, {})
    with pytest.raises(AdapterNotFoundError, match=r"could not be uploaded.*RevisionNotFound"):
        calibrated(tiny_vit()).push_to_hub(REPO, revision="missing")


def test_push_without_a_network(logged_in: HubServer) -> None:
    calibration = calibrated(tiny_vit())
    with logged_in.offline(), pytest.raises(AdapterNotFoundError, match=r"could not be uploaded.*try again"):
        calibration.push_to_hub(REPO)
    calibration.push_to_hub(REPO)
    assert pulled().rank == 8


@pytest.mark.parametrize("match", ["/commit/", "/preupload/", "/repos/create"])
def test_a_push_that_breaks_leaves_the_adapter_of_before(logged_in: HubServer, match: str, adapter: dict[str, bytes]) -> None:
    logged_in.put(REPO, adapter)
    logged_in.fail(times=9, status=500, match=match)
    with pytest.raises(AdapterNotFoundError, match=r"could not be uploaded"):
        calibrated(tiny_vit(), MGFCConfig(rank=4)).push_to_hub(REPO)
    assert logged_in.files(REPO) == adapter and pulled().rank == 8


def test_a_card_that_the_hub_refuses(logged_in: HubServer) -> None:
    logged_in.fail(status=400, match="/validate-yaml")
    with pytest.raises(AdapterNotFoundError, match=r"could not be uploaded"):
        calibrated(tiny_vit()).push_to_hub(REPO)


def test_push_in_offline_mode(logged_in: HubServer, offline_mode: None) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"could not be uploaded.*OfflineModeIsEnabled"):
        calibrated(tiny_vit()).push_to_hub(REPO)


def test_wrong_notes_are_told_before_anything_is_uploaded(logged_in: HubServer) -> None:
    with pytest.raises(ConfigError, match="metrics to be a dict"):
        calibrated(tiny_vit()).push_to_hub(REPO, training={"metrics": 3})
    assert not logged_in.requests and not logged_in.repos


# The card


def test_the_card_is_valid_and_tells_the_numbers(logged_in: HubServer) -> None:
    training = {"metrics": {"mIoU, day": 0.612, "a|b": "x\ny"}, "datasets": ["org/town"], "steps": 400}
    calibration = calibrated(tiny_vit(), MGFCConfig(rank=8, fine=None))
    calibration.push_to_hub(REPO, training=training, base_model="org/vit", license="mit")
    card = ModelCard.load(REPO)
    data = card.data.to_dict()
    assert data.pop("tags") == ["mgfc", "domain-generalization", "semantic-segmentation"]
    assert data == {
        "library_name": "mgfc",
        "pipeline_tag": "image-segmentation",
        "license": "mit",
        "base_model": "org/vit",
        "base_model_relation": "adapter",
        "datasets": ["org/town"],
        "model-index": [
            {
                "name": "mgfc adapter for org/vit",
                "results": [
                    {
                        "task": {"type": "image-segmentation"},
                        "dataset": {"name": "day", "type": "day"},
                        "metrics": [{"type": "mean_iou", "value": 0.612, "name": "mIoU, day"}],
                    }
                ],
            }
        ],
    }
    for part in (
        CARD_MARK,
        "# mgfc adapter for org/vit",
        "Calibrators (coarse, medium) of rank 8 for a frozen VisionTransformer of 3 blocks and width 32",
        f"{calibration.num_parameters:,} parameters",
        "| measured | value |\n|---|---|\n| mIoU, day | 0.612 |\n| a\\|b | x y |\n",
        "- steps: 400",
        "implementation of the published description",
    ):
        assert part in card.text, part
    assert "load_head" not in card.text and "official" not in card.text


def test_the_card_of_a_head_says_how_to_load_it(logged_in: HubServer) -> None:
    calibrated(tiny_vit()).push_to_hub(REPO, head=SegmentationHead([32], 5, hidden_dim=8))
    text = ModelCard.load(REPO).text
    assert f'backbone = wrap_backbone(backbone, "{REPO}")' in text and f'head = load_head("{REPO}")' in text
    assert "organisation/name" not in text and "from mgfc import load_head, wrap_backbone" in text
    assert "## Figures" not in text


@pytest.mark.parametrize(
    "value", ["a: b", "no", "1.0", "[x", "# c", 'quote"d', "mit", "apache-2.0", "cc-by-4.0", "ä 😀", "- x", ""]
)
def test_any_text_stays_valid_yaml(value: str, tmp_path: Path) -> None:
    calibrated(tiny_vit()).save_pretrained(tmp_path, base_model=value, license=value, training={"datasets": [value]})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == value and data.datasets == [value] and (not value or data.base_model == value)


# Pull


def test_revisions(hub: HubServer, adapter: dict[str, bytes], other: dict[str, bytes]) -> None:
    first = hub.put(REPO, adapter)
    hub.tag(REPO, "v1")
    hub.put(REPO, other, revision="dev/a")
    second = hub.put(REPO, other)
    ranks = {revision: pulled(revision=revision).rank for revision in (None, "main", "v1", "dev/a", first, second)}
    assert ranks == {None: 4, "main": 4, "v1": 8, "dev/a": 4, first: 8, second: 4}
    refused(REPO, REPO, "expected a branch, tag or commit 'v2', found none", revision="v2")
    refused(REPO, "expected a branch, tag or commit", "a" * 40, revision="a" * 40)


def test_the_prefix_of_the_hub(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter)
    assert pulled(f"hf-hub:{REPO}").rank == 8


def test_private(hub: HubServer, adapter: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(REPO, adapter, private=True)
    for token in (None, False, hub.stranger_token):
        refused(REPO, REPO, "expected a repository on the Hub or a local directory", "private", "hf auth login", token=token)
    assert pulled(token=hub.token).rank == 8
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.put(REPO, {"x": b"moved on"})
    assert pulled().rank == pulled(token=True).rank == 8


def test_gated(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter, gated=True)
    for token in (None, hub.stranger_token):
        refused(REPO, f"{REPO} is gated: accept its terms", "hf auth login", token=token)
    assert pulled(token=hub.token).rank == 8


def test_a_wrong_token(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter)
    refused(REPO, REPO, "config.json could not be downloaded", "Invalid credentials", token="hf_unknown")


def test_a_missing_repository(hub: HubServer) -> None:
    for token in (None, hub.token):
        refused("org/missing", "org/missing: expected a repository on the Hub or a local directory, found neither", token=token)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file(hub: HubServer, adapter: dict[str, bytes], missing: str) -> None:
    hub.put(REPO, {name: data for name, data in adapter.items() if name != missing})
    refused(REPO, f"{REPO} at ", f"expected a file {missing}, found none", "no mgfc adapter")


def test_a_missing_head(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter)
    with pytest.raises(AdapterNotFoundError, match=f"{REPO}: expected a saved head, found an adapter without one"):
        load_head(REPO)


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/", "a--b", "org/name@v1", "org/na me"])
def test_a_malformed_name(hub: HubServer, repo_id: str) -> None:
    refused(repo_id, repr(repo_id), "expected an existing directory or a Hub repository (organisation/name), found neither")
    assert not hub.requests


def test_another_librarys_repository(hub: HubServer) -> None:
    hub.put(REPO, {"config.json": b'{"model_type": "dinov2"}', "model.safetensors": b"x"})
    refused(REPO, '("library_name": "mgfc"), found another', error=AdapterFileError)
    assert not any("safetensors" in request.path or "/cdn/" in request.path for request in hub.requests)


def test_damaged_weights_on_the_hub(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, {**adapter, "model.safetensors": adapter["model.safetensors"][:-100]})
    refused(REPO, "found a damaged file of", error=AdapterFileError)
    hub.put(REPO, adapter)
    assert pulled().rank == 8


def test_only_what_is_needed_is_downloaded(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, {**adapter, "checkpoint.pt": b"x" * 1000})
    pulled()
    asked = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {"config.json", "model.safetensors"}


def test_cache_dir(hub: HubServer, adapter: dict[str, bytes], tmp_path: Path) -> None:
    hub.put(REPO, adapter)
    pulled(cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("model.safetensors")) and not list(
        Path(constants.HF_HUB_CACHE).rglob("*.safetensors")
    )
    with hub.offline():
        assert pulled(cache_dir=tmp_path / "cache", local_files_only=True).rank == 8
        refused(REPO, "not in the local cache", local_files_only=True)


# A branch that moves


class Moving:
    """Pushes a new commit as soon as a path has been asked for."""

    def __init__(self, hub: HubServer, path: str, files: dict[str, bytes]) -> None:
        self.hub, self.path, self.files, self.moved = hub, path, files, False
        self.answer: Callable[..., Any] = hub.answer

    def __call__(self, request: Any, body: bytes) -> Any:
        reply = self.answer(request, body)
        if not self.moved and request.method == "GET" and request.path.endswith(self.path):
            self.moved = True
            self.hub.put(REPO, self.files)
        return reply


def test_both_files_are_of_one_commit(
    hub: HubServer, adapter: dict[str, bytes], other: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, adapter)
    moving = Moving(hub, "config.json", other)
    monkeypatch.setattr(hub, "answer", moving, raising=False)
    assert pulled().rank == 8, "the weights are of another commit than the configuration"
    assert moving.moved and pulled().rank == 4


def test_a_head_and_its_configuration_are_of_one_commit(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [SegmentationHead([32], classes, hidden_dim=8) for classes in (5, 7)]
    versions = [adapter_files(tmp_path / str(i), head=head) for i, head in enumerate(heads)]
    hub.put(REPO, versions[0])
    monkeypatch.setattr(hub, "answer", Moving(hub, "config.json", versions[1]), raising=False)
    assert equal(load_head(REPO).state_dict(), heads[0].state_dict())
    assert equal(load_head(REPO).state_dict(), heads[1].state_dict())


# Offline


def test_a_warm_cache_needs_no_network(hub: HubServer, adapter: dict[str, bytes], other: dict[str, bytes]) -> None:
    sha = hub.put(REPO, adapter)
    expected = wrap_backbone(tiny_vit(), REPO).calibration.state_dict()
    with hub.offline():
        again = wrap_backbone(tiny_vit(), REPO)
        assert equal(again.calibration.state_dict(), expected) and pulled(revision=sha).rank == 8
    hub.put(REPO, other)
    hub.requests.clear()
    assert pulled(local_files_only=True).rank == 8 and not hub.requests, "the new commit is not asked for"
    assert pulled().rank == 4


def test_a_warm_cache_in_offline_mode(hub: HubServer, adapter: dict[str, bytes], request: pytest.FixtureRequest) -> None:
    hub.put(REPO, adapter)
    pulled()
    hub.requests.clear()
    request.getfixturevalue("offline_mode")
    assert pulled().rank == 8 and not hub.requests
    refused("org/cold", "org/cold at main: config.json is not in the local cache", "offline mode", "local directory")
    assert not hub.requests


def test_the_offline_variable_in_a_new_process(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter)
    pulled()
    hub.requests.clear()
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mgfc.storage.format import read_config
from mgfc.storage.loading import locate
print(read_config(locate({REPO!r})("config.json"))["calibration"]["rank"])
"""
    result = run_python(code, HF_HUB_OFFLINE="1", PYTHONPATH=str(Path(__file__).parents[1]))
    assert result.stdout == "8\n", result.stderr
    assert not hub.requests


def test_a_cold_cache_without_a_network(hub: HubServer, adapter: dict[str, bytes]) -> None:
    hub.put(REPO, adapter)
    facts = (f"{REPO} at main: config.json is not in the local cache", "no network", "Load it once with a network")
    with hub.offline():
        refused(REPO, *facts)
    refused(REPO, *facts, local_files_only=True)
    assert not hub.requests
    assert pulled().rank == 8


def test_a_cache_that_holds_the_configuration_only(hub: HubServer, adapter: dict[str, bytes]) -> None:
    sha = hub.put(REPO, adapter)
    hub.fail(times=99, match="model.safetensors")
    refused(REPO, f"{REPO} at {sha}: model.safetensors is not in the local cache")
    hub._faults.clear()
    with hub.offline():
        refused(REPO, f"{REPO} at {sha}: model.safetensors is not in the local cache")


# Interrupted downloads


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("after", [0, 100, None])
@pytest.mark.parametrize(("times", "reset"), [(1, False), (99, False), (1, True), (99, True)])
def test_an_interrupted_download(
    hub: HubServer, adapter: dict[str, bytes], name: str, after: int | None, times: int, reset: bool
) -> None:
    hub.put(REPO, adapter)
    if name == "model.safetensors":
        hf_hub_download(REPO, "config.json")
    hub.cut(times=times, after=after, reset=reset)
    if times == 1 and not reset:
        assert pulled().rank == 8, "the client resumes what was closed"
    else:
        refused(REPO, f"{REPO} at ", f"{name} could not be downloaded (", "Try again.")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    hub._faults.clear()
    assert pulled().rank == 8
    for name in ("config.json", "model.safetensors"):
        (path,) = Path(constants.HF_HUB_CACHE).rglob(name)
        assert path.read_bytes() == adapter[name]


def test_an_interrupted_update_keeps_the_cached_adapter_whole(
    hub: HubServer, adapter: dict[str, bytes], other: dict[str, bytes]
) -> None:
    first = hub.put(REPO, adapter)
    pulled()
    hub.put(REPO, other)
    hub.cut(times=99, reset=True)
    refused(REPO, "could not be downloaded", "Try again")
    assert pulled(revision=first).rank == 8
    hub._faults.clear()
    assert pulled().rank == 4


@pytest.mark.parametrize("status", [500, 503, None])
def test_a_hub_in_trouble_is_no_trouble_for_a_warm_cache(hub: HubServer, adapter: dict[str, bytes], status: int | None) -> None:
    hub.put(REPO, adapter)
    pulled()
    hub.fail(times=99, status=status)
    assert pulled().rank == 8


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_hub_in_trouble_is_told_of(hub: HubServer, adapter: dict[str, bytes], status: int | None) -> None:
    hub.put(REPO, adapter)
    hub.fail(times=99, status=status)
    refused(REPO, f"{REPO} at main: config.json")
    hub._faults.clear()
    assert pulled().rank == 8
