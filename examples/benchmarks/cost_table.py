"""The results of `cost.py` as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from domain_generalization.report import markdown

Record = dict[str, Any]
TITLES = {
    "bare": "the bare one again",
    "mgfc": "mgfc",
    "mgfc_fused": "mgfc, fused",
    "mgfc_last4": 'mgfc, `layers="last:4"`',
    "mgfc_adapter": "mgfc, no stage",
    "mgfc_coarse": "mgfc, coarse alone",
    "mgfc_medium": "mgfc, medium alone",
    "mgfc_fine": "mgfc, fine alone",
    "lora": "LoRA, unmerged",
    "lora_merged": "LoRA, merged",
    "dora": "DoRA",
    "rein": "Rein",
    "adaptformer": "AdaptFormer",
    "vpt": "VPT-deep",
    "full": "full fine-tuning",
}


def key(record: Record) -> str:
    """What tells records apart: the case, the contender, the machine and its versions."""
    return json.dumps([record["case"], record["contender"], record["machine"]], sort_keys=True)


def read(path: Path) -> list[Record]:
    """The last record of each case and contender; a line that a kill cut off is none."""
    found: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key(record)] = record
    return list(found.values())


def groups(records: Iterable[Record], without: str = "") -> dict[str, list[Record]]:
    """Records of one case and machine, by a name; `without` leaves a part of the case open."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(title(record, without), []).append(record)
    return found


def title(record: Record, without: str = "") -> str:
    case, machine = record["case"], record["machine"]
    threads = (
        f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['clock']} time"
        if "threads" in machine
        else ""
    )
    parts = {
        "figure": "training step" if case["figure"] == "training" else "inference",
        "model": f"ViT-{case['model']}/14",
        "depth": f"{case['depth']} blocks",
        "size": " x ".join(map(str, case["size"])),
        "batch": f"batch {case['batch']}",
        "precision": {"autocast": "bf16 autocast", "bf16": "weights in bf16"}.get(case["precision"], case["precision"]),
        "mode": "compiled" if case["compiled"] else "eager",
    }
    named = ", ".join(value for name, value in parts.items() if name != without)
    return f"{named}; {machine['device']}{threads}, torch {machine['torch']}"


def in_hooks(record: Record) -> str:
    """Milliseconds of a forward within mgfc's hooks, and as a ratio to the bare one."""
    if "hooks_ms" not in record:
        return ""
    own = record["hooks_ms"][1]
    return f"{own:.3g} ({1 + own / record['bare_ms'][1]:.3f})"


def row(record: Record) -> list[str]:
    """A contender beside the bare backbone."""
    name = TITLES[record["contender"]]
    if record["status"] != "ok":
        return [name, record["status"], *[""] * (len(HEADER) - 2)]
    low, middle, high = record["ratio"]
    added, floor = record["added_ms"][1], record["floor_ms"] - record["bare_floor_ms"]
    launched = "kernels" if "kernels" in record else "operators"
    launches = record[launched] - record[f"bare_{launched}"]
    kernel_time = f"{record['kernel_ms'] / record['bare_kernel_ms']:.3f}" if record.get("bare_kernel_ms") else ""
    return [
        name,
        f"{record['ms'][1]:.4g}",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
        kernel_time,
        f"{added:.3g} ({floor:.2g})",
        in_hooks(record),
        f"{record['peak_mib']:.0f} ({record['peak_mib'] / record['bare_peak_mib']:.2f})",
        f"{record['flops'] / record['bare_flops']:.3f}",
        f"{launches / record['case']['depth']:.1f}",
        f"{record['parameters']:,}",
    ]


HEADER = [
    "way to adapt",
    "ms",
    "ratio to bare (quartiles)",
    "ratio of kernels' time",
    "ms added (floor)",
    "ms within mgfc's hooks (ratio)",
    "peak MiB (ratio)",
    "FLOPs, ratio",
    "launches added a block",
    "trained parameters",
]


def rows_of(records: Sequence[Record]) -> str:
    """A row a contender, without columns that are empty for all."""
    rows = [row(record) for record in records]
    filled = [any(cells[column] for cells in rows) for column in range(len(HEADER))]
    return markdown([*compress(HEADER, filled)], [[*compress(cells, filled)] for cells in rows])


def case_table(name: str, records: Sequence[Record]) -> str:
    """One case: a row a contender."""
    order = list(TITLES)
    records = sorted(records, key=lambda record: order.index(record["contender"]))
    done = [record for record in records if record["status"] == "ok"]
    if not done:
        return f"**{name}**\n\n{rows_of(records)}"
    first = done[0]
    bare = sorted(record["bare_ms"][1] for record in done)
    launched = "kernels" if "kernels" in first else "operators"
    about = (
        f"Bare: {bare[len(bare) // 2]:.4g} ms (floor {first['bare_floor_ms']:.3g}), peak {first['bare_peak_mib']:.0f} MiB, "
        f"{first['bare_flops'] / 1e9:.4g} GFLOP, {first[f'bare_{launched}']} {launched}."
    )
    return f"**{name}**\n\n{about}\n\n{rows_of(records)}"


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of a line through the logarithms; NaN if a value is not above 0."""
    if any(value <= 0 for point in points for value in point):
        return math.nan
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return slope


def tokens(record: Record) -> float:
    height, width = map(int, record["case"]["size"])
    return height // 14 * (width // 14)


def growth_table(records: Iterable[Record], part: str) -> str:
    """What is added at each size or depth, and its fitted exponent, wherever there are at least three.

    The time within mgfc's hooks where it is known: a difference of whole forwards has more noise.
    """
    measure = tokens if part == "size" else lambda record: record["case"]["depth"]
    rows = []
    done = [record for record in records if record["status"] == "ok" and record["contender"] != "bare"]
    for name, group in groups(done, part).items():
        for contender in TITLES:
            own = sorted((record for record in group if record["contender"] == contender), key=measure)
            if len({measure(record) for record in own}) < 3:
                continue
            within = all("hooks_ms" in record for record in own)
            added = [(measure(record), record["hooks_ms" if within else "added_ms"][1]) for record in own]
            bare = exponent([(measure(record), record["bare_ms"][1]) for record in own])
            series = ", ".join(f"{x:g}: {y:.3g}" for x, y in added)
            time = "within hooks" if within else "added"
            rows.append([name, TITLES[contender], time, series, f"{exponent(added):.2f}", f"{bare:.2f}"])
    what = "patches" if part == "size" else "blocks"
    header = ["case", "way to adapt", "time", f"{what}: ms", "its exponent", "exponent of the bare one"]
    return f"**Growth with {what}**\n\n{markdown(header, rows)}" if rows else ""


def show(records: Sequence[Record]) -> str:
    """All tables."""
    parts = [case_table(name, group) for name, group in groups(records).items()]
    parts += [growth_table(records, part) for part in ("size", "depth")]
    return "\n\n".join(part for part in parts if part)
