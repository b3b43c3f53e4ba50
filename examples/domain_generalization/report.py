"""From result files to tables: means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]

SOURCE_SIDE = ("val", "in-domain")
CLEAN = ("day", "dusk")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def read(path: Path) -> list[Record]:
    """The records of a JSON-lines file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def unseen(record: Record) -> dict[str, float]:
    """The mIoU of each unseen target."""
    return {name: value for name, value in record["miou"].items() if name not in SOURCE_SIDE}


def score(record: Record, of: str) -> float:
    """One figure of a run: "unseen" (mean of all targets), "clean", "corrupted", "in-domain" or a target's name."""
    targets = unseen(record)
    match of:
        case "unseen":
            return mean(targets.values())
        case "clean":
            return mean(value for name, value in targets.items() if name in CLEAN)
        case "corrupted":
            return mean(value for name, value in targets.items() if name not in CLEAN)
        case "in-domain":
            return float(record["miou"].get("in-domain", record["miou"]["val"]))
    return float(record["miou"][of])


def by_seed(records: Iterable[Record], of: str) -> dict[int, float]:
    return {record["settings"]["seed"]: score(record, of) for record in records}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
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
