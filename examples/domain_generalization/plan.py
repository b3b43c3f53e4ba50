"""Which runs the tables need, at which scale, and with which learning rate."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domain_generalization.domains import SOURCES
from domain_generalization.report import read
from domain_generalization.training import Settings

RESULTS = Path(__file__).parent / "results"
SCALES: dict[str, dict[str, Any]] = {
    "small": {"steps": 150, "batch_size": 4, "crop": (112, 154), "size": (168, 224), "count": 24},
    "full": {"steps": 2000, "batch_size": 8, "crop": (252, 336), "size": (336, 448), "count": 96},
}
SEEDS = (0, 1, 2)
# Three learning rates for each method, tried on the validation split of the source with a seed that no table uses.
GRID = (1e-4, 3e-4, 1e-3)
GRIDS = {"full": (1e-5, 3e-5, 1e-4), "vpt_deep": (1e-3, 3e-3, 1e-2)}
TUNING_SEED = 100

# What is changed in mgfc's default configuration.
VARIANTS: dict[str, dict[str, Any]] = {
    "without coarse": {"coarse": None},
    "without medium": {"medium": None},
    "without fine": {"fine": None},
    "bottleneck alone": {"coarse": None, "medium": None, "fine": None},
}


def tuned_lr(results: Path, scale: str, method: str) -> float:
    """The learning rate with the best validation on the source `synth_town`.

    Raises:
        SystemExit: if the search has not been run.
    """
    if method == "frozen":
        return 0.0
    size = SCALES[scale]["size"]
    found = {
        record["settings"]["lr"]: record["miou"]["val"]
        for record in read(results / "tuning.jsonl")
        if record["settings"]["method"] == method and tuple(record["settings"]["size"]) == size
    }
    if not found:
        raise SystemExit(f"No learning rate for {method} at the scale {scale!r}: give --lr, or run the suite `tuning` first.")
    return max(found, key=lambda lr: found[lr])


def tuning(args: argparse.Namespace) -> Iterator[Settings]:
    """The search: whole runs, scored on the source's validation split alone."""
    budget = SCALES[args.scale] | {"split": "val"}
    for method in args.methods:
        if method != "frozen":
            for lr in GRIDS.get(method, GRID):
                yield Settings(method=method, source="synth_town", seed=TUNING_SEED, lr=lr, **budget)


def peers(args: argparse.Namespace) -> Iterator[Settings]:
    """Every method on both sources, a seed at a time."""
    for seed in args.seeds:
        for method in args.methods:
            for source in SOURCES:
                yield settings(args, method, source, seed)


def ablations(args: argparse.Namespace) -> Iterator[Settings]:
    """Every variant of mgfc on both sources, a seed at a time."""
    for seed in args.seeds:
        for options in VARIANTS.values():
            for source in SOURCES:
                yield settings(args, "mgfc", source, seed, options)


def settings(args: argparse.Namespace, method: str, source: str, seed: int, options: dict[str, Any] | None = None) -> Settings:
    lr = tuned_lr(args.results, args.scale, method)
    return Settings(method=method, source=source, seed=seed, lr=lr, options=options or {}, **SCALES[args.scale])


SUITES = {"tuning": tuning, "peers": peers, "ablations": ablations}
