"""Damaged and hostile files by the thousand: each loads or raises an `MGFCError`, cheaply; the backbone stays as it was.

    python tests/test_fuzz.py --inputs 100000 --seed 1

runs more of them and prints figures; a failing input is named by its seed and number, which draw it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mgfc import FineConfig, MGFCConfig, MGFCError, SegmentationHead, load_head, unwrap_backbone, wrap_backbone
from mgfc.cli import main as cli
from mgfc.interop.rein import convert_rein

IMAGES = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
SLOWEST = 5.0  # seconds that an input may take
# Kinds of files, and how often each is drawn.
KINDS = {"adapter": 6, "peft": 4, "rein": 1, "rein.pth": 2, "net.safetensors": 1}
SLACK = 64 << 20  # bytes beside twice the files' size

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 31, 255, 257, 10**4, 65536, 65537, 10**6, 2**31, 2**53, 2**62, 2**64, 10**18,
    10**30, 10**400, -(2**63), 0.0, 0.5, 1e-320, 1e308, -0.5, float("nan"), float("inf"), "", "all", "first:2", "last:1",
    "first:0", "last:" + "9" * 5000, "first:99999", "x" * 5000, "\ud800", "\0", "../../x", "(a+)+$", ".*.*.*.*.*.*x", "([",
    "F8_E4M3", "F8_E5M2", "C64", "F64", "F16", "BF16", "I64", "BOOL", "U8", "mgfc", "rein", "LORA", "XLORA", "IA3", "OFT",
    "ADALORA", "LOHA", "BOFT", "HRA", "VERA", "FOURIERFT", "PROMPT_TUNING", "LN_TUNING", "SegmentationHead", "Linear", [],
    {}, [[]], [None], [0], [-1], [0, 0], [1] * 3, [10**9] * 4, [2**40, 2**40], list(range(3)), [8] * 3000, {"a": 1},
    {"x": {"y": [1]}}, ["qkv"], ["norm"], ["qkv", "fc1"], "qkv", "all-linear", "pissa", "olora", "eva", "loftq", "gaussian",
]  # fmt: skip


# Files


def backbone() -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": 32}
    return timm.create_model("vit_tiny_patch16_224", **options, dynamic_img_size=True).eval()


def write_originals(directory: Path) -> dict[str, Path]:
    """Good files: an adapter with a head, one with an adapter of PEFT's, a Rein adapter and checkpoint, a model's state."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    head = SegmentationHead([32, 32], 5, hidden_dim=8)
    config = MGFCConfig(rank=4, fine=FineConfig())
    wrap_backbone(backbone(), config).calibration.save_pretrained(directory / "adapter", head=head)
    tuned = wrap_backbone(backbone(), MGFCConfig(rank=2), peft_config=LoraConfig(r=2, target_modules=["qkv"]))
    tuned.calibration.save_pretrained(directory / "peft")
    torch.save({"state_dict": rein_tensors()}, directory / "rein.pth")
    convert_rein(directory / "rein.pth", directory / "rein")
    state = wrap_backbone(backbone(), config).calibration.adapter.state_dict()
    save_file({f"net.calibration.adapter_default.{key}": value for key, value in state.items()}, directory / "net.safetensors")
    return {name: directory / name for name in KINDS}


def rein_tensors() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "mlp_token2feat.weight": (32, 32),
        "mlp_token2feat.bias": (32,),
        "mlp_delta_f.weight": (32, 32),
        "mlp_delta_f.bias": (32,),
        "scale": (),
        "learnable_tokens_a": (2, 7, 4),
        "learnable_tokens_b": (2, 4, 32),
    }
    return {f"backbone.reins.{key}": torch.ones(shape) for key, shape in shapes.items()}


# Damage


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled, overwritten or foreign bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        place = draw.randrange(len(changed) + 1) if draw.random() < 0.5 else draw.randrange(min(len(changed), 300) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[place : place + draw.choice([1, 4, 100, 10**9])]
        elif kind == 2:
            changed[place:place] = changed[place : place + draw.choice([1, 8, 500])]
        elif kind == 3:
            changed[place : place + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**60, 2**64 - 1, draw.randrange(2**64)]))
        elif kind == 4:
            changed[place : place + 4] = draw.randbytes(draw.choice([1, 4, 64]))
        else:
            changed[place:place] = draw.choice([b"[", b"{", b'"', b"\0", b"\xff"]) * draw.choice([1, 50, 5000])
    return bytes(changed)


def damage_json(value: Any, draw: random.Random) -> Any:
    """Other values, keys or depth at random places."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = list(walk(value))
        if not places:
            return odd(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice([*holder, "x", "\ud800", "layers", "r", "loss_weight"])] = odd(draw)
        elif kind == 2 and type(holder[key]) in (int, float):
            holder[key] = draw.choice([holder[key] * 2, holder[key] + 1, -holder[key], holder[key] * 10**6, 0])
        elif kind == 3:
            other, theirs = draw.choice(places)
            holder[key] = copy.deepcopy(other[theirs])
        elif kind == 4:
            for _ in range(draw.choice([1, 10, 40, 200])):
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"x": holder[key]}
        else:
            holder[key] = odd(draw)
    return value


def odd(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON: what holds it, and its key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from walk(value[key])


def to_json(value: Any) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def damage_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Another header before the same bytes, or fewer or more of them."""
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_json(json.loads(data[8 : 8 + length]), draw)
    text, body = to_json(header), data[8 + length :]
    if draw.random() < 0.2:
        body = body[: draw.randrange(len(body) + 1)] if draw.random() < 0.5 else body + bytes(draw.choice([1, 4, 4096]))
    return struct.pack("<Q", len(text)) + text + body


def retype_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A sound file with tensors of other shapes, formats, names and values."""
    from safetensors.torch import load, save

    tensors = load(data)
    for name in draw.sample(sorted(tensors), draw.choice([1, 2, len(tensors)])):
        value = tensors.pop(name)
        kind = draw.randrange(9)
        if kind == 0:
            value = value.to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int32]))
        elif kind == 1:
            value = value.reshape(-1)
        elif kind == 2:
            value = value.unsqueeze(0)
        elif kind == 3:
            value = torch.zeros(draw.choice([(0,), (1,), (3, 0, 5), (2, 2), (1,) * 9]))
        elif kind == 4:
            value = torch.full_like(value, draw.choice([float("nan"), float("inf"), 1e38, -1e38, -1.0]))
        elif kind == 5:
            name = draw.choice([f"{name}.x", "x", name.replace("0", "99"), name.replace("layers", "blocks")])
        elif kind == 6:
            continue
        elif kind == 7 and value.ndim:
            value = torch.cat([value, value])
        tensors[name] = value.contiguous()
    return save(tensors)


def damage_checkpoint(path: Path, draw: random.Random) -> bytes:
    """A checkpoint whose tensors are of odd kinds, or whose bytes are damaged."""
    if draw.random() < 0.5:
        return damage_bytes(path.read_bytes(), draw)
    state: dict[str, Any] = rein_tensors()
    for name in draw.sample(sorted(state), draw.choice([1, 1, 2])):
        value = state.pop(name)
        kinds: list[Callable[[], Any]] = [
            lambda v=value: v.to(draw.choice([torch.float16, torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool])),
            lambda v=value: v.to_sparse() if v.ndim else v,
            lambda v=value: v.to("meta"),
            lambda v=value: torch.ones(1).expand(draw.choice([(10**5, 10**5), (10**6, 2, 1), (3, 10**9)])),
            lambda v=value: v.reshape(-1),
            lambda v=value: v[None],
            lambda v=value: torch.quantize_per_tensor(v, 1.0, 0, torch.qint8),
            lambda v=value: torch.full_like(v, float("nan")),
            lambda v=value: torch.zeros(draw.choice([(0,), (0, 7, 4), (5000, 2, 1), (3, 7, 5), ()])),
            lambda v=value: odd(draw),
        ]
        state[name.replace("0", "1") if draw.random() < 0.1 else name] = draw.choice(kinds)()
    file = io.BytesIO()
    torch.save(draw.choice([state, {"state_dict": state}, {"state_dict": [state]}, [state]]), file)
    return file.getvalue()


def damage(source: Path, work: Path, draw: random.Random) -> str:
    """Writes a damaged copy of an original, and returns what was damaged."""
    if source.suffix == ".pth":
        work.write_bytes(damage_checkpoint(source, draw))
        return source.name
    if source.is_file():
        change = draw.choice([damage_bytes, damage_safetensors, retype_safetensors])
        work.write_bytes(change(source.read_bytes(), draw))
        return source.name
    shutil.copytree(source, work)
    names = [path.name for path in work.iterdir() if path.name != "README.md"]
    if draw.random() < 0.7:  # checksums would find most of what comes
        content = json.loads((work / "config.json").read_text())
        del content["checksums"]
        (work / "config.json").write_text(json.dumps(content))
    # Tensors of adapters have been looked at if nothing else was wrong.
    chosen = draw.sample(sorted(names), draw.choice([1, 1, 1, 2]))
    for name in chosen:
        path = work / name
        data = path.read_bytes()
        if draw.random() < 0.25:
            data = damage_bytes(data, draw)
        elif path.suffix == ".json":
            data = to_json(damage_json(json.loads(data), draw))
        else:
            data = (damage_safetensors if draw.random() < 0.5 else retype_safetensors)(data, draw)
        path.write_bytes(data)
    return f"{source.name}/{'+'.join(chosen)}"


# Trials


class Peak:
    """The most memory that this process held, over what it held before, in bytes; 0 where the system does not tell."""

    def __enter__(self) -> Peak:
        self.before = self._read("VmRSS:")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = max(0, self._read("VmHWM:") - self.before)

    @staticmethod
    def _read(field: str) -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(field):
                    return 1024 * int(line.split()[1])
        return 0


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What a failed load must not change."""
    tensors = [value.double().sum().item() for value in model.state_dict().values()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modules = [(name, id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    return tensors, flags, modules, sorted(vars(model))


def files_in(directory: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*"))


def attempt(work: Path, model: nn.Module, with_info: bool = True) -> str:
    """Uses a file in every way, and returns what came of it. Whatever is raised but an `MGFCError` is a fault."""
    outcomes = []
    if work.suffix == ".pth":
        actions: list[Callable[[], Any]] = [lambda: convert_rein(work, work.parent / "out")]
    else:
        actions = [lambda: wrap_and_run(work, model)] + [lambda: load_head(work)] * work.is_dir()
        actions += [lambda: info(work)] * with_info
    for action in actions:
        try:
            action()
            outcomes.append("loaded")
        except MGFCError as error:
            str(error).encode()
            outcomes.append(type(error).__name__)
    return outcomes[0]


def wrap_and_run(work: Path, model: nn.Module) -> None:
    wrap_backbone(model, work)
    try:
        with torch.no_grad():
            model(IMAGES)
    finally:
        unwrap_backbone(model)


def info(work: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        cli(["info", str(work)])
    (out.getvalue() + err.getvalue()).encode()


def fuzz(
    inputs: int, seed: int, report: Callable[[str], None] = print, kinds: Sequence[str] = tuple(KINDS)
) -> tuple[collections.Counter[str], list[str], dict[str, Any]]:
    """Tries so many inputs.

    Returns:
        How often each outcome came, the faults, and figures: seconds, the slowest input and the largest growth of memory.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    figures: dict[str, Any] = {"slowest": (0.0, ""), "memory": (0, "")}
    memory_disk = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory_disk) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        originals = write_originals(Path(name) / "originals")
        model, begin = backbone(), time.monotonic()
        before = state_of(model)
        for number in range(inputs):
            draw = random.Random(f"{seed}-{number}")
            source = originals[draw.choices(kinds, [KINDS[kind] for kind in kinds])[0]]
            room = Path(name) / "room"
            room.mkdir()
            work = room / f"input{source.suffix}"
            label = f"seed {seed}, input {number}: {damage(source, work, draw)}"
            size = sum(path.stat().st_size for path in room.rglob("*") if path.is_file())
            listed, start = files_in(room), time.monotonic()
            with Peak() as peak:
                try:
                    outcome = attempt(work, model, with_info="config.json" in label)
                except Exception as error:
                    outcome = f"fault: {type(error).__name__}"
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    faults.append(f"{label}: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
            seconds = time.monotonic() - start
            outcomes[outcome] += 1
            figures["slowest"] = max(figures["slowest"], (seconds, label))
            figures["memory"] = max(figures["memory"], (peak.growth, label))
            if seconds > SLOWEST:
                faults.append(f"{label}: took {seconds:.1f} s")
            if peak.growth > 2 * size + SLACK:
                faults.append(f"{label}: took {peak.growth >> 20} MiB for {size} bytes")
            if files_in(room) != listed and not (source.suffix == ".pth" and outcome == "loaded"):
                faults.append(f"{label}: wrote files")
            if state_of(model) != before:
                faults.append(f"{label}: changed the backbone")
                model = backbone()
                before = state_of(model)
            shutil.rmtree(room)
            if (number + 1) % 10_000 == 0:
                seconds = time.monotonic() - begin
                report(f"{number + 1} inputs, {len(faults)} faults, {seconds:.0f} s, {figures}")
        figures["seconds"] = time.monotonic() - begin
    return outcomes, faults, figures


def test_files_from_strangers_load_or_raise_our_errors() -> None:
    outcomes, faults, figures = fuzz(2000, seed=0)
    assert not faults, "\n".join(faults[:20])
    assert outcomes["loaded"] > 100 and outcomes["AdapterFileError"] > 100 and outcomes["AdapterMismatchError"] > 100
    assert figures["seconds"] < 120


@pytest.mark.parametrize("name", KINDS)
def test_the_originals_load(name: str, tmp_path: Path) -> None:
    originals, model = write_originals(tmp_path), backbone()
    assert attempt(originals[name], model) == "loaded"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    counted, found, measured = fuzz(given.inputs, given.seed, lambda line: print(line, flush=True), given.kinds)
    print("\n".join(found[:200]))
    print(f"{given.inputs} inputs in {measured['seconds']:.0f} s: {dict(counted.most_common())}; {len(found)} faults")
    print(f"slowest: {measured['slowest'][0]:.2f} s ({measured['slowest'][1]})")
    print(f"memory: {measured['memory'][0] / 2**20:.1f} MiB ({measured['memory'][1]})")
    sys.exit(bool(found))
