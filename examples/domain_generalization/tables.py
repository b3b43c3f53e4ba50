"""The tables of the docs, from the files of results of one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median

from domain_generalization import report
from domain_generalization.domains import SOURCES
from domain_generalization.inputs import CONTROLS
from domain_generalization.plan import ABLATIONS, FILES, FOUND_AT_SMALL, SCALES
from domain_generalization.plot import plot
from domain_generalization.report import Record
from domain_generalization.variants import AFTERWARDS, ALIGNMENTS, AS_TRAINED, WITHOUT

OURS = "mgfc"
OURS_VARIANT = AFTERWARDS  # what mgfc's row of every table is
PLOTTED_SEEDS = 3
# What was calibrated with the default before: medium on the last four blocks, with a threshold of 1.
FOUR_BLOCKS = "four_blocks.jsonl"
# Trainings that were repeated on a CPU for the default of today, without calibration.
REPEATED = "repeated.jsonl"
TITLES = {
    "frozen": "head on the frozen backbone",
    "full": "full fine-tuning",
    "lora_attention": "LoRA, attention",
    "lora_all": "LoRA, all linear layers",
    "dora_all": "DoRA, all linear layers",
    "rein": "Rein, low-rank tokens",
    "adaptformer": "AdaptFormer",
    "vpt_deep": "VPT-deep",
    "haar": "Haar-frequency tokens (FADA's idea)",
    "soma": "SoMA",
    "mgfc": "**mgfc**",
    "mgfc_lora": "mgfc, with LoRA on attention",
}
FIGURES = ("in-domain", "clean", "corrupted", "unseen", "thin", "boundary", "scatter")
LEADS = ("in-domain", "clean", "corrupted", "unseen", "thin", "boundary")
Groups = Mapping[str, Sequence[Record]]


class Runs:
    """Records of one scale from one source, without methods that have fewer seeds."""

    def __init__(self, records: Iterable[Record], min_seeds: int) -> None:
        self.records, self.min_seeds = list(records), min_seeds

    def of(self, method: str, variant: str, options: Mapping[str, object] | None = None) -> list[Record]:
        """Runs of a method in one variant, with the learning rate of its last run."""
        runs = [r for r in self.records if r["settings"]["method"] == method and r["settings"]["options"] == (options or {})]
        runs = [r for r in runs if r["settings"]["lr"] == runs[-1]["settings"]["lr"] and r["variant"] == variant]
        return runs if len({r["settings"]["seed"] for r in runs}) >= self.min_seeds else []

    def ours(self) -> list[Record]:
        return self.of(OURS, OURS_VARIANT)

    def by_method(self, variant: str = AS_TRAINED) -> dict[str, list[Record]]:
        """Runs of each method in one variant, from the worst to the best on unseen targets; ours in its own variant."""
        found = {m: self.ours() if m == OURS else self.of(m, variant) for m in TITLES}
        return dict(sorted(((m, r) for m, r in found.items() if r), key=lambda item: report.average(item[1], "unseen")))

    def best_of(self, method: str, variants: Iterable[str]) -> tuple[str, list[Record]]:
        """The variant with the highest mean on unseen targets, and its runs."""
        return best({name: self.of(method, name) for name in variants})


def best(groups: Mapping[str, list[Record]]) -> tuple[str, list[Record]]:
    """The name and the runs with the highest mean on unseen targets; none if all groups are empty."""
    found = [(name, runs) for name, runs in groups.items() if runs]
    return max(found, key=lambda item: report.average(item[1], "unseen"), default=("", []))


def gather(results: Path, scale: str, suite: str, min_seeds: int = 1) -> dict[str, Runs]:
    """Test runs at one scale by source, in the order of `SOURCES`; what was made with another budget is left out."""
    return split_by_source(report.read(results / scale / FILES[suite]), scale, suite, min_seeds)


def on_four_blocks(results: Path, scale: str, min_seeds: int) -> dict[str, Runs]:
    """Runs of mgfc with the default before, beside those without medium calibration, where there are any."""
    former, runs = (report.read(results / scale / name) for name in (FOUR_BLOCKS, FILES["peers"]))
    plain = [run for run in runs if not (run["calibration"] or {}).get("medium")]
    found = split_by_source([*plain, *former], scale, "peers", min_seeds)
    return {source: runs for source, runs in found.items() if runs.ours()}


def all_trainings(results: Path, scale: str, min_seeds: int) -> dict[str, Runs]:
    """All runs by source: of both defaults of calibration, and of trainings that were repeated on another machine."""
    files = FOUR_BLOCKS, FILES["peers"], REPEATED
    return split_by_source([run for name in files for run in report.read(results / scale / name)], scale, "peers", min_seeds)


def split_by_source(records: Iterable[Record], scale: str, suite: str, min_seeds: int) -> dict[str, Runs]:
    """Those with the budget of a suite at one scale, by source."""
    budget = {name: list(value) if isinstance(value, tuple) else value for name, value in SCALES[scale].items()}
    budget |= {"split": "val"} if suite == "cost" else {"split": "test"}
    compared = budget.keys() - ({"steps"} if suite == "cost" else set())
    records = [r for r in records if all(r["settings"][k] == budget[k] for k in compared)]
    found = {source: [r for r in records if r["settings"]["source"] == source] for source in SOURCES}
    return {source: Runs(of_source, min_seeds) for source, of_source in found.items() if of_source}


def paired(ours: Sequence[Record], theirs: Sequence[Record], of: str = "unseen") -> str:
    """What we lead by, over the seeds that both have."""
    first, second = report.by_seed(ours, of), report.by_seed(theirs, of)
    return str(report.difference(first, second)) if first.keys() & second.keys() and ours is not theirs else ""


def rate(method: str, runs: Sequence[Record]) -> str:
    """The learning rate, with a mark where it was found at another scale."""
    return f"{runs[0]['settings']['lr']:g}" + (" *" if FOUND_AT_SMALL.get(method) else "")


def peers_table(runs: Runs) -> str:
    """A row a method as it was trained, from the worst to the best, and our paired lead over it."""
    ours, rows = runs.ours(), []
    for method, found in runs.by_method().items():
        figures = [report.spread(found, of) for of in FIGURES]
        leads = [paired(ours, found, of) if method != OURS else "" for of in ("in-domain", "unseen")]
        rows.append([TITLES[method], rate(method, found), str(len(found)), *figures, *leads])
    header = ["method", "learning rate", "seeds", *FIGURES, "mgfc's lead, in-domain", "mgfc's lead, unseen"]
    return report.markdown(header, rows)


def machines(runs: Iterable[Record]) -> set[str]:
    """What trained them."""
    return {run["machine"] for run in runs}


def controls_table(runs: Runs) -> str:
    """A row a method: unseen mIoU of each variant of the same trained models."""
    every = (AS_TRAINED, *CONTROLS, *ALIGNMENTS, AFTERWARDS)
    names = tuple(name for name in every if any(runs.of(method, name) for method in TITLES))
    rows = []
    for method, plain in runs.by_method().items():
        found = [runs.of(method, name) for name in names]
        found = [of_variant if machines(of_variant) <= machines(plain) else [] for of_variant in found]
        rows.append([TITLES[method], *(report.spread(of_variant, "unseen") if of_variant else "" for of_variant in found)])
    return report.markdown(["unseen mIoU", *names], rows)


def leads_table(runs: Runs, trained: Runs) -> str:
    """Our paired lead over the best peer: as trained, with its best control, alignment, and with our calibration on it."""
    others = {method: title for method, title in TITLES.items() if not method.startswith(OURS)}

    def scored(*variants: str) -> dict[str, list[Record]]:
        return {f"{title}, {name}": runs.of(method, name) for method, title in others.items() for name in variants}

    forms = {
        "as trained": scored(AS_TRAINED),
        "with its best input control": scored(AS_TRAINED, *CONTROLS),
        "with its best test-time alignment": scored(*ALIGNMENTS),
        "with mgfc's calibration on it": {
            f"{title}, {AFTERWARDS}, medium on {blocks}": found
            for method, title in others.items()
            for blocks, found in calibrated(trained, method).items()
        },
    }
    ours, rows = runs.ours(), []
    for form, groups in forms.items():
        which, found = best(groups)
        if found and ours:
            rows.append([form, which, report.spread(found, "unseen"), *(paired(ours, found, of) for of in LEADS)])
    return report.markdown(["best peer", "which", "unseen", *(f"mgfc's lead, {of}" for of in LEADS)], rows)


def targets_table(runs: Runs) -> str:
    """A row a method as it was trained: mean mIoU of each clean set and each corruption."""
    groups = runs.by_method()
    first = report.by_target(next(iter(groups.values()))[0], "miou")
    names = ["in-domain", *report.clean(first), *report.corrupted(first)]
    rows = [[TITLES[m], *(f"{report.average(groups[m], name):.1f}" for name in names)] for m in groups]
    return report.markdown(["method", *names], rows)


def classes_table(runs: Runs, target: str) -> str:
    """A row a method as it was trained: mean IoU of each class on one target."""
    groups = runs.by_method()
    names = list(next(iter(groups.values()))[0]["iou"][target])
    rows = [[TITLES[m], *(f"{mean(r['iou'][target][name] for r in groups[m]):.1f}" for name in names)] for m in groups]
    return report.markdown([f"IoU, {target}", *names], rows)


def ablation_table(runs: Runs, default: str = "default") -> str:
    """A row a variant of ours: what evaluation decides, then what training does; each paired with the default."""
    base = runs.ours()
    forms = {name: runs.of(OURS, name) for name in WITHOUT}
    forms |= {title: runs.of(OURS, OURS_VARIANT, options) for title, options in ABLATIONS.items()}
    forms["low-rank adapters on patch tokens alone"] = runs.of("mgfc_patches", OURS_VARIANT)
    rows = []
    for title, found in {default: base, **forms}.items():
        if found:
            changes = [paired(found, base, of) for of in LEADS]
            rows.append([title, str(len(found)), f"{found[0]['parameters']:,}", report.spread(found, "unseen"), *changes])
    return report.markdown(["variant", "seeds", "trained parameters", "unseen", *(f"change, {of}" for of in LEADS)], rows)


def summary_table(by_source: Mapping[str, Runs]) -> str:
    """A row a method that has runs from every source: trained parameters, unseen mIoU with its best control, our lead."""
    sources = [(runs, runs.by_method()) for runs in by_source.values()]
    rows = []
    for method, found in sources[0][1].items():
        if not all(method in methods for _, methods in sources):
            continue
        row = [TITLES[method], f"{found[0]['parameters']:,}"]
        for runs, methods in sources:
            plain = methods[method]
            controlled = plain if method == OURS else runs.best_of(method, (AS_TRAINED, *CONTROLS))[1]
            leads = [paired(runs.ours(), other) if method != OURS else "" for other in (plain, controlled)]
            row += [report.spread(plain, "unseen"), leads[0], report.spread(controlled, "unseen"), leads[1]]
        rows.append(row)
    columns = ("as trained", "mgfc's lead", "with its best input control", "mgfc's lead")
    return report.markdown(["method", "trained parameters", *(f"{name}, {c}" for name in by_source for c in columns)], rows)


def uncalibrated(runs: Runs, method: str) -> list[Record]:
    """Runs of what a method learnt, without mgfc's calibration."""
    return runs.of(method, "without coarse and medium" if method == OURS else AS_TRAINED)


def calibrated(trained: Runs, method: str) -> dict[str, list[Record]]:
    """Runs with mgfc's calibration put on afterwards, by the blocks of the medium stage, which tell defaults apart."""
    found: dict[str, list[Record]] = {}
    for run in trained.of(method, AFTERWARDS):
        found.setdefault(run["calibration"]["medium"]["layers"], []).append(run)
    return {blocks: runs for blocks, runs in found.items() if len({r["settings"]["seed"] for r in runs}) >= trained.min_seeds}


def gains(trained: Runs) -> Iterator[tuple[str, str, list[Record], list[Record]]]:
    """Of each method without and with mgfc's calibration: its title, the blocks of the medium stage, and the runs of both.

    Pairs are of the same training: a machine trains a method once, and another one may come to other weights.
    """
    for method, title in TITLES.items():
        for blocks, after in calibrated(trained, method).items():
            before = [run for run in uncalibrated(trained, method) if run["machine"] in machines(after)]
            if before:
                yield title, blocks, before, after


def gains_table(trained: Runs) -> str:
    """A row a method: unseen mIoU without and with mgfc's calibration, put on afterwards, and the paired changes."""
    rows = []
    for title, blocks, before, after in gains(trained):
        figures = [report.spread(found, "unseen") for found in (before, after)]
        rows.append([title, blocks, *figures, *(paired(after, before, of) for of in LEADS)])
    return report.markdown(["unseen mIoU", "medium on", "without", "calibrated", *(f"change, {of}" for of in LEADS)], rows)


def gains_by_target(trained: Runs) -> str:
    """A row a method: what mgfc's calibration, put on afterwards, changes on each clean set and corruption."""
    rows, names = [], []
    for title, blocks, before, after in gains(trained):
        values = report.by_target(before[0], "miou")
        names = ["in-domain", *report.clean(values), *report.corrupted(values)]
        changes = [report.difference(report.by_seed(after, n), report.by_seed(before, n)).mean for n in names]
        rows.append([title, blocks, *(f"{change:+.1f}" for change in changes)])
    return report.markdown(["change of mIoU", "medium on", *names], rows)


def without_and_with(trained: Runs) -> Groups:
    """Runs of each method without and with mgfc's calibration, by what the plot calls them; of the last default alone."""
    last = {title: (blocks, before, after) for title, blocks, before, after in gains(trained)}
    groups: dict[str, Sequence[Record]] = {}
    for title, (blocks, before, after) in last.items():
        calibrated = title if title == TITLES[OURS] else f"{title}, calibrated, {blocks}"
        groups |= {f"{title.strip('*')}, without": before, calibrated: after}
    return groups


def gains_summary(by_source: Mapping[str, Runs]) -> str:
    """A row a method that has runs from every source: trained parameters, unseen mIoU without and with calibration."""
    found: dict[tuple[str, str], list[str]] = {}
    for trained in by_source.values():
        for title, blocks, before, after in gains(trained):
            row = found.setdefault((title, blocks), [title, f"{before[0]['parameters']:,}", blocks])
            row += [*(report.spread(r, "unseen") for r in (before, after)), paired(after, before)]
    columns = ("without", "calibrated", "change")
    header = ["method", "trained parameters", "medium on", *(f"{name}, {c}" for name in by_source for c in columns)]
    return report.markdown(header, [row for row in found.values() if len(row) == len(header)])


def typical(runs: Sequence[Record], figure: str) -> float:
    """Median over runs."""
    return median(run[figure] for run in runs) if runs else math.nan


def cost_table(runs: Runs) -> str:
    """A row a method: trained parameters, seconds a step, peak memory, and what variants cost an image."""
    rows = []
    for method in TITLES:
        if plain := runs.of(method, AS_TRAINED):
            step, peak = typical(plain, "seconds_per_step"), typical(plain, "peak_memory_mib")
            image, after = (1000 * typical(runs.of(method, v), "seconds_per_image") for v in (AS_TRAINED, AFTERWARDS))
            milliseconds = [1000 * typical(runs.of(method, name), "control_seconds_per_image") for name in CONTROLS]
            figures = [f"{plain[0]['parameters']:,}", f"{step:.2f}", f"{peak:.0f}"]
            rows.append([TITLES[method], *figures, *(f"{value:.1f}" for value in (image, after, *milliseconds))])
    controls = [f"{name}, ms / image" for name in CONTROLS]
    header = ["method", "trained parameters", "s / step", "peak MiB", "ms / image", "ms / image, calibrated", *controls]
    return report.markdown(header, rows)


def protocol(runs: Runs, scale: str) -> str:
    """How the runs of a table were made."""
    s = SCALES[scale]
    machines = sorted({f"{run['machine']} with torch {run['torch']}" for run in runs.records}, reverse=True)
    return (
        f"{s['steps']} steps of {s['batch_size']} crops of {s['crop'][0]} x {s['crop'][1]} from images of "
        f"{s['size'][0]} x {s['size'][1]}; {s['count']} images of each clean set; {', '.join(machines)}. "
        "A learning rate with * was found at the scale `small`, all others at `medium`."
    )


def sections(results: Path, scale: str, min_seeds: int = 1) -> dict[str, str]:
    """Every table of one scale in Markdown, by name, without rows of fewer seeds.

    Raises:
        SystemExit: if no run was made at this scale.
    """
    by_source = {source: runs for source, runs in gather(results, scale, "peers", min_seeds).items() if runs.by_method()}
    if not by_source:
        raise SystemExit(f"No runs at the scale {scale!r} in {results / scale}: run the suite `peers` first.")
    trained = {source: found for source, found in all_trainings(results, scale, min_seeds).items() if source in by_source}
    parts = {"summary": summary_table(by_source), "gains": gains_summary(trained)}
    former = on_four_blocks(results, scale, min_seeds)
    parts["protocol"] = protocol(next(iter(by_source.values())), scale)
    for runs in gather(results, scale, "cost").values():
        parts["cost"] = cost_table(runs)
    for source, runs in by_source.items():
        parts[f"{source} peers"] = peers_table(runs)
        parts[f"{source} controls"] = controls_table(runs)
        parts[f"{source} leads"] = leads_table(runs, trained[source])
        parts[f"{source} gains"] = gains_table(trained[source])
        parts[f"{source} gains by target"] = gains_by_target(trained[source])
        parts[f"{source} targets"] = targets_table(runs)
        parts[f"{source} classes"] = classes_table(runs, "dusk")
        if runs.ours():
            parts[f"{source} ablations"] = ablation_table(runs)
        if source in former:
            parts[f"{source} four blocks ablations"] = ablation_table(former[source], "default before")
    return parts


def show(results: Path, scale: str, draw: Path | None) -> None:
    """Prints the tables of one scale; draws the plot if there is a path for it."""
    for name, text in sections(results, scale).items():
        print(f"## {name}\n\n{text}\n")
    if draw is not None:
        drawn = {source: without_and_with(found) for source, found in all_trainings(results, scale, PLOTTED_SEEDS).items()}
        drawn = {source: groups for source, groups in drawn.items() if groups}
        titles = dict.fromkeys(title for groups in drawn.values() for title in groups)
        plot(drawn, {title: title for title in titles}, draw)
