"""The tables: published figures with their sources, and ours beside them."""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean

from domain_generalization.report import Record, markdown

from street_benchmark.experiments import EXPERIMENTS
from street_benchmark.published import PUBLISHED, Published
from street_benchmark.settings import LR, published

BySeed = dict[int, dict[str, float]]
HERE, NOT_RUN = "**here**", "not run"


def tables(records: list[Record]) -> str:
    """One for each experiment, in Markdown."""
    return "\n\n".join(f"{EXPERIMENTS[name].title}:\n\n{table(name, records)}" for name in EXPERIMENTS)


def table(experiment: str, records: list[Record]) -> str:
    """A method's published figures, then what was run here."""
    targets = list(EXPERIMENTS[experiment].targets)
    here = runs(experiment, records)
    others = [row for row in PUBLISHED if row.experiment == experiment]
    methods = dict.fromkeys([*LR, *(row.method for row in others)])
    rows = []
    for method in methods:
        rows += [_published(row, targets) for row in others if row.method == method]
        rows += [_ours(method, how, found, targets) for (name, how), found in sorted(here.items()) if name == method]
    return markdown(["method", *targets, "mean", "from", "unlike the protocol"], rows)


def runs(experiment: str, records: list[Record]) -> dict[tuple[str, str], BySeed]:
    """The mIoU of each target by seed, by method and by what a run does that the protocol does not."""
    found: dict[tuple[str, str], BySeed] = {(method, ""): {} for method in LR}
    for record in records:
        settings = record["settings"]
        if settings["experiment"] == experiment:
            usual = asdict(published(experiment, settings["method"])) | {"seed": settings["seed"]}
            told = [f"{name} {value}" for name, value in settings.items() if usual[name] != value]
            told += [] if record["sizes"] == "full" else [f"images of {record['sizes']} size"]
            run = found.setdefault((settings["method"], ", ".join(told)), {})
            run.setdefault(settings["seed"], {})[record["target"]] = record["miou"]
    return found


def _published(row: Published, targets: list[str]) -> list[str]:
    figures = [*(row.miou.get(name) for name in targets), row.mean]
    return [row.method, *("" if value is None else f"{value:.2f}" for value in figures), row.source, row.note]


def _ours(method: str, how: str, found: BySeed, targets: list[str]) -> list[str]:
    """Means over the seeds that were scored on all targets; where none was, the one that was scored on most."""
    complete = [run for run in found.values() if len(run) == len(targets)]
    taken = complete or sorted(found.values(), key=len)[-1:] or [{}]
    figures = [mean(run[name] for run in taken) if name in taken[0] else None for name in targets]
    known = [value for value in figures if value is not None]
    average = mean(known) if len(known) == len(figures) else None
    shown = [NOT_RUN if value is None else f"{value:.2f}" for value in (*figures, average)]
    return [method, *shown, HERE + (f", {len(taken)} seeds" if len(taken) > 1 else ""), how]
