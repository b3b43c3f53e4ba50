"""Adapters as files: round trips, interrupted saves, and everything that a load refuses."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pkgutil
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import randomise, same, snapshot
from hub_server import HubServer, run_python
from safetensors.torch import load_file, save_file
from tiny import calibrated, tiny_dinov2, tiny_vit, untouched
from torch import Tensor, nn
from transformers import Dinov2Model

from mgfc import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CalibrationError,
    CoarseConfig,
    ConfigError,
    FineConfig,
    MediumConfig,
    MGFCConfig,
    SegmentationHead,
    __version__,
    get_calibration,
    load_head,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.backbones.detection import Tower, find_tower
from mgfc.storage.card import CARD_MARK
from mgfc.storage.format import read_config
from mgfc.storage.loading import locate, make_adapter

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
FILES = {"config.json", "model.safetensors", "README.md"}
HEAD = "head.safetensors"

Edit = Callable[[Path], None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of rank 8 for `tiny_vit()`, with a head."""
    calibrated(vit := tiny_vit()).save_pretrained(tmp_path / "adapter", head=a_head())
    assert set(os.listdir(tmp_path / "adapter")) == {*FILES, HEAD} and vit.calibration
    return tmp_path / "adapter"


def a_head(num_classes: int = 5) -> SegmentationHead:
    head = SegmentationHead([32, 32], num_classes, hidden_dim=8)
    randomise(head)
    return head


def content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@torch.no_grad()
def tokens(backbone: nn.Module, images: Tensor = IMAGES) -> Tensor:
    return backbone.forward_features(images)


# Round trips


CONFIGS = [
    MGFCConfig(rank=8),
    MGFCConfig(rank=32, layers="last:2"),
    MGFCConfig(rank=4, layers=(0, -1), coarse=None, medium=None, fine=None),
    MGFCConfig(rank=4, coarse=CoarseConfig(0.3, 0.5), medium=None, fine=FineConfig(5, layers=(0, 1))),
    MGFCConfig(4, "all", CoarseConfig(1, 0.0, 0.1), MediumConfig(7, 0.2, 1, "all", 1), FineConfig(3, "all", 1), num_classes=6),
    MGFCConfig(rank=None),
    MGFCConfig(rank=None, coarse=CoarseConfig(), medium=None),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"rank {config.rank} layers {config.layers}")
def test_round_trip_is_bit_exact(config: MGFCConfig, tmp_path: Path) -> None:
    calibrated(vit := tiny_vit(), config)
    vit.calibration.save_pretrained(tmp_path)
    again = wrap_backbone(tiny_vit(), tmp_path)
    assert again.calibration.config == config and equal(again.calibration.state_dict(), vit.calibration.state_dict())
    assert torch.equal(tokens(again), tokens(vit)) and not torch.equal(tokens(vit), tokens(tiny_vit()))
    assert all(p.requires_grad and p.is_leaf for p in again.calibration.parameters())
    again.calibration.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_transformers_round_trip(tmp_path: Path) -> None:
    calibrated(model := tiny_dinov2()).save_pretrained(tmp_path)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("calibration.")}
    other = tiny_dinov2()
    other.load_state_dict(state)
    wrap_backbone(other, tmp_path)
    images = IMAGES[:, :, :56, :84]
    with torch.no_grad():
        assert same(other(images), model(images))


def test_head_round_trip(saved: Path) -> None:
    maps = [torch.randn(1, 32, 4, 6)] * 2
    head = load_head(saved)
    assert isinstance(head, SegmentationHead) and all(p.requires_grad for p in head.parameters())
    assert head.arguments == {"in_channels": [32, 32], "num_classes": 5, "hidden_dim": 8}
    assert equal(head.state_dict(), load_file(saved / HEAD)) and head(maps).shape == (1, 5, 8, 12)


def test_config_json_describes_the_backbone(saved: Path) -> None:
    values = content(saved)
    fingerprint = values["backbone"].pop("fingerprint")
    assert values.pop("checksums").keys() == {"model.safetensors", "head.safetensors"}
    assert values == {
        "library_name": "mgfc",
        "format_version": 2,
        "mgfc_version": __version__,
        "method": "mgfc",
        "calibration": MGFCConfig(rank=8, fine=FineConfig()).to_dict(),
        "peft": False,
        "backbone": {
            "library": "timm",
            "architecture": "VisionTransformer",
            "base_model": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "depth": 3,
            "embed_dim": 32,
            "patch_size": [16, 16],
            "num_prefix_tokens": 1,
        },
        "head": {
            "class": "SegmentationHead",
            "arguments": {"in_channels": [32, 32], "num_classes": 5, "hidden_dim": 8},
        },
        "training": {},
        "license": "apache-2.0",
    }
    expected = [block.mlp.fc2.weight[::32].norm().item() for block in tiny_vit().blocks]
    assert fingerprint == pytest.approx(expected, rel=1e-5)


def test_files_hold_the_parameters_and_little_else(saved: Path) -> None:
    calibration = wrap_backbone(tiny_vit(), saved).calibration
    size = sum((saved / name).stat().st_size for name in FILES)
    assert 4 * calibration.num_parameters < size <= 4 * calibration.num_parameters + 64 * 1024
    assert {path.suffix for path in saved.iterdir()} == {".json", ".md", ".safetensors"}
    assert load_file(saved / "model.safetensors").keys() == calibration.adapter.state_dict().keys()
    for path in saved.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK")), "a pickle or a zip"
    notes = {path: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(notes.values()) == {0o666 & ~umask}


def test_keys_are_ordinals_of_the_blocks(tmp_path: Path) -> None:
    keys = []
    for name, backbone in (("timm", tiny_vit()), ("transformers", tiny_dinov2())):
        calibrated(backbone, MGFCConfig(rank=8, layers=(0, 2))).save_pretrained(tmp_path / name)
        keys.append(load_file(tmp_path / name / "model.safetensors").keys())
    assert keys[0] == keys[1] and {key.split(".")[1] for key in keys[0] if key.startswith("layers.")} == {"0", "2"}


def test_notes_and_names_go_into_the_config(tmp_path: Path) -> None:
    training = {"metrics": {"mIoU": 0.61}, "datasets": ["org/town"], "steps": 100, "lr": 1e-4}
    calibrated(vit := tiny_vit())
    vit.calibration.save_pretrained(tmp_path, training=training, base_model="org/vit", license="mit")
    values = content(tmp_path)
    assert (values["training"], values["backbone"]["base_model"], values["license"]) == (training, "org/vit", "mit")


@pytest.mark.parametrize(
    ("training", "fact"),
    [
        ({"model": nn.Linear(1, 1)}, "not JSON serializable"),
        ({"metrics": {"mIoU": float("nan")}}, "not JSON compliant"),
        ({"metrics": [0.5]}, "expected metrics to be a dict of figures, found [0.5]"),
        ({"datasets": "camvid"}, "expected datasets to be a list of names, found 'camvid'"),
        ({"datasets": [3]}, "expected datasets to be a list of names, found [3]"),
    ],
    ids=str,
)
def test_notes_that_no_file_can_hold(training: dict[str, Any], fact: str, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ConfigError, match="training") as caught:
        calibrated(tiny_vit()).save_pretrained(saved, training=training)
    assert fact in str(caught.value)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_needs_a_backbone(tmp_path: Path) -> None:
    calibration = calibrated(vit := tiny_vit())
    unwrap_backbone(vit)
    with pytest.raises(CalibrationError, match="not attached to a backbone"):
        calibration.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Across libraries, with real weights


@pytest.fixture(scope="module")
def dinov2_pair(shared: Callable[[str], Path]) -> tuple[nn.Module, nn.Module]:
    """One DINOv2-S/14, as timm and as Transformers have it."""
    directory = shared("weights/dinov2-small")
    renamed = {}
    for key, value in load_file(directory / "model.safetensors").items():
        for old, new in (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("layernorm.", "norm."),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ):
            key = key.replace(old, new)
        renamed[key] = value
    del renamed["embeddings.mask_token"]
    for block in range(12):
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"blocks.{block}.attention.attention.{name}.{kind}") for name in ("query", "key", "value")]
            renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True).eval()
    vit.load_state_dict(renamed)
    return vit, Dinov2Model.from_pretrained(directory).eval()


@torch.no_grad()
def final_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    if isinstance(backbone, Dinov2Model):
        return backbone(images).last_hidden_state
    return backbone.forward_features(images)


def test_an_adapter_moves_between_libraries(dinov2_pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    vit, model = dinov2_pair
    small, images = torch.randn(1, 3, 112, 140), torch.randn(1, 3, 518, 518)
    try:
        bare = final_tokens(vit, small)
        wrap_backbone(vit)
        randomise(vit.calibration, std=0.02)
        for name, parameter in vit.calibration.named_parameters():
            if name.endswith(("gate", "low_rank.up")):
                nn.init.normal_(parameter, std=0.05)
        assert (final_tokens(vit, small) - bare).abs().max() > 0.1, "the calibrators hardly do anything"
        vit.calibration.save_pretrained(tmp_path / "timm")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrap_backbone(model, tmp_path / "timm")
            first, second = final_tokens(vit, images), final_tokens(model, images)
            assert (first - second).abs().max() <= 1e-4
            model.calibration.save_pretrained(tmp_path / "transformers")
            wrap_backbone(unwrap_backbone(vit), tmp_path / "transformers")
        # Bit for bit the first adapter, so that the tokens at 518 pixels are those of above.
        files = [tmp_path / library / "model.safetensors" for library in ("timm", "transformers")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert equal(vit.calibration.state_dict(), model.calibration.state_dict())
        assert torch.equal(final_tokens(vit, images), first)
        assert [content(path.parent)["backbone"]["library"] for path in files] == ["timm", "transformers"]
    finally:
        for backbone in dinov2_pair:
            if hasattr(backbone, "calibration"):
                unwrap_backbone(backbone)


# Saving into a directory that holds something


def test_other_files_stay_and_an_old_head_goes(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "logs").mkdir()
    calibration = calibrated(tiny_vit(), MGFCConfig(rank=4))
    calibration.save_pretrained(saved)
    assert set(os.listdir(saved)) == {*FILES, "notes.txt", "logs"} and (saved / "notes.txt").read_text() == "mine"
    assert wrap_backbone(tiny_vit(), saved).calibration.config.rank == 4
    with pytest.raises(AdapterNotFoundError, match="expected a saved head, found an adapter without one"):
        load_head(saved)


@pytest.mark.parametrize("text", ["# My card\n", "---\nlicense: mit\n---\n", "\xff\xfe broken"])
def test_an_edited_card_stays(saved: Path, text: str) -> None:
    (saved / "README.md").write_bytes(text.encode("latin-1"))
    calibrated(tiny_vit(), MGFCConfig(rank=4)).save_pretrained(saved)
    assert (saved / "README.md").read_bytes() == text.encode("latin-1") and content(saved)["calibration"]["rank"] == 4


def test_a_generated_card_is_written_anew(saved: Path) -> None:
    assert CARD_MARK in (saved / "README.md").read_text() and "of rank 8 " in (saved / "README.md").read_text()
    calibrated(tiny_vit(), MGFCConfig(rank=4)).save_pretrained(saved)
    assert "of rank 4 " in (saved / "README.md").read_text()


def test_directories_are_made(tmp_path: Path) -> None:
    calibrated(tiny_vit()).save_pretrained(str(tmp_path / "a" / "b" / "c"))
    assert set(os.listdir(tmp_path / "a" / "b" / "c")) == FILES


def test_an_adapter_loaded_from_a_directory_may_be_saved_there(saved: Path) -> None:
    vit = wrap_backbone(tiny_vit(), saved)
    expected = tokens(vit)
    vit.calibration.save_pretrained(saved)
    assert torch.equal(tokens(vit), expected) and torch.equal(tokens(wrap_backbone(tiny_vit(), saved)), expected)


# Interrupted saves


class Interruption(BaseException):
    """Like a KeyboardInterrupt: no `except Exception` stops it."""


STEPS = ("os.replace", "os.fsync", "os.mkdir", "os.rmdir", "os.unlink", "pathlib.Path.write_bytes")
STEPS += ("safetensors.torch.save",)
if sys.version_info < (3, 11):  # its pathlib holds the functions of `os` that it found when it was imported
    STEPS = tuple(step for step in STEPS if step not in ("os.mkdir", "os.rmdir"))


@contextmanager
def interrupted(at: int | None, dies: bool, after: bool) -> Iterator[list[str]]:
    """Interrupts the file operation number `at`, before or after it; a process that dies does none of the later ones."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for step in STEPS:
            original = pkgutil.resolve_name(step)

            def guarded(*args: Any, _name: str = step, _original: Any = original, **kwargs: Any) -> Any:
                done.append(_name)
                number = len(done) - 1
                if at is not None and (number == at or (dies and number > at)):
                    if after and number == at:
                        _original(*args, **kwargs)
                    raise Interruption(f"{_name}, number {number}")
                return _original(*args, **kwargs)

            patch.setattr(step, guarded)
        yield done


@functools.cache
def reader() -> Tower:
    return find_tower(tiny_vit())


def content_found(directory: Path) -> dict[str, Any]:
    return read_config(locate(directory)("config.json"))


def adapter_in(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, int]:
    """What a reader finds: calibrators, head, rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter, _ = make_adapter(reader(), directory)
    head = None
    if content_found(directory)["head"] is None:
        with pytest.raises(AdapterNotFoundError, match="an adapter without one"):
            load_head(directory)
    else:
        head = dict(load_head(directory).state_dict())
    return dict(adapter.state_dict()), head, adapter.config.rank


def same_adapter(one: Any, other: Any) -> bool:
    if one[2] != other[2] or (one[1] is None) != (other[1] is None):
        return False
    return equal(one[0], other[0]) and (one[1] is None or equal(one[1], other[1]))


@pytest.mark.parametrize("new_head", [True, False], ids=["with a head", "without a head"])
@pytest.mark.parametrize(
    ("dies", "after"), [(False, False), (True, False), (True, True)], ids=["error", "death before", "death after"]
)
def test_a_save_interrupted_anywhere_leaves_the_old_or_the_new_adapter(
    saved: Path, tmp_path: Path, new_head: bool, dies: bool, after: bool
) -> None:
    calibration = calibrated(tiny_vit(), MGFCConfig(rank=8, layers="all", fine=None))
    head = a_head(7) if new_head else None
    calibration.save_pretrained(tmp_path / "new", head=head)
    old, new = adapter_in(saved), adapter_in(tmp_path / "new")
    assert not same_adapter(old, new)

    work = tmp_path / "work"
    shutil.copytree(saved, work)
    with interrupted(None, dies, after) as steps:
        calibration.save_pretrained(work, head=head)
    assert same_adapter(adapter_in(work), new) and set(STEPS) <= {*steps, "os.unlink"}
    outcomes = []
    for step in range(len(steps)):
        shutil.rmtree(work)
        shutil.copytree(saved, work)
        with interrupted(step, dies, after), pytest.raises(Interruption):
            calibration.save_pretrained(work, head=head)
        found = adapter_in(work)
        is_old, is_new = same_adapter(found, old), same_adapter(found, new)
        assert is_old != is_new, f"a mixture after {steps[step]}, number {step}"
        outcomes.append(is_new)
        calibration.save_pretrained(work, head=head)
        assert same_adapter(adapter_in(work), new)
        assert set(os.listdir(work)) == {*FILES, *([HEAD] if new_head else [])}, f"debris after {steps[step]}, number {step}"
    assert outcomes == sorted(outcomes), "new, then old again"
    assert not all(outcomes) and any(outcomes)


def test_an_interrupted_first_save_leaves_nothing_that_can_be_mistaken(tmp_path: Path) -> None:
    calibration = calibrated(tiny_vit())
    with interrupted(None, False, False) as steps:
        calibration.save_pretrained(tmp_path / "out")
    new = adapter_in(tmp_path / "out")
    outcomes = []
    for step in range(len(steps)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with interrupted(step, True, False), pytest.raises(Interruption):
            calibration.save_pretrained(tmp_path / "out")
        try:
            outcomes.append(same_adapter(adapter_in(tmp_path / "out"), new))
        except AdapterNotFoundError:
            outcomes.append(None)
        calibration.save_pretrained(tmp_path / "out")
        assert same_adapter(adapter_in(tmp_path / "out"), new) and set(os.listdir(tmp_path / "out")) == FILES
    assert set(outcomes) == {None, True} and outcomes == sorted(outcomes, key=bool)


def dying(survived: int) -> Callable[..., None]:
    """An `os.replace` that works so many times, then ends the process."""
    numbers, replace = itertools.count(), os.replace
    return lambda *paths: replace(*paths) if next(numbers) < survived else os._exit(42)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_that_die_while_saving(saved: Path, tmp_path: Path) -> None:
    """Real ones: each ends at another `os.replace`, without any clean-up."""
    calibration, head = calibrated(tiny_vit(), MGFCConfig(rank=4)), a_head(7)
    calibration.save_pretrained(tmp_path / "new", head=head)
    old, new = adapter_in(saved), adapter_in(tmp_path / "new")
    ends, outcomes = [], []
    while 0 not in ends:
        work = tmp_path / f"work{len(ends)}"
        shutil.copytree(saved, work)
        child = os.fork()
        if child == 0:
            os.replace = dying(len(ends))
            try:
                calibration.save_pretrained(work, head=head)
                os._exit(0)
            finally:
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        found = adapter_in(work)
        assert same_adapter(found, old) != same_adapter(found, new)
        outcomes.append(same_adapter(found, new))
        calibration.save_pretrained(work)
        assert adapter_in(work)[1] is None and set(os.listdir(work)) == FILES
    assert ends == [42] * 5 + [0], "one rename commits, four move"
    assert outcomes == [False] + [True] * 5


# What a load refuses


def refused(source: Any, error: type[Exception], *facts: str, backbone: nn.Module | None = None) -> None:
    """Loading fails with a message that holds the facts, and the backbone is as it was."""
    backbone = tiny_vit() if backbone is None else backbone
    with untouched(backbone), pytest.raises(error) as caught:
        wrap_backbone(backbone, source)
    assert [fact for fact in facts if fact not in str(caught.value)] == [], str(caught.value)
    wrap_backbone(backbone, MGFCConfig(rank=2))  # still possible


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"embed_dim": 64}, ["embed_dim: expected 32, found 64"]),
        ({"depth": 4}, ["depth: expected 3, found 4"]),
        ({"patch_size": 8}, ["patch_size: expected [16, 16], found [8, 8]"]),
        ({"reg_tokens": 4}, ["num_prefix_tokens: expected 1, found 5"]),
        ({"class_token": False, "global_pool": "avg"}, ["num_prefix_tokens: expected 1, found 0"]),
        ({"depth": 2, "embed_dim": 16}, ["depth: expected 3, found 2", "embed_dim: expected 32, found 16"]),
    ],
    ids=str,
)
def test_another_backbone(saved: Path, options: dict[str, Any], facts: list[str]) -> None:
    advice = ["made for VisionTransformer (timm/vit_tiny_patch16_224", "Load the backbone that it was made for", str(saved)]
    refused(saved, AdapterMismatchError, *facts, *advice, backbone=tiny_vit(**options))


def edited_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
        removed("checksums")(directory)

    return apply


def edited_config(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(directory: Path) -> None:
        values = content(directory)
        edit(values)
        (directory / "config.json").write_text(json.dumps(values))

    return apply


def edited_bytes(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def removed(*keys: str) -> Edit:
    def remove(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return edited_config(remove)


def changed(value: Any, *keys: str) -> Edit:
    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return edited_config(change)


UP = "layers.1.low_rank.up"
WEIGHTS = "model.safetensors"
TENSORS = {
    "missing": (edited_tensors(lambda t: t.pop(UP)), AdapterMismatchError, [f"{UP}: expected in the file, found none"]),
    "extra": (edited_tensors(lambda t: t.update(x=torch.ones(2))), AdapterMismatchError, ["x: expected none, found one"]),
    "several": (
        edited_tensors(lambda t: (t.pop(UP), t.pop("layers.1.low_rank.down"))),
        AdapterMismatchError,
        ["expected in the file, found none (and 1 more)"],
    ),
    "shape": (
        edited_tensors(lambda t: t.update({UP: t[UP].T})),
        AdapterMismatchError,
        [f"{UP}: expected rank 8 at axis 1 of its shape, found (8, 128)"],
    ),
    "dtype": (
        edited_tensors(lambda t: t.update({UP: t[UP].long()})),
        AdapterMismatchError,
        [f"{UP}: expected a tensor like torch.float32, found torch.int64"],
    ),
    "empty": (edited_tensors(dict.clear), AdapterMismatchError, ["expected in the file, found none (and"]),
    "truncated": (edited_bytes(WEIGHTS, lambda data: data[:-1000]), AdapterFileError, ["found a damaged file of"]),
    "cut in the header": (edited_bytes(WEIGHTS, lambda data: data[:100]), AdapterFileError, ["damaged file of 100 bytes"]),
    "zero bytes": (edited_bytes(WEIGHTS, lambda data: b""), AdapterFileError, ["found a damaged file of 0 bytes"]),
    "garbage": (edited_bytes(WEIGHTS, lambda data: b"\x80\x04garbage" * 99), AdapterFileError, ["found a damaged file of"]),
    "trailing bytes": (edited_bytes(WEIGHTS, lambda data: data + b"more"), AdapterFileError, ["found a damaged file of"]),
    "endless header": (
        edited_bytes(WEIGHTS, lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
        AdapterFileError,
        ["found a damaged file of"],
    ),
    "no file": (lambda d: (d / WEIGHTS).unlink(), AdapterNotFoundError, ["expected a file model.safetensors, found none"]),
}
CONFIG = "config.json"
TEXTS = {
    "invalid": (edited_bytes(CONFIG, lambda data: data[:-20]), AdapterFileError, ["expected JSON, found a damaged file"]),
    "empty": (edited_bytes(CONFIG, lambda data: b""), AdapterFileError, ["expected JSON, found a damaged file"]),
    "not UTF-8": (edited_bytes(CONFIG, lambda data: b"\xff" + data), AdapterFileError, ["expected JSON, found a damaged file"]),
    "nested": (edited_bytes(CONFIG, lambda data: b"[" * 500_000), AdapterFileError, ["expected JSON, found a damaged file"]),
    "a list": (edited_bytes(CONFIG, lambda data: b"[1]"), AdapterFileError, ['("library_name": "mgfc"), found another']),
    "another library's": (
        edited_bytes(CONFIG, lambda data: b'{"model_type": "dinov2", "hidden_size": 384}'),
        AdapterFileError,
        ['("library_name": "mgfc"), found another'],
    ),
    "oversized": (
        edited_bytes(CONFIG, lambda data: data + b" " * (1 << 20)),
        AdapterFileError,
        ["expected at most 1048576 bytes, found 10"],
    ),
    "future": (
        changed(3, "format_version"),
        AdapterFileError,
        ["version 2 or older, found 3", f"mgfc {__version__}", "Upgrade mgfc"],
    ),
    "no version": (removed("format_version"), AdapterFileError, ["expected format version 2 or older, found None"]),
    "version text": (changed("1", "format_version"), AdapterFileError, ["expected format version 2 or older, found '1'"]),
    "no calibration": (removed("calibration"), AdapterFileError, ["expected an entry 'calibration', found none"]),
    "no backbone": (removed("backbone"), AdapterFileError, ["expected an entry 'backbone', found none"]),
    "backbone text": (changed("vit", "backbone"), AdapterFileError, ["expected an entry 'backbone', found none"]),
    "no depth": (removed("backbone", "depth"), AdapterFileError, ["expected an entry 'depth' of the backbone, found none"]),
    "one number": (changed(14, "backbone", "patch_size"), AdapterFileError, ["patch_size to be a list or null, found 14"]),
    "listed notes": (changed([1], "training"), AdapterFileError, ["training to be a dict or null, found [1]"]),
    "unknown key": (changed(1, "calibration", "dropout"), AdapterFileError, ["unknown key 'dropout'", "upgrade mgfc"]),
    "unknown stage key": (changed(1, "calibration", "fine", "x"), AdapterFileError, ["FineConfig: unknown key 'x'"]),
    "wrong type": (
        changed("8", "calibration", "rank"),
        AdapterFileError,
        ["MGFCConfig.rank: expected an int > 0 or None, found '8'"],
    ),
    "rank beyond the width": (
        changed(64, "calibration", "rank"),
        AdapterMismatchError,
        ["expected rank 64 at axis 0 of its shape, found (8, 32)"],
    ),
    "layers beyond the depth": (
        changed([0, 7], "calibration", "layers"),
        AdapterMismatchError,
        ["MGFCConfig.layers: expected block indices of a backbone of 3 blocks, found (0, 7)"],
    ),
    "another rank": (changed(4, "calibration", "rank"), AdapterMismatchError, ["tensors and configuration disagree"]),
    "a stage less": (
        changed(None, "calibration", "fine"),
        AdapterMismatchError,
        ["layers.0.fine.gate: expected none, found one"],
    ),
    "no file": (lambda d: (d / CONFIG).unlink(), AdapterNotFoundError, ["expected a file config.json, found none"]),
}


@pytest.mark.parametrize(("edit", "error", "facts"), TENSORS.values(), ids=TENSORS)
def test_damaged_tensors(saved: Path, edit: Edit, error: type[Exception], facts: list[str]) -> None:
    edit(saved)
    refused(saved, error, str(saved), *facts)


@pytest.mark.parametrize(("edit", "error", "facts"), TEXTS.values(), ids=TEXTS)
def test_damaged_configuration(saved: Path, edit: Edit, error: type[Exception], facts: list[str]) -> None:
    edit(saved)
    refused(saved, error, str(saved), *facts)


@pytest.mark.parametrize("fingerprint", [None, [], [1.0], ["a", "b", "c"], [None] * 3, "abc", {"a": 1}], ids=str)
def test_a_fingerprint_that_says_nothing_is_passed_over(saved: Path, fingerprint: Any) -> None:
    changed(fingerprint, "backbone", "fingerprint")(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrap_backbone(tiny_vit(), saved).calibration.config.rank == 8


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, AdapterNotFoundError, str(tmp_path), "expected a file config.json, found none", "save_pretrained writes")


def test_a_file_instead_of_a_directory(saved: Path) -> None:
    for source in (saved / WEIGHTS, str(saved / WEIGHTS), f"local-dir:{saved / WEIGHTS}"):
        refused(source, AdapterNotFoundError, "expected the directory of an adapter, found a file. Give its directory")


@pytest.mark.parametrize(
    "source",
    ["./nothing", "../nothing/here", ".", "/nothing/here", "~/nothing", "~nobody-here/x", Path("nothing"), Path("org/name")],
    ids=repr,
)
def test_a_directory_that_is_not_there(hub: HubServer, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.put("org/name", {"config.json": b"{}"})
    refused(source, AdapterNotFoundError, str(source), "expected", "found none")
    assert not hub.requests


@pytest.mark.parametrize("name", ["local-dir:org/name", "local-dir:nothing"])
def test_the_prefix_of_directories_never_means_the_hub(
    hub: HubServer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name, AdapterNotFoundError, name, "expected the directory of an adapter, found none")
    assert not hub.requests


def test_spellings_of_a_directory(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    shutil.copytree(saved, saved.parent / "org" / "name")
    sources = [saved, str(saved), f"local-dir:{saved}", "adapter", "./adapter", "~/adapter", "local-dir:~/adapter", "org/name"]
    expected = tokens(wrap_backbone(tiny_vit(), saved))
    for source in sources:
        assert torch.equal(tokens(wrap_backbone(tiny_vit(), source)), expected), source
        assert load_head(source)
    assert not hub.requests


def test_a_directory_needs_no_hub_client(saved: Path) -> None:
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mgfc import MGFCConfig, load_head, wrap_backbone
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    def forward(self, x):
        return x + self.mlp(self.attn(x))
class Vit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = 16
        self.proj = torch.nn.Conv2d(3, 32, 16, 16)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
    def forward(self, x):
        x = self.proj(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x
def loaded(*names):
    return set(names) & set(sys.modules)
vit = wrap_backbone(Vit(), MGFCConfig(rank=4))
if os.environ["ACTION"] == "save":
    vit.calibration.save_pretrained({str(saved)!r})
    assert not loaded("timm", "transformers", "peft"), sys.modules.keys()
else:
    wrap_backbone(Vit(), {str(saved)!r})
    assert not loaded("huggingface_hub", "timm", "transformers", "peft", "httpx", "httpx2"), sys.modules.keys()
"""
    for action in ("save", "load"):
        result = run_python(code, ACTION=action, PYTHONPATH=str(Path(__file__).parents[1]))
        assert result.returncode == 0, result.stderr


# Weights and precisions


def test_other_weights_of_the_same_shape_are_warned_of(saved: Path) -> None:
    other = tiny_vit(seed=5)
    with torch.no_grad():
        for block in other.blocks[1:]:
            block.mlp.fc2.weight.mul_(1.5)
    expected = r"other weights: [23] of 3 blocks differ"
    with pytest.warns(UserWarning, match=expected) as caught:
        wrap_backbone(other, saved)
    assert caught[0].filename == __file__ and str(saved) in str(caught[0].message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_weights_in_another_precision_are_the_same(saved: Path, dtype: torch.dtype) -> None:
    vit = tiny_vit().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap_backbone(vit, saved)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in vit.calibration.parameters()} == {wide}
    refined, expected = tokens(vit, IMAGES.to(dtype)), tokens(wrap_backbone(tiny_vit(), saved))
    assert refined.dtype == dtype and (refined.float() - expected).abs().mean() < 0.05
    assert all(torch.equal(p.float(), q) for p, q in zip(vit.calibration.parameters(), parameters(saved), strict=True))


def parameters(directory: Path) -> list[nn.Parameter]:
    return list(wrap_backbone(tiny_vit(), directory).calibration.parameters())


def test_an_adapter_of_a_half_precision_backbone(tmp_path: Path) -> None:
    vit = tiny_vit().bfloat16()
    calibrated(vit).save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = wrap_backbone(tiny_vit(), tmp_path)
    assert equal(again.calibration.state_dict(), vit.calibration.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tensors_stored_in_another_precision_are_read(saved: Path, dtype: torch.dtype) -> None:
    edited_tensors(lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))(saved)
    calibration = wrap_backbone(tiny_vit(), saved).calibration
    assert {p.dtype for p in calibration.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    vit = tiny_vit()
    state = torch.get_rng_state()
    wrap_backbone(vit, saved)
    load_head(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_adapter_trains_on(saved: Path) -> None:
    vit = wrap_backbone(tiny_vit(), saved)
    before = {key: value.clone() for key, value in vit.calibration.adapter.state_dict().items()}
    optimizer = torch.optim.SGD(vit.calibration.parameters(), lr=1.0)
    output = vit.forward_features(IMAGES)
    (output * torch.randn(output.shape)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(value, before[key]) for key, value in get_calibration(vit).adapter.named_parameters())
    assert equal(make_adapter(find_tower(tiny_vit()), saved)[0].state_dict(), before), "training wrote into the file"


# Heads


class OwnHead(nn.Module):
    """With what makes saving hard: tied weights, a transposed parameter, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.transposed = nn.Parameter(torch.randn(3, 5).T)
        self.norm = nn.BatchNorm2d(4)


def test_a_head_of_the_users_own(tmp_path: Path) -> None:
    head, own = OwnHead(), OwnHead().double()
    calibrated(tiny_vit()).save_pretrained(tmp_path, head=head)
    assert content(tmp_path)["head"] == {"class": "OwnHead", "arguments": None}
    optimizer = torch.optim.SGD(own.parameters(), lr=1.0)
    parameters = list(own.parameters())
    assert load_head(tmp_path, own) is own
    assert all(a is b for a, b in zip(own.parameters(), parameters, strict=True)), "the optimizer holds other parameters"
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)
    assert {p.dtype for p in own.parameters()} == {torch.float64} and own.second.weight is own.first.weight
    assert all(torch.equal(value.float(), head.state_dict()[key].float()) for key, value in own.state_dict().items())


def test_a_head_of_another_class_must_be_given(tmp_path: Path) -> None:
    calibrated(tiny_vit()).save_pretrained(tmp_path, head=OwnHead())
    with pytest.raises(AdapterMismatchError, match=r"expected a SegmentationHead, found a head of class OwnHead.*`head`"):
        load_head(tmp_path)
    with pytest.raises(AdapterMismatchError, match="tensors and configuration disagree"):
        load_head(tmp_path, nn.Linear(4, 4))


def test_a_head_with_other_parameters_stays_as_it_was(saved: Path) -> None:
    head = SegmentationHead([32, 32], 9, hidden_dim=8)
    before = snapshot(head)["state"]
    with pytest.raises(AdapterMismatchError, match=r"classify\.weight: expected shape \(9, 8, 1, 1\), found \(5, 8, 1, 1\)"):
        load_head(saved, head)
    assert equal(head.state_dict(), before)


def test_arguments_of_a_head_that_json_cannot_hold(tmp_path: Path) -> None:
    head = nn.Linear(4, 4)
    head.arguments = {"activation": torch.nn.functional.gelu}
    with pytest.raises(ConfigError, match=r"head\.arguments: expected what JSON can hold"):
        calibrated(tiny_vit()).save_pretrained(tmp_path, head=head)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "arguments",
    [
        None,
        {},
        [1],
        {"width": 3},
        {"in_channels": 3, "num_classes": 5},
        {"in_channels": [8], "num_classes": "x"},
        {"in_channels": [32], "num_classes": -5},
        {"in_channels": [32, 32], "num_classes": 5, "hidden_dim": 0},
    ],
    ids=str,
)
def test_damaged_arguments_of_a_head(saved: Path, arguments: Any) -> None:
    changed(arguments, "head", "arguments")(saved)
    with pytest.raises(AdapterFileError, match="expected the arguments of a SegmentationHead"):
        load_head(saved)


def test_absurd_arguments_of_a_head_take_no_memory(saved: Path) -> None:
    changed(10**11, "head", "arguments", "num_classes")(saved)
    with pytest.raises(AdapterFileError, match="each from 1 to 65536"):
        load_head(saved)


@pytest.mark.parametrize("edit", [lambda p: p.unlink(), lambda p: p.write_bytes(b"x" * 50)], ids=["missing", "garbage"])
def test_a_damaged_head(saved: Path, edit: Edit) -> None:
    edit(saved / HEAD)
    with pytest.raises((AdapterFileError, AdapterNotFoundError), match=r"expected (a file )?head\.safetensors"):
        load_head(saved)
    assert wrap_backbone(tiny_vit(), saved), "the adapter itself is whole"


def test_training_in_eval_mode_is_noticed(tmp_path: Path) -> None:
    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=8))
    optimizer = torch.optim.SGD(vit.calibration.parameters(), lr=1.0)
    vit.calibration.save_pretrained(tmp_path / "fresh")  # without a warning: nothing was trained
    assert "statistics of no batch yet" in vit.calibration.summary()
    for _ in range(2):
        vit.forward_features(IMAGES).square().mean().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=r"statistics have seen no batch.*Gather them before you save"):
        vit.calibration.save_pretrained(tmp_path / "eval")
    vit.train().forward_features(IMAGES)
    assert vit.calibration.num_batches == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.calibration.save_pretrained(tmp_path / "train")
