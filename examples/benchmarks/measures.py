"""How `cost.py` measures: time in pairs, memory, operations, kernels, and the floor that the machine sets."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Run = Callable[[], object]
aten = torch.ops.aten
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = "wall"
_START = time.monotonic()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# PyTorch counts attention on a GPU alone.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
MATRIX = {*flop_registry, *CPU_ATTENTION}
CREATION = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view}


def elapsed() -> float:
    """Seconds since the process began to measure."""
    return time.monotonic() - _START


def set_clock(name: str) -> None:
    """Of a CPU. "cpu" counts the time of this process alone: with one thread, that of a machine without others."""
    global _clock
    _clock = name


def seconds(run: Run, device: torch.device) -> float:
    """Of one run, from an idle device until its result is there: by events on a GPU."""
    if device.type != "cuda":
        clock = CLOCKS[_clock]
        began = clock()
        run()
        return clock() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end) / 1e3)


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def pairs(bare: Run, run: Run, device: torch.device, most: int, budget: float) -> list[tuple[float, float]]:
    """Seconds of both in alternation, in turns first: `most` pairs, or as many as fit into `budget` seconds, but three."""
    found: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(found) < most and (len(found) < 3 or time.perf_counter() - start < budget):
        if len(found) % 2:
            own = seconds(run, device)
            found.append((seconds(bare, device), own))
        else:
            found.append((seconds(bare, device), seconds(run, device)))
    return found


@contextmanager
def timed(methods: Iterable[tuple[type, str]]) -> Iterator[list[float]]:
    """What takes bound methods within it takes them with a clock: each call appends its seconds to the list."""
    spent: list[float] = []

    def with_clock(method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            clock = CLOCKS[_clock]
            began = clock()
            result = method(*args, **kwargs)
            spent.append(clock() - began)
            return result

        return call

    before = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, method in before:
        setattr(owner, name, with_clock(method))
    try:
        yield spent
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def compare(found: list[tuple[float, float]]) -> dict[str, Any]:
    """Quartiles of both times, of their ratio and of their difference, the last two pair by pair."""
    return {
        "repetitions": len(found),
        "bare_ms": rounded(quartiles([1e3 * bare for bare, _ in found])),
        "ms": rounded(quartiles([1e3 * own for _, own in found])),
        "ratio": rounded(quartiles([own / bare for bare, own in found])),
        "added_ms": rounded(quartiles([1e3 * (own - bare) for bare, own in found])),
    }


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


class _Tally(TorchDispatchMode):
    """Counts operators that compute, and the bytes that matrix products, attention and convolutions read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        self.operators += not is_view and func.overloadpacket not in CREATION
        if func.overloadpacket in MATRIX:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves((args, out)) if isinstance(tensor, Tensor))
        return out


def count(run: Run) -> dict[str, int]:
    """Floating-point operations of matrix products, bytes that these move, and operators called; of the eager model."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops, _Tally() as tally:
        run()
    return {"flops": flops.get_total_flops(), "matrix_bytes": tally.bytes, "operators": tally.operators}


def trace(run: Run, device: torch.device) -> dict[str, float]:
    """From one profiled run: on a GPU the kernels launched and their time, on a CPU the most memory beyond the start's."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], profile_memory=not gpu) as profiler:
        run()
        if gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if gpu:
        kernels = [event["dur"] for event in events if event.get("cat") == "kernel"]
        return {"kernels": len(kernels), "kernel_ms": round(sum(kernels) / 1e3, 4)}
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return {"peak": most}


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory of tensors that a run takes beyond what there was before it."""
    if device.type != "cuda":
        return int(trace(run, device)["peak"])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_rate(device: torch.device, threads: int) -> float:
    """Bytes a second, read and written, of a copy of 128 MiB, with as many threads as torch has on a CPU."""
    source = torch.ones(2**25, device=device)
    target = torch.empty_like(source)
    runs = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / min(runs)


@functools.cache
def matrix_rate(device: torch.device, threads: int, dtype: torch.dtype, rows: int, dim: int) -> float:
    """Operations a second of the product that a feed-forward network of width `dim` begins with, with these threads."""
    left, right = torch.randn(rows, dim, device=device, dtype=dtype), torch.randn(dim, 4 * dim, device=device, dtype=dtype)
    runs = [seconds(lambda: left @ right, device) for _ in range(7)]
    return 2 * left.numel() * right.shape[1] / min(runs)


@contextmanager
def limit(allowed: float) -> Iterator[None]:
    """Raises `TimeoutError` within it after so many seconds; 0 for never."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {allowed:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, allowed)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def arrive(gate: Sequence[str]) -> None:
    """Tells the others that this process keeps them waiting no longer."""
    (Path(gate[0]) / str(os.getpid())).touch()


@contextmanager
def turn(gate: Sequence[str] | None) -> Iterator[None]:
    """Within it, this process measures alone. It begins once others have compiled, too.

    Args:
        gate: a folder; how many files it holds once all are ready, of which this process adds one; and the time of the
            clock until which it waits for the others. None for no gate.
    """
    if gate is None:
        yield
        return
    arrive(gate)
    while len(list(Path(gate[0]).iterdir())) < int(gate[1]) and time.time() < float(gate[2]):
        time.sleep(0.1)
    with Path(gate[0] + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
