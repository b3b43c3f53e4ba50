"""Which runs the tables need, at which scale, and with which learning rate."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from domain_generalization.methods import METHODS
from domain_generalization.report import read
from domain_generalization.training import Settings
from domain_generalization.variants import AFTERWARDS, AS_TRAINED, variants

RESULTS = Path(__file__).parent / "results"
SCALES: dict[str, dict[str, Any]] = {
    "small": {"steps": 150, "batch_size": 4, "crop": (112, 154), "size": (168, 224), "count": 24},
    "medium": {"steps": 300, "batch_size": 4, "crop": (196, 266), "size": (280, 378), "count": 40},
    "full": {"steps": 3000, "batch_size": 8, "crop": (504, 504), "size": (504, 672), "count": 40},
}
SEEDS = (0, 1, 2)
# Those that matter most come first.
FIRST = ("mgfc", "full", "dora_all", "lora_all", "rein")
# Other forms of mgfc, which no suite runs.
OTHER_FORMS = ("mgfc_patches", "mgfc_lora")
ORDER = (*FIRST, *(method for method in METHODS if method not in (*FIRST, *OTHER_FORMS)))

# Learning rates that the search may try, those that it begins with, and its seeds, which no table uses.
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = (3e-4, 1e-3, 3e-3)
STARTS = {"full": (1e-5, 3e-5, 1e-4), "rein": (3e-3, 1e-2, 3e-2)}
TUNING_SEEDS = (100, 101)
SEARCHED_AT = "medium"
# The others keep what the same search found at `small`.
FOUND_AT_SMALL = {
    "frozen": 0.0,
    "lora_attention": 1e-3,
    "adaptformer": 1e-2,
    "vpt_deep": 3e-3,
    "haar": 1e-2,
    "soma": 3e-3,
}
Found = dict[int, dict[float, float]]  # validation mIoU by seed and learning rate

COST_STEPS = 20

RANDOMISED = {"coarse": {"randomise": 0.5}}
# What is changed in mgfc's default configuration before training; what evaluation decides is in `variants`.
ABLATIONS: dict[str, dict[str, Any]] = {
    "with randomised scenes": RANDOMISED,
    "with the fine stage": {"fine": {}},
}
# Peers trained beside mgfc's calibration, which randomises their scenes, too.
BESIDE = ("full", "lora_all")


def searched(results: Path, method: str) -> Found:
    """What the search has found so far."""
    found: Found = {seed: {} for seed in TUNING_SEEDS}
    for record in read(results / SEARCHED_AT / FILES["tuning"]):
        made = record["settings"]
        if made["method"] == method:
            found[made["seed"]][made["lr"]] = record["miou"]["val"]
    return found


def next_trials(method: str, found: Found) -> list[tuple[float, int]]:
    """Learning rates and seeds that the search tries next; none once it is done.

    With the first seed it goes on until the best rate has both its neighbours tried; the best two meet the second seed.
    """
    first, second = (found[seed] for seed in TUNING_SEEDS)
    missing = [lr for lr in STARTS.get(method, START) if lr not in first]
    if not missing:
        place = LADDER.index(max(first, key=first.__getitem__))
        missing = [lr for lr in LADDER[max(0, place - 1) : place + 2] if lr not in first]
    if missing:
        return [(lr, TUNING_SEEDS[0]) for lr in missing]
    best = sorted(first, key=first.__getitem__)[-2:]
    return [(lr, TUNING_SEEDS[1]) for lr in best if lr not in second]


def tuned_lr(results: Path, method: str) -> float:
    """The learning rate with the best mean validation on the source `synth_town`.

    Raises:
        SystemExit: if the search has not been run to its end.
    """
    if method in FOUND_AT_SMALL:
        return FOUND_AT_SMALL[method]
    found = searched(results, method)
    if next_trials(method, found):
        raise SystemExit(f"No learning rate for {method}: give --lr, or run the suite `tuning` first.")
    return max(found[TUNING_SEEDS[1]], key=lambda lr: sum(found[seed][lr] for seed in TUNING_SEEDS))


def tuning(args: argparse.Namespace) -> Iterator[Settings]:
    """The next runs of the search: whole ones, scored on the source's validation split alone."""
    budget = SCALES[SEARCHED_AT] | {"split": "val"}
    for method in args.methods:
        if method not in FOUND_AT_SMALL:
            for lr, seed in next_trials(method, searched(args.results, method)):
                yield Settings(method=method, source="synth_town", seed=seed, lr=lr, **budget)


def peers(args: argparse.Namespace) -> Iterator[Settings]:
    """Every method from every source, those that matter most first, a seed at a time."""
    for first in (True, False):
        methods = [method for method in args.methods if (method in FIRST) == first]
        for seed in args.seeds:
            for source in args.sources:
                for method in methods:
                    yield settings(args, method, source, seed)


def ablations(args: argparse.Namespace) -> Iterator[Settings]:
    """Every ablation of mgfc that training decides, and peers beside its calibration, a seed at a time."""
    for seed in args.seeds:
        for source in args.sources:
            for options in ABLATIONS.values():
                yield settings(args, "mgfc", source, seed, options)
            for method in BESIDE:
                yield settings(args, method, source, seed, {"calibrated": RANDOMISED})


def tables(args: argparse.Namespace) -> Iterator[Settings]:
    """The methods that matter most, the ablations, then the other methods: what the tables need, by importance."""
    rest = [method for method in args.methods if method not in FIRST]
    yield from peers(argparse.Namespace(**vars(args) | {"methods": [m for m in args.methods if m in FIRST]}))
    yield from ablations(args)
    yield from peers(argparse.Namespace(**vars(args) | {"methods": rest}))


def settings(args: argparse.Namespace, method: str, source: str, seed: int, options: dict[str, Any] | None = None) -> Settings:
    lr = tuned_lr(args.results, method)
    budget = SCALES[args.scale] | {"split": args.split}
    return Settings(method=method, source=source, seed=seed, lr=lr, options=options or {}, **budget)


def cost(args: argparse.Namespace) -> Iterator[Settings]:
    """Short runs for time and memory, a seed at a time, so that a slow hour of the machine meets all methods."""
    for seed in args.seeds:
        for method in args.methods:
            yield replace(settings(args, method, "synth_town", seed), steps=COST_STEPS, split="val")


def wanted(args: argparse.Namespace, made: Settings) -> tuple[str, ...]:
    """The variants that a suite scores of a run."""
    if args.name == "tuning":
        return (AS_TRAINED,)
    if made.options:
        return (AS_TRAINED, AFTERWARDS)
    if made.method not in FIRST:
        return (AS_TRAINED, "input standardised", AFTERWARDS)
    return tuple(name for name in variants(made.method) if args.variants is None or name in args.variants)


SUITES = {"tuning": tuning, "peers": peers, "ablations": ablations, "tables": tables, "cost": cost}
# Where each suite's results are, in the folder of their scale.
FILES = dict.fromkeys(SUITES, "runs.jsonl") | {"tuning": "tuning.jsonl", "cost": "cost.jsonl"}
