"""What mgfc costs: import time, wrapping, loading, parameters, file size, and a forward and backward pass.

    python examples/benchmarks/overhead.py

Figures of one pair are measured in turn, in one run; each is the median of its repetitions.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from allocator import keep_memory
from torch.utils.flop_counter import FlopCounterMode

from mgfc import get_calibration, wrap_backbone
from mgfc.storage.tensors import read_tensors

HEAVY = ("timm", "transformers", "peft", "huggingface_hub")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(name: str, value: str, target: str) -> None:
    print(f"| {name} | {value} | {target} |", flush=True)


def imports(repetitions: int = 9) -> None:
    def fresh(statement: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", statement], check=True))

    fresh("import torch, mgfc")
    pairs = [(fresh("import torch"), fresh("import mgfc")) for _ in range(repetitions)]
    torch_time, mgfc_time = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    row("`import mgfc` / `import torch`", f"{mgfc_time:.2f} s / {torch_time:.2f} s = {ratio:.3f}", "<= 1.05")
    code = f"import sys, mgfc; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    row("heavy packages loaded by `import mgfc`", loaded, "[]")


def wrapping(repetitions: int = 3) -> None:
    builds, wraps, loads, reads = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(repetitions):
            start = time.perf_counter()
            vit = timm.create_model("vit_large_patch14_dinov2", num_classes=0)
            builds.append(time.perf_counter() - start)
            wraps.append(seconds(partial(wrap_backbone, vit)))
            get_calibration(vit).save_pretrained(directory)
            bare = timm.create_model("vit_large_patch14_dinov2", num_classes=0)
            bare.load_state_dict({k: v for k, v in vit.state_dict().items() if not k.startswith("calibration.")})
            reads.append(seconds(lambda: read_tensors(Path(directory) / "model.safetensors")))
            loads.append(seconds(partial(wrap_backbone, bare, directory)))
        share = 100 * statistics.median(wraps) / statistics.median(builds)
        row(
            "`wrap_backbone` on a ViT-L / building it in timm",
            f"{1000 * statistics.median(wraps):.0f} ms = {share:.1f} %",
            "<= 5 %",
        )
        extra = 1000 * statistics.median(a - b for a, b in zip(loads, reads, strict=True))
        row("loading an adapter for it, beyond reading the file", f"{extra:.0f} ms", "<= 100 ms")
        content = 4 * sum(value.numel() for value in get_calibration(vit).state_dict().values())
        size = (Path(directory) / "model.safetensors").stat().st_size - content
        everything = sum(path.stat().st_size for path in Path(directory).iterdir()) - content
        row(
            "adapter's file beyond parameters and statistics (whole directory)",
            f"{size / 1024:.1f} ({everything / 1024:.1f}) KB",
            "<= 64 KB",
        )


def parameters() -> None:
    for name, target in {"small": 3.0, "base": 1.5, "large": 1.0}.items():
        with torch.device("meta"):
            vit = timm.create_model(f"vit_{name}_patch14_dinov2", num_classes=0)
        total = sum(parameter.numel() for parameter in vit.parameters())
        own = get_calibration(wrap_backbone(vit)).num_parameters
        row(f"trainable parameters, ViT-{name[0].upper()}/14", f"{own:,} = {100 * own / total:.2f} %", f"<= {target} %")


def passes(repetitions: int = 7) -> None:
    vit: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518, dynamic_img_size=True).eval()
    wrap_backbone(vit)
    images = torch.randn(1, 3, 252, 448)

    def forward() -> None:
        with torch.no_grad():
            vit.forward_features(images)

    def bare() -> None:
        with get_calibration(vit).disabled():
            forward()

    def flops(run: Callable[[], None]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    more, less = flops(forward), flops(bare)
    row("FLOPs of the same forward", f"{more / 1e9:.2f} / {less / 1e9:.2f} G = {more / less:.3f}", "<= 1.05")
    pairs = [(seconds(bare), seconds(forward)) for _ in range(repetitions)]
    without, with_ = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    row("forward, ViT-S/14 at 252 x 448, wrapped / bare", f"{1000 * with_:.0f} / {1000 * without:.0f} ms = {ratio:.2f}", "")


if __name__ == "__main__":
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}\n")
    print("| figure | measured | target |\n|---|---|---|")
    keep_memory()
    imports()
    parameters()
    wrapping()
    passes()
