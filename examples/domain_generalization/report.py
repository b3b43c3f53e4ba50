"""From result files to tables: means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]

SOURCE_SIDE = ("val", "in-domain")
THIN = ("pole", "sign", "fence", "pedestrian", "bicyclist")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def read(path: Path) -> list[Record]:
    """The records of a JSON-lines file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(file: Path, record: Record) -> None:
    """Adds a line; processes that write at once wait for each other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.write(json.dumps(record) + "\n")


def by_target(record: Record, figure: str) -> dict[str, float]:
    """A figure of each unseen target that has it: "miou", "boundary", "scatter", or "thin", the mean IoU of `THIN`."""
    values: dict[str, float] = record.get(figure, {})
    if figure == "thin":
        thin = {name: [value for key, value in iou.items() if key in THIN] for name, iou in record["iou"].items()}
        values = {name: mean(found) for name, found in thin.items() if found}
    return {name: value for name, value in values.items() if name not in SOURCE_SIDE}


def clean(values: dict[str, float]) -> dict[str, float]:
    """Those of the clean sets."""
    return {name: value for name, value in values.items() if "," not in name}


def corrupted(values: dict[str, float]) -> dict[str, float]:
    """By corruption: the mean over the sets."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        if "," in name:
            kinds.setdefault(name.partition(", ")[2], []).append(value)
    return {kind: mean(found) for kind, found in kinds.items()}


def score(record: Record, of: str) -> float:
    """One figure of a run.

    Args:
        record: of the run.
        of: "clean", "corrupted", "unseen" (mean over the clean sets and the corruptions), "in-domain", all of them mIoU;
            "thin", "boundary" or "scatter", on all that is unseen; or the name of a target or a corruption.
    """
    figure = of if of in ("thin", "boundary", "scatter") else "miou"
    targets = by_target(record, figure)
    parts = {"clean": clean(targets), "corrupted": corrupted(targets)}
    match of:
        case "clean" | "corrupted":
            return mean(parts[of].values())
        case "unseen" | "thin" | "boundary" | "scatter":
            return mean([*parts["clean"].values(), *parts["corrupted"].values()])
        case "in-domain":
            return float(record["miou"].get("in-domain", record["miou"]["val"]))
    return float((record["miou"] | parts["corrupted"])[of])


def by_seed(records: Iterable[Record], of: str) -> dict[int, float]:
    return {record["settings"]["seed"]: score(record, of) for record in records}


def average(records: Iterable[Record], of: str) -> float:
    """Mean over seeds."""
    return mean(by_seed(records, of).values())


def spread(records: Iterable[Record], of: str) -> str:
    """Mean and standard deviation over seeds."""
    values = list(by_seed(records, of).values())
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean, and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} [{self.mean - self.half_width:+.2f}, {self.mean + self.half_width:+.2f}]"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """Of two methods, over the seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    deltas = [ours[seed] - theirs[seed] for seed in seeds]
    half = T95[len(deltas) - 1] * stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.nan
    return Difference(mean(deltas), half, len(deltas))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
