"""One case of `cost.py`, and a subject that runs it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import measures
import torch
from contenders import CONTENDERS, MODELS, NUM_CLASSES, PATCH, Subject, build_backbone
from torch._dynamo.utils import counters

from mgfc.blocks import BlockHooks
from mgfc.images import ImageHook

# Those that run the calibrators.
HOOKS = ((BlockHooks, "_enter"), (BlockHooks, "_adapt"), (BlockHooks, "_leave"), (ImageHook, "_enter"))


@dataclass(frozen=True)
class Case:
    """What is run.

    Args:
        figure: "inference" or "training".
        model: a name in `MODELS`.
        depth: its blocks.
        size: (height, width) of the images.
        batch: of them.
        precision: as in `Subject`.
        compiled: whether `torch.compile` runs the forward.
    """

    figure: str
    model: str
    depth: int
    size: tuple[int, int]
    batch: int
    precision: str
    compiled: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.size[0] // PATCH, self.size[1] // PATCH


class Bench:
    """Runs one subject on the images of a case, and remembers what does not change."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        backbone = build_backbone(case.model, case.depth, str(device))
        self.case, self.name, self.device = case, name, device
        self.subject = Subject(CONTENDERS[name], backbone, case.figure, case.precision)
        torch.manual_seed(1)
        self.images = torch.randn(case.batch, 3, *case.size).to(device, torch.bfloat16 if case.precision == "bf16" else None)
        self.labels = torch.randint(NUM_CLASSES, (case.batch, *case.grid)).to(device)
        self.static: dict[str, Any] = {}

    def run(self) -> None:
        if self.case.figure == "training":
            self.subject.step(self.images, self.labels)
        else:
            self.subject.infer(self.images)

    def prepare(self, warm_ups: int, kernel_times: bool) -> None:
        """Compiles and warms up, then counts."""
        if self.static:
            return
        breaks = sum(counters["graph_break"].values())
        if self.case.compiled:
            self.subject.compile_forward()
        first = measures.seconds(self.run, self.device)
        for _ in range(warm_ups):
            self.run()
        peak = measures.peak_bytes(self.run, self.device) + self.subject.own_bytes()
        with self.subject.eager():
            counts = measures.count(self.run)
        self.static = {"first_s": round(first, 3), "peak_mib": round(peak / 2**20, 2), **counts}
        if self.case.compiled:
            self.static["graph_breaks"] = sum(counters["graph_break"].values()) - breaks
            self.static |= {"difference": self._difference()} if self.case.figure == "inference" else {}
        if self.device.type == "cuda":
            kernels = measures.trace(self.run, self.device)
            self.static |= kernels if kernel_times else {"kernels": kernels["kernels"]}
        self.static["floor_ms"] = round(1e3 * self._floor(), 4)

    @torch.no_grad()
    def _difference(self) -> float:
        """The relative one between the compiled output and the eager one, in eval mode no more than rounding."""
        compiled = self.subject.forward_fn(self.images).float()
        with self.subject.eager():
            eager = self.subject.forward_fn(self.images).float()
        return float(f"{(compiled - eager).norm() / eager.norm():.2g}")

    def _floor(self) -> float:
        """Seconds that the machine needs at least: bytes of matrix products, and then their operations."""
        dtype = torch.float32 if self.case.precision == "fp32" else torch.bfloat16
        rows, dim = self.case.batch * self.case.grid[0] * self.case.grid[1], MODELS[self.case.model][0]
        threads = torch.get_num_threads()
        rate = measures.matrix_rate(self.device, threads, dtype, min(rows, 16384), dim)
        return float(self.static["matrix_bytes"] / measures.copy_rate(self.device, threads) + self.static["flops"] / rate)


def hook_times(own: Bench, repetitions: int) -> dict[str, list[float]]:
    """Of mgfc in eager inference on a CPU: milliseconds within its hooks, with less noise than a difference of forwards."""
    is_eager = own.device.type == "cpu" and own.case.figure == "inference" and not own.case.compiled
    if not is_eager or not hasattr(own.subject.vit, "calibration"):
        return {}
    with measures.timed(HOOKS) as spent:
        bench = Bench(own.case, own.name, own.device)
    found = []
    for _ in range(repetitions + 1):
        spent.clear()
        bench.run()
        found.append(1e3 * sum(spent))
    return {"hooks_ms": measures.rounded(measures.quartiles(found[1:]))}


def compare(own: Bench, bare: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one contender, beside the bare backbone on the same images."""
    for bench in (own, bare):
        bench.prepare(args.warm_ups, kernel_times=not args.gate)
    with measures.turn(args.gate):
        for bench in (own, bare) * args.warm_ups if args.gate else ():
            bench.run()
        found = measures.pairs(bare.run, own.run, own.device, args.repetitions, args.budget)
        hooks = hook_times(own, len(found))
    statics = hooks | own.static | {f"bare_{name}": value for name, value in bare.static.items()}
    return {"parameters": own.subject.num_parameters, **measures.compare(found), **statics}
