"""A directory under many hands: other libraries' models, readers beside savers, processes that die, disks that are full."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise, same
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import calibrated, tiny_dinov2, tiny_vit, untouched
from torch import nn

from mgfc import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    FineConfig,
    MediumConfig,
    MGFCConfig,
    MGFCError,
    SegmentationHead,
    load_head,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.backbones.detection import Tower, find_tower
from mgfc.cli import main
from mgfc.interop.rein import convert_rein
from mgfc.storage import directory as storage_directory
from mgfc.storage.checkpoint import read_checkpoint
from mgfc.storage.loading import make_adapter
from mgfc.storage.locking import locked
from mgfc.storage.snapshot import DirectoryFiles, consistently, one_save
from mgfc.storage.tensors import read_header, read_tensors

forking = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
FILES = {"config.json", "model.safetensors", "README.md"}
EXAMPLE = Path(__file__).resolve().parent / "format_1"  # what version 0.1.0 saved


def a_head(num_classes: int = 5) -> SegmentationHead:
    head = SegmentationHead([32, 32], num_classes, hidden_dim=8)
    randomise(head)
    return head


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    calibrated(vit := tiny_vit()).save_pretrained(tmp_path / "adapter", head=a_head())
    assert vit.calibration
    return tmp_path / "adapter"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# Somebody else's model


def write_transformers_model(directory: Path) -> None:
    tiny_dinov2().save_pretrained(directory)


def write_trainer_output(directory: Path) -> None:
    tiny_dinov2().save_pretrained(directory / "checkpoint-500")
    (directory / "training_args.bin").write_bytes(b"x")


def write_peft_adapter(directory: Path) -> None:
    import peft

    peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"])).save_pretrained(directory)


def write_shards(directory: Path) -> None:
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"x")
    (directory / "model.safetensors.index.json").write_text("{}")


def write_broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"library_name": "mgfc"')


FOREIGN = {
    "a Transformers model": (write_transformers_model, "config.json, model.safetensors"),
    "a Trainer's output": (write_trainer_output, "checkpoint-500, training_args.bin"),
    "an adapter of PEFT's": (write_peft_adapter, "adapter_config.json"),
    "shards": (write_shards, "model.safetensors.index.json"),
    "a configuration that nobody can read": (write_broken_config, "config.json"),
}


@pytest.mark.parametrize(("write", "named"), FOREIGN.values(), ids=FOREIGN)
def test_somebody_elses_model_is_never_replaced(write: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(AdapterFileError, match="expected an mgfc adapter, or a place without a model") as caught:
        calibrated(tiny_vit()).save_pretrained(tmp_path)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_a_model_that_replaced_an_adapter_is_somebody_elses(saved: Path) -> None:
    write_transformers_model(saved)
    with pytest.raises(AdapterFileError, match="of another library"):
        calibrated(tiny_vit()).save_pretrained(saved)


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "epoch=3.ckpt", "iter_1000.pth", "runs/events.out"])
def test_what_is_in_nobodys_way_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    calibrated(tiny_vit()).save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and wrap_backbone(tiny_vit(), tmp_path)


def test_an_adapter_of_format_1_may_be_saved_over(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "adapter")
    calibrated(tiny_vit()).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["format_version"] == 2


def test_somebody_elses_repository_is_never_replaced(logged_in: HubServer) -> None:
    logged_in.put("org/model", {"config.json": b'{"model_type": "dinov2"}', "model.safetensors": b"theirs"})
    commits = len(logged_in.repos["org/model"].commits)
    with pytest.raises(AdapterFileError, match=r"org/model: expected an mgfc adapter.*found config.json, model.safetensors"):
        calibrated(tiny_vit()).push_to_hub("org/model")
    assert len(logged_in.repos["org/model"].commits) == commits
    logged_in.put("org/own", {"unet/config.json": b"{}", "notes.txt": b"mine"})
    calibrated(tiny_vit()).push_to_hub("org/own")
    calibrated(tiny_vit()).push_to_hub("org/own")


# Readers and savers at once


def save_by_turns(directory: Path, until: Callable[[int], bool], first: int = 0) -> None:
    """Saves adapters of rank 2 and 4 in turn, each with a head and an adapter of PEFT's of its own sizes."""
    from peft import LoraConfig

    savers = []
    for rank in (2, 4):
        config = LoraConfig(r=rank, target_modules=["qkv"])
        vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=rank), peft_config=config)
        savers.append((vit.calibration, a_head(rank)))
    number = first
    while not until(number):
        calibration, head = savers[number % 2]
        calibration.save_pretrained(directory, head=head, training={"save": number})
        number += 1


@contextmanager
def child(action: Callable[[], None]) -> Iterator[int]:
    """A forked process; it has ended, or is killed, when the context is left."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
            code = 0
        finally:
            os._exit(code)
    try:
        yield process
    finally:
        with suppress(ChildProcessError):  # it was waited for
            if os.waitpid(process, os.WNOHANG)[0] == 0:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def ended_well(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def tower() -> Tower:
    return find_tower(tiny_vit())


def ranks_found(directory: Path, reader: Tower) -> set[int]:
    """Rank of the calibrators, of LoRA, and the head's classes, which are one number for one save."""
    with one_save(directory) as fixed:
        adapter, tuner = make_adapter(reader, fixed)
        head = load_head(fixed)
    assert isinstance(head, SegmentationHead) and tuner is not None and tuner[1] is not None
    state = tuner[1]["base_model.model.blocks.0.attn.qkv.lora_A.weight"]
    return {adapter.config.rank, len(adapter.layers["0"].low_rank.down), tuner[0].r, len(state), head.arguments["num_classes"]}


@forking
def test_a_reader_gets_the_files_of_one_save(tmp_path: Path) -> None:
    save_by_turns(tmp_path, lambda number: number == 1)
    reader, end = tower(), time.monotonic() + 6
    found: list[int] = []
    with child(lambda: save_by_turns(tmp_path, lambda _: time.monotonic() > end)) as process:
        while time.monotonic() < end:
            ranks = ranks_found(tmp_path, reader)
            assert len(ranks) == 1, "files of two saves"
            found += ranks
            adapter, tuner = make_adapter(reader, tmp_path)
            assert tuner is not None and tuner[0].r == adapter.config.rank, "calibrators of one save with LoRA of another"
        assert ended_well(process)
    assert set(found) == {2, 4} and len(found) > 20


@forking
def test_savers_at_once_all_succeed_and_the_last_one_stays(tmp_path: Path) -> None:
    def save(first: int) -> Callable[[], None]:
        return lambda: save_by_turns(tmp_path, lambda number: number == first + 15, first)

    with child(save(0)) as one, child(save(100)) as two, child(save(200)) as three:
        assert [ended_well(process) for process in (one, two, three)] == [True] * 3
    last = json.loads((tmp_path / "config.json").read_text())["training"]["save"]
    assert last % 100 == 14 and len(ranks_found(tmp_path, tower())) == 1
    assert not list(tmp_path.glob(".*")), "debris"


@forking
def test_savers_that_are_killed_leave_one_save(tmp_path: Path) -> None:
    """Real processes and signals: kill -9 at any time, with a reader beside, and another saver afterwards."""
    save_by_turns(tmp_path, lambda number: number == 1)
    reader, draw, leftovers = tower(), random.Random(0), 0
    umask = os.umask(0o022)
    try:
        for _ in range(12):
            with child(lambda: save_by_turns(tmp_path, lambda _: False)):
                time.sleep(0.15 + draw.random() * 0.2)
                assert len(ranks_found(tmp_path, reader)) == 1
            assert len(ranks_found(tmp_path, reader)) == 1
            for path in tmp_path.glob(".saving-*"):
                leftovers += 1
                modes = [stat.S_IMODE(p.stat().st_mode) for p in (path, *path.iterdir())]
                assert modes[0] == 0o755 and set(modes[1:]) <= {0o644}, "others cannot read what a crash left"
        save_by_turns(tmp_path, lambda number: number == 2)
    finally:
        os.umask(umask)
    assert leftovers > 0 and not list(tmp_path.glob(".*"))


@forking
def test_a_lock_is_given_back_whatever_was_forked_meanwhile(tmp_path: Path) -> None:
    """As workers of a data loader, which live on."""
    with ExitStack() as stack:
        with locked(tmp_path) as held:
            stack.enter_context(child(lambda: time.sleep(60)))
        with child(lambda: locked(tmp_path).__enter__() and None) as process:
            end = time.monotonic() + 10
            while time.monotonic() < end and os.waitpid(process, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
            assert held and time.monotonic() < end, "the lock is still held"


def test_a_reader_retries_what_was_moved_under_it(saved: Path, tmp_path: Path) -> None:
    """A file is found in `.incoming` and moved to its place before it is opened."""
    (saved / ".incoming").mkdir()
    os.replace(saved / "model.safetensors", saved / ".incoming" / "model.safetensors")
    tries = []

    def read(files: Any) -> int:
        path = files("model.safetensors")
        tries.append(path.parent.name)
        if len(tries) == 1:
            os.replace(path, saved / "model.safetensors")
        return len(read_header(path))

    assert consistently(DirectoryFiles(saved), read) > 0 and tries == [".incoming", "adapter"]


def test_a_reader_does_not_believe_an_error_of_two_saves(saved: Path) -> None:
    """Another save between configuration and tensors: neither a mismatch nor a mixture comes out."""
    other = calibrated(tiny_vit(), MGFCConfig(rank=4))
    times = []

    def read(files: Any) -> int:
        rank = json.loads(files("config.json").read_text())["calibration"]["rank"]
        if not times:
            times.append(other.save_pretrained(saved))
        found = read_header(files("model.safetensors"))["layers.0.low_rank.down"].shape[0]
        if found != rank:
            raise AdapterFileError("a mixture")
        return found

    assert consistently(DirectoryFiles(saved), read) == 4


def test_readers_write_nothing(saved: Path) -> None:
    before = contents(saved)
    saved.chmod(0o555)
    try:
        wrap_backbone(tiny_vit(), saved)
        load_head(saved)
    finally:
        saved.chmod(0o755)
    assert contents(saved) == before


def test_on_windows_only_what_may_be_written_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no directories, and its fsync wants a descriptor that may write."""
    import fcntl

    real_open, real_sync = os.open, os.fsync

    def windows_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path) and storage_directory.__name__ in stack_modules():
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    def windows_sync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_sync(descriptor)

    def stack_modules() -> set[str]:
        import sys

        frame = sys._getframe(2)
        return {frame.f_globals["__name__"]}

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_sync)
    calibrated(tiny_vit()).save_pretrained(tmp_path / "out")
    assert set(os.listdir(tmp_path / "out")) == FILES and wrap_backbone(tiny_vit(), tmp_path / "out")


# What cannot be written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(saved: Path, value: float) -> None:
    before = contents(saved)
    calibration = calibrated(tiny_vit())
    with torch.no_grad():
        calibration.layers["1"].low_rank.up[3, 2] = value
    fact = r"layers\.1\.low_rank\.up: expected finite numbers, found 1 of 1024 that are NaN or infinite"
    with pytest.raises(ConfigError, match=fact):
        calibration.save_pretrained(saved)
    calibration = calibrated(tiny_vit())
    calibration.adapter.coarse.source.total[0, 0, 0] = value
    with pytest.raises(ConfigError, match=r"coarse\.source\.total"):
        calibration.save_pretrained(saved)
    head = a_head()
    head.classify.bias.data[0] = value
    with pytest.raises(ConfigError, match=r"head\.safetensors: classify\.bias"):
        calibrated(tiny_vit()).save_pretrained(saved, head=head)
    assert contents(saved) == before


def test_masks_of_a_head_may_be_infinite(tmp_path: Path) -> None:
    head = nn.Linear(2, 2)
    head.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    calibrated(tiny_vit()).save_pretrained(tmp_path, head=head)
    again = nn.Linear(2, 2)
    again.register_buffer("mask", torch.zeros(2))
    assert load_head(tmp_path, again).mask[1] == -torch.inf
    head.mask[0] = torch.nan
    with pytest.raises(ConfigError, match="mask"):
        calibrated(tiny_vit()).save_pretrained(tmp_path, head=head)


OLD_PATHLIB = pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib holds the functions of os that it found")
MKDIR = pytest.param("os.mkdir", marks=OLD_PATHLIB)


@pytest.mark.parametrize("at", ["os.replace", "os.fsync", MKDIR, "pathlib.Path.write_bytes", "pathlib.Path.mkdir"])
def test_a_disk_that_is_full(saved: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = contents(saved)
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        with pytest.raises(AdapterNotFoundError, match=r"expected what can be written.*No space left on device"):
            calibrated(tiny_vit(), MGFCConfig(rank=4)).save_pretrained(saved)
    assert contents(saved) == before


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdapterNotFoundError, match="expected what can be written"):
        calibrated(tiny_vit()).save_pretrained(tmp_path / "out")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_directory_that_must_not_be_written(saved: Path) -> None:
    saved.chmod(0o555)
    try:
        with pytest.raises(AdapterNotFoundError, match="expected what can be written"):
            calibrated(tiny_vit()).save_pretrained(saved)
    finally:
        saved.chmod(0o755)


# What cannot be read


@pytest.mark.parametrize("source", ["/" + "x" * 300, "x" * 300, "./" + "y/" * 3000, "/a\0b", "a\0b", "local-dir:" + "z" * 5000])
def test_paths_that_no_system_has(hub: HubServer, source: str) -> None:
    vit = tiny_vit()
    with untouched(vit), pytest.raises(MGFCError):
        wrap_backbone(vit, source)
    with pytest.raises(MGFCError):
        load_head(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("code", [13, 24, 5])
def test_files_that_cannot_be_opened(saved: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission, out of file descriptors, a broken disk."""
    real = Path.open

    def guarded(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    vit = tiny_vit()
    with untouched(vit), pytest.raises(AdapterNotFoundError, match=os.strerror(code)):
        wrap_backbone(vit, saved)


def test_a_flipped_bit_is_found(saved: Path) -> None:
    for name, load in (
        ("model.safetensors", lambda: wrap_backbone(tiny_vit(), saved)),
        ("head.safetensors", lambda: load_head(saved)),
    ):
        data = bytearray((saved / name).read_bytes())
        data[-7] ^= 4
        (saved / name).write_bytes(data)
        with pytest.raises(AdapterFileError, match=r'expected the file that was saved.*remove "checksums"'):
            load()


def test_a_file_that_was_changed_on_purpose(saved: Path) -> None:
    tensors = {key: value.half() for key, value in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors")
    values = json.loads((saved / "config.json").read_text())
    del values["checksums"]
    (saved / "config.json").write_text(json.dumps(values))
    assert wrap_backbone(tiny_vit(), saved)


def test_a_damaged_download_is_fetched_again(logged_in: HubServer, hub: HubServer) -> None:
    calibrated(tiny_vit()).push_to_hub("org/adapter")
    wrap_backbone(tiny_vit(), "org/adapter")
    from huggingface_hub import hf_hub_download

    cached = Path(hf_hub_download("org/adapter", "model.safetensors")).resolve()
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match="damaged"):
        wrap_backbone(tiny_vit(), "org/adapter", local_files_only=True)
    assert wrap_backbone(tiny_vit(), "org/adapter")
    assert wrap_backbone(tiny_vit(), "org/adapter", local_files_only=True), "the cache is whole again"


def test_a_repository_that_is_damaged_itself_is_fetched_twice_and_no_more(logged_in: HubServer) -> None:
    calibrated(tiny_vit()).push_to_hub("org/adapter")
    files = logged_in.files("org/adapter")
    logged_in.put("org/adapter", {**files, "model.safetensors": files["model.safetensors"][:-100]})
    with pytest.raises(AdapterFileError, match="damaged"):
        wrap_backbone(tiny_vit(), "org/adapter")
    assert len([r for r in logged_in.requests if r.method == "GET" and r.path.endswith("config.json")]) <= 2


# Files of format 1


def old_vit() -> nn.Module:
    return tiny_dinov2(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=56)


def test_an_adapter_of_format_1_loads() -> None:
    vit = old_vit()
    with pytest.warns(UserWarning, match="format 1") as caught:
        wrap_backbone(vit, EXAMPLE)
    texts = [str(item.message) for item in caught if "format 1" in str(item.message)]
    assert len(texts) == 1 and "observing()" in texts[0] and "class and register tokens" in texts[0]
    old, adapter = load_file(EXAMPLE / "model.safetensors"), vit.calibration.adapter
    layer = adapter.layers["9"]
    assert torch.equal(layer.low_rank.down, old["layers.9.down.weight"])
    assert torch.equal(layer.low_rank.up, old["layers.9.up.weight"])
    assert torch.equal(layer.medium.source.value, old["layers.9.medium.source.value"])
    assert layer.medium.source.count == old["layers.9.medium.source.count"] and layer.medium.source.ready == 1
    assert torch.equal(layer.fine.kernel, old["layers.9.fine.kernel"])
    assert adapter.coarse is not None and not adapter.coarse.source.ready and not adapter.is_observed
    assert not any(value.is_meta for value in adapter.state_dict().values())
    vit(torch.randn(1, 3, 28, 42))
    assert isinstance(load_head(EXAMPLE), SegmentationHead)


def test_an_adapter_of_format_1_is_saved_in_todays(tmp_path: Path) -> None:
    vit = old_vit()
    with pytest.warns(UserWarning, match="format 1"):
        wrap_backbone(vit, EXAMPLE)
    vit.calibration.save_pretrained(tmp_path)
    again = old_vit()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*format 1.*")
        wrap_backbone(again, tmp_path)
    one, two = vit.calibration.state_dict(), again.calibration.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_a_configuration_of_format_1_leaves_out_means_what_it_meant(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "adapter")
    path = tmp_path / "adapter" / "config.json"
    values = json.loads(path.read_text())
    del values["calibration"]["fine"], values["calibration"]["coarse"], values["calibration"]["medium"]
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="format 1"):
        calibration = wrap_backbone(old_vit(), tmp_path / "adapter").calibration
    assert None not in (calibration.config.fine, calibration.config.coarse)
    assert calibration.config.medium == MediumConfig(layers="last:4", threshold=1.0)


def test_info_of_format_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(EXAMPLE)]) == 0
    assert "format 1" in capsys.readouterr().out


def test_reading_holds_little_more_than_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000), "b": torch.ones(2, 3).half(), "c": torch.tensor(2)}, tmp_path / "x.safetensors")
    found = read_tensors(tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# An adapter of PEFT's beside the calibrators


def with_peft(directory: Path, **options: Any) -> Path:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["qkv"], **options)
    wrap_backbone(tiny_vit(), MGFCConfig(rank=2), peft_config=config).calibration.save_pretrained(directory)
    return directory


def change_peft(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(directory: Path, *facts: str) -> None:
    vit, start = tiny_vit(), time.monotonic()
    with untouched(vit), pytest.raises((AdapterFileError, AdapterMismatchError)) as caught:
        wrap_backbone(vit, directory)
    assert [fact for fact in facts if fact not in str(caught.value)] == [], str(caught.value)
    assert time.monotonic() - start < 5


PEFT_VALUES = {
    "modules that are not there": {"modules_to_save": ["norm"]},
    "XLORA": {"peft_type": "XLORA"},
    "another method": {"peft_type": "OFT"},
    "no method": {"peft_type": "NOTHING"},
    "a list as a method": {"peft_type": ["LORA"]},
    "mgfc's own method": {"peft_type": "MGFC"},
    "a rank that never ends": {"r": 10**6},
    "a negative rank": {"r": -1},
    "a huge number": {"lora_alpha": 2**60},
    "alpha that is a text": {"lora_alpha": "x"},
    "a pattern that never ends": {"target_modules": r"(a+)+$|(.*.*)*x"},
    "many wildcards": {"exclude_modules": ".*.*.*.*.*x"},
    "a slow key": {"rank_pattern": {"(.+)+x": 2}},
    "a wrong pattern": {"target_modules": "(["},
    "modules to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "copies of blocks": {"layer_replication": [[0, 3]] * 50},
    "endless refinement": {"init_lora_weights": "pissa_niter_1000000"},
    "a start that needs data": {"init_lora_weights": "eva"},
    "many names": {"target_modules": [f"m{i}" for i in range(2000)]},
    "a number for names": {"target_modules": 3},
    "an unknown module": {"target_modules": ["nothing"]},
    "more modules": {"target_modules": ["qkv", "fc1"]},
    "other indices": {"layers_to_transform": [10**6]},
}


@pytest.mark.parametrize("values", PEFT_VALUES.values(), ids=PEFT_VALUES)
@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_a_failed_load_of_an_adapter_of_pefts_changes_nothing(values: dict[str, Any], start: Any, tmp_path: Path) -> None:
    change_peft(with_peft(tmp_path, init_lora_weights=start), **values)
    refused(tmp_path)


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_a_missing_tensor_of_pefts_changes_nothing(start: Any, tmp_path: Path) -> None:
    path = with_peft(tmp_path, init_lora_weights=start) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["checksums"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused(tmp_path, "1 missing and 0 unknown")


def test_a_failure_after_the_rehearsal_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("on the way")

    with_peft(tmp_path, init_lora_weights="olora")
    monkeypatch.setattr(peft, "set_peft_model_state_dict", fails)
    refused(tmp_path, "AttributeError: on the way")


@pytest.mark.parametrize("text", ["[" * 100_000, "", "[1]", "{", '{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}", '"x"'])
def test_damaged_configurations_of_pefts(text: str, tmp_path: Path) -> None:
    (with_peft(tmp_path) / "adapter_config.json").write_text(text)
    refused(tmp_path, "adapter_config.json")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", True])
def test_unwrapping_gives_the_weights_back(start: Any, tmp_path: Path) -> None:
    bare, images = tiny_vit(), torch.randn(1, 3, 32, 32)
    vit = tiny_vit()
    with_start = {"init_lora_weights": start}
    from peft import LoraConfig

    with untouched(vit):
        wrap_backbone(vit, MGFCConfig(rank=2), peft_config=LoraConfig(r=2, target_modules=["qkv"], **with_start))
        for name, parameter in vit.named_parameters():
            if "lora" in name:
                parameter.data += torch.randn(parameter.shape) * 0.1
        vit.calibration.save_pretrained(tmp_path)
        expected = vit(images)
        unwrap_backbone(vit)
    with untouched(vit):
        assert torch.equal(wrap_backbone(vit, tmp_path)(images), expected)
        unwrap_backbone(vit)
    assert torch.equal(vit(images), bare(images))


def test_a_slow_pattern_of_ones_own_is_saved_as_names(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=r"(blocks\.\d+\.)+attn\.qkv")
    wrap_backbone(tiny_vit(), MGFCConfig(rank=2), peft_config=config).calibration.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == [f"blocks.{i}.attn.qkv" for i in range(3)] and wrap_backbone(tiny_vit(), tmp_path)


# Checkpoints


REINS = "backbone.reins."
DEPTH, DIM, TOKENS = 3, 32, 7


def rein() -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "mlp_token2feat.weight": (DIM, DIM),
        "mlp_token2feat.bias": (DIM,),
        "mlp_delta_f.weight": (DIM, DIM),
        "mlp_delta_f.bias": (DIM,),
        "scale": (),
        "learnable_tokens": (DEPTH, TOKENS, DIM),
    }
    return {REINS + key: torch.ones(shape) for key, shape in shapes.items()}


REIN = {
    "a number": {"learnable_tokens": torch.tensor(1.0)},
    "sparse": {"learnable_tokens": torch.ones(DEPTH, TOKENS, DIM).to_sparse()},
    "quantized": {"mlp_delta_f.bias": torch.quantize_per_tensor(torch.ones(DIM), 1.0, 0, torch.qint8)},
    "complex": {"scale": torch.tensor(1j)},
    "meta": {"learnable_tokens": torch.ones(DEPTH, TOKENS, DIM, device="meta")},
    "stride 0": {"learnable_tokens": torch.ones(1).expand(40, 10**5, 1000)},
    "stride 0 in the linear layers": {"mlp_delta_f.weight": torch.ones(1).expand(10**6, 10**6)},
    "a depth that never ends": {"learnable_tokens": torch.ones(10**6, 2, 1)},
    "one dimension": {"mlp_delta_f.weight": torch.ones(DIM)},
    "integers": {"scale": torch.tensor(1)},
    "float8": {"mlp_delta_f.bias": torch.ones(DIM).to(torch.float8_e4m3fn)},
    "nothing": {"learnable_tokens": torch.ones(0, TOKENS, DIM)},
    "not finite": {"mlp_delta_f.bias": torch.full((DIM,), torch.nan)},
    "one token": {"learnable_tokens": torch.ones(DEPTH, 1, DIM)},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("changed", REIN.values(), ids=REIN)
def test_odd_tensors_of_a_rein_checkpoint(changed: dict[str, Any], tmp_path: Path) -> None:
    torch.save(rein(), tmp_path / "rein.pth")
    convert_rein(tmp_path / "rein.pth", tmp_path / "good")
    torch.save(rein() | {REINS + key: value for key, value in changed.items()}, tmp_path / "rein.pth")
    start = time.monotonic()
    with pytest.raises((AdapterFileError, ConfigError)):
        convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    assert time.monotonic() - start < 2 and not (tmp_path / "out").exists()


def test_a_head_of_stride_0(tmp_path: Path) -> None:
    torch.save(rein() | {"decode_head.weight": torch.ones(1).expand(10**6, 10**4)}, tmp_path / "rein.pth")
    with pytest.raises(AdapterFileError, match=r"decode_head\.weight: expected a dense tensor"):
        convert_rein(tmp_path / "rein.pth", tmp_path / "out")


def test_compressed_and_greedy_checkpoints(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
        with zipfile.ZipFile(tmp_path / "greedy.pth", "w") as greedy:
            for entry in plain.infolist():
                data = (
                    b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR." if entry.filename.endswith("data.pkl") else plain.read(entry)
                )
                greedy.writestr(entry.filename, data)
    torch.save(rein(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, reason in (("packed", "compressed"), ("greedy", "memory of a size that it names"), ("old", "zip")):
        with pytest.raises(AdapterFileError, match=reason):
            read_checkpoint(tmp_path / f"{name}.pth")


# What a trainer saved


def trained_model() -> nn.Module:
    """A host of a wrapped backbone, as a trainer sees it."""
    torch.manual_seed(1)
    host = nn.ModuleDict({"encoder": tiny_vit(), "head": nn.Conv2d(32, 5, 1)})
    calibrated(host["encoder"], MGFCConfig(rank=4, fine=FineConfig(5)))
    return host


def save_plain(host: nn.Module, directory: Path) -> Path:
    torch.save(host.state_dict(), directory / "model.pt")
    return directory / "model.pt"


def save_safetensors(host: nn.Module, directory: Path) -> Path:
    save_file({key: value.contiguous() for key, value in host.state_dict().items()}, directory / "model.safetensors")
    return directory / "model.safetensors"


def save_lightning(host: nn.Module, directory: Path) -> Path:
    import lightning

    module = lightning.LightningModule()
    module.model = host
    module.training_step = lambda batch, batch_idx: host["encoder"](batch[0]).square().mean()  # type: ignore[method-assign]
    module.configure_optimizers = lambda: torch.optim.SGD(host["encoder"].calibration.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(2, 3, 32, 32)), batch_size=2)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=directory, **options)
    trainer.fit(module, loader)
    trainer.save_checkpoint(directory / "model.ckpt")
    return directory / "model.ckpt"


def save_shards(host: nn.Module, directory: Path) -> Path:
    places = {}
    for number, key in enumerate(host.state_dict()):
        places[key] = f"model-0000{number % 3}.safetensors"
    for name in set(places.values()):
        save_file({k: v.contiguous() for k, v in host.state_dict().items() if places[k] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def save_directory(host: nn.Module, directory: Path) -> Path:
    (directory / "config.json").write_text('{"model_type": "host"}')
    return save_safetensors(host, directory).parent


SAVERS = [save_plain, save_safetensors, save_lightning, save_shards, save_directory]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_what_a_trainer_saved_loads(save: Callable[[nn.Module, Path], Path], tmp_path: Path) -> None:
    host = trained_model()
    source = save(host, tmp_path)
    expected = host["encoder"].calibration.adapter.state_dict()
    vit = tiny_vit()
    with pytest.warns(UserWarning, match="does not hold strength, temperature"):
        wrap_backbone(vit, source)
    found = vit.calibration.adapter.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in found.items())
    images = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        assert torch.equal(vit(images), host["encoder"].eval()(images))


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saved_loads(tmp_path: Path) -> None:
    model = tiny_dinov2()
    calibrated(model, MGFCConfig(rank=4))
    model.save_pretrained(tmp_path)
    again = tiny_dinov2()
    wrap_backbone(again, tmp_path)
    one, two = model.calibration.adapter.state_dict(), again.calibration.adapter.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_checkpoint_without_calibrators_says_so(tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "bare.pt")
    vit = tiny_vit()
    with untouched(vit), pytest.raises(AdapterNotFoundError, match="in their names; here are none"):
        wrap_backbone(vit, tmp_path / "bare.pt")


def test_a_checkpoint_of_another_backbone(tmp_path: Path) -> None:
    source = save_plain(trained_model(), tmp_path)
    for other in (tiny_vit(depth=2), tiny_vit(embed_dim=64)):
        with untouched(other), pytest.raises(AdapterMismatchError):
            wrap_backbone(other, source)


def test_a_checkpoint_of_two_models(tmp_path: Path) -> None:
    state = trained_model().state_dict()
    torch.save({f"{who}.{key}": value for key, value in state.items() for who in ("student", "teacher")}, tmp_path / "x.pt")
    with pytest.raises(AdapterFileError, match=r"expected one adapter, found student\..*teacher\."):
        wrap_backbone(tiny_vit(), tmp_path / "x.pt")


def test_a_checkpoint_with_a_tensor_too_few(tmp_path: Path) -> None:
    state = trained_model().state_dict()
    del state["encoder.calibration.adapter_default.layers.1.low_rank.up"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(AdapterMismatchError, match=r"layers\.1\.low_rank\.up: expected in the file, found none"):
        wrap_backbone(tiny_vit(), tmp_path / "x.pt")


# Configurations and tensors from strangers


def change_config(directory: Path, value: Any, *keys: str) -> None:
    values = content = json.loads((directory / "config.json").read_text())
    for key in keys[:-1]:
        values = values[key]
    values[keys[-1]] = value
    (directory / "config.json").write_text(json.dumps(content))


CONFIG_VALUES: dict[str, tuple[Any, ...]] = {
    "a list as a method": ([], "method"),
    "a strength of 400 digits": (10**400, "calibration", "coarse", "strength"),
    "a fingerprint of 400 digits": ([10**400] * 3, "backbone", "fingerprint"),
    "layers of 5000 digits": ("first:" + "9" * 5000, "calibration", "layers"),
    "prototypes": (2**62, "calibration", "medium", "num_prototypes"),
    "prototypes within the bound": (60_000, "calibration", "medium", "num_prototypes"),
    "a kernel": ({"kernel_size": 10**9 + 1}, "calibration", "fine"),
    "classes": (10**18, "calibration", "num_classes"),
    "more classes": (10**30, "calibration", "num_classes"),
    "half a surrogate pair": ("\ud800", "license"),
    "deep notes": (json.loads("[" * 500 + "]" * 500), "training", "x"),
    "a version that is true": (True, "format_version"),
    "version 0": (0, "format_version"),
    "a checksum of something else": ({"model.safetensors": "0" * 64}, "checksums"),
    "a checksum that is none": ({"model.safetensors": 3}, "checksums"),
    "a head that is a list": ([1], "head"),
    "a depth of texts": ("3", "backbone", "depth"),
}


@pytest.mark.parametrize("change", CONFIG_VALUES.values(), ids=CONFIG_VALUES)
def test_configurations_from_strangers(change: tuple[Any, ...], saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(saved, *change)
    refused(saved)
    assert main(["info", str(saved)]) in (0, 1)
    printed = capsys.readouterr()
    (printed.out + printed.err).encode()


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": [32] * 16_000, "num_classes": 5},
        {"in_channels": [32] * 200, "num_classes": 5, "hidden_dim": 8},
        {"in_channels": [32, 32], "num_classes": 10**18, "hidden_dim": 8},
        {"in_channels": [32, 32], "num_classes": 60_000, "hidden_dim": 8},
        {"in_channels": [32, 10**10], "num_classes": 5, "hidden_dim": 8},
        {"in_channels": [32, True], "num_classes": 5, "hidden_dim": 8},
        {"in_channels": {"a": 32}, "num_classes": 5},
    ],
    ids=lambda arguments: str(arguments)[:40],
)
def test_arguments_of_a_head_from_strangers(arguments: dict[str, Any], saved: Path) -> None:
    change_config(saved, arguments, "head", "arguments")
    start = time.monotonic()
    with pytest.raises((AdapterFileError, AdapterMismatchError)):
        load_head(saved)
    assert time.monotonic() - start < 1


def change_tensors(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    save_file({key: change(key, value).contiguous() for key, value in load_file(path).items()}, path)
    content = json.loads((path.parent / "config.json").read_text())
    content.pop("checksums", None)
    (path.parent / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors"])
def test_number_formats_that_nothing_computes_with(saved: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(saved / name, lambda key, value: value.to(dtype) if key.endswith(("total", "bias")) else value)
    with pytest.raises(AdapterFileError, match="expected one of the number formats"):
        wrap_backbone(tiny_vit(), saved) if name.startswith("model") else load_head(saved)


def test_mixed_precisions_compute_together(saved: Path) -> None:
    for name in ("model.safetensors", "head.safetensors"):
        change_tensors(saved / name, lambda key, value: value.half() if len(key) % 2 else value)
    head, vit = load_head(saved), wrap_backbone(tiny_vit(), saved)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    with torch.no_grad():
        head([torch.randn(1, 32, 4, 6)] * 2)
        vit(torch.randn(1, 3, 32, 32))


def test_values_that_are_not_finite_are_not_loaded(saved: Path) -> None:
    change_tensors(saved / "model.safetensors", lambda key, value: value / 0 if key.endswith("medium.source.total") else value)
    refused(saved, "medium.source.total: expected finite numbers")


def test_a_checkpoint_of_a_class_whose_layers_transformers_renames(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    def vit() -> ViTModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return ViTModel(ViTConfig(**sizes, image_size=32)).eval()

    saved = vit()
    calibrated(saved)
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = wrap_backbone(vit(), tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert same(again(images).last_hidden_state, saved(images).last_hidden_state)
