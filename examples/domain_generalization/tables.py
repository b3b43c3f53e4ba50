"""The tables and the plot of the docs, from the files of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from domain_generalization import report
from domain_generalization.domains import SOURCES
from domain_generalization.plan import FILES, VARIANTS
from domain_generalization.report import Record

OURS = "mgfc"
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
COLUMNS = ("in-domain", "clean", "corrupted", "unseen")
Groups = Mapping[str, Sequence[Record]]


def select(records: Iterable[Record], size: tuple[int, int], source: str) -> list[Record]:
    """Runs at one scale, told by the size of its images, from one source."""
    return [r for r in records if tuple(r["settings"]["size"]) == size and r["settings"]["source"] == source]


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs of each method in its default form, with the learning rate of its last run."""
    plain = [r for r in records if not r["settings"]["options"]]
    lr = {r["settings"]["method"]: r["settings"]["lr"] for r in plain}
    last = [r for r in plain if r["settings"]["lr"] == lr[r["settings"]["method"]]]
    found = {method: [r for r in last if r["settings"]["method"] == method] for method in TITLES}
    return {method: runs for method, runs in found.items() if runs}


def variants(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs of our method in its default form and in each variant of the ablation."""
    ours = [r for r in records if r["settings"]["method"] == OURS]
    forms = {"default": {}, **VARIANTS}
    found = {title: [r for r in ours if r["settings"]["options"] == options] for title, options in forms.items()}
    return {title: runs for title, runs in found.items() if runs}


def figures(runs: Sequence[Record]) -> list[str]:
    """Means and spreads over seeds, in the order of `COLUMNS`."""
    return [report.spread(list(report.by_seed(runs, of).values())) for of in COLUMNS]


def paired(ours: Sequence[Record], theirs: Sequence[Record], of: str = "unseen") -> str:
    """What we lead by, over the seeds that both have."""
    first, second = report.by_seed(ours, of), report.by_seed(theirs, of)
    return str(report.difference(first, second)) if first.keys() & second.keys() and ours is not theirs else ""


def cost(runs: Sequence[Record]) -> list[str]:
    """Trained parameters, and the median seconds a step and peak memory."""
    seconds, peak = (median(run[key] for run in runs) for key in ("seconds_per_step", "peak_memory_mib"))
    return [f"{runs[0]['parameters']:,}", f"{seconds:.2f}", f"{peak:.0f}"]


def ranked(groups: Groups) -> list[str]:
    """Methods from the worst to the best on unseen targets."""
    return sorted(groups, key=lambda method: mean(report.by_seed(groups[method], "unseen").values()))


def peers_table(groups: Groups) -> str:
    """A row a method, from the worst to the best: learning rate, mIoU, and mgfc's paired lead over it."""
    rows = []
    for method in ranked(groups):
        runs = groups[method]
        leads = [paired(groups.get(OURS, []), runs, of) for of in ("in-domain", "unseen")]
        rows.append([TITLES[method], f"{runs[0]['settings']['lr']:g}", str(len(runs)), *figures(runs), *leads])
    header = ["method", "learning rate", "seeds", *COLUMNS, "mgfc's lead, in-domain", "mgfc's lead, unseen"]
    return report.markdown(header, rows)


def cost_table(groups: Groups) -> str:
    """A row a method: trained parameters, seconds a step, peak memory."""
    rows = [[TITLES[method], *cost(runs)] for method, runs in groups.items()]
    return report.markdown(["method", "trained parameters", "s / step", "peak MiB"], rows)


def targets_table(groups: Groups) -> str:
    """A row a method: mean mIoU of each set."""
    names = list(next(iter(groups.values()))[0]["miou"])
    rows = [[TITLES[m], *(f"{mean(run['miou'][name] for run in groups[m]):.1f}" for name in names)] for m in ranked(groups)]
    return report.markdown(["method", *names], rows)


def classes_table(groups: Groups, target: str) -> str:
    """A row a method: mean IoU of each class on one target."""
    names = list(next(iter(groups.values()))[0]["iou"][target])
    rows = [[TITLES[m], *(f"{mean(r['iou'][target][name] for r in groups[m]):.1f}" for name in names)] for m in ranked(groups)]
    return report.markdown([f"IoU, {target}", *names], rows)


def ablation_table(forms: Groups) -> str:
    """A row a variant: mIoU, and what the change costs or gains, paired with the default."""
    rows = []
    for title, runs in forms.items():
        base = forms["default"]
        changes = [paired(runs, base, of) for of in ("in-domain", "unseen")]
        rows.append([title, str(len(runs)), f"{runs[0]['parameters']:,}", *figures(runs), *changes])
    header = ["variant", "seeds", "trained parameters", *COLUMNS, "change, in-domain", "change, unseen"]
    return report.markdown(header, rows)


def summary_table(by_source: Mapping[str, Groups]) -> str:
    """A row a method that has runs from every source: trained parameters, unseen mIoU and our lead."""
    first = next(iter(by_source.values()))
    rows = []
    for method in ranked(first):
        if not all(method in groups for groups in by_source.values()):
            continue
        row = [TITLES[method], f"{first[method][0]['parameters']:,}"]
        for groups in by_source.values():
            row += [report.spread(list(report.by_seed(groups[method], "unseen").values()))]
            row += [paired(groups.get(OURS, []), groups[method])]
        rows.append(row)
    columns = [name for source in by_source for name in (f"from {source}", "mgfc's lead")]
    return report.markdown(["method", "trained parameters", *columns], rows)


def protocol(records: Sequence[Record]) -> str:
    """How the runs of a table were made."""
    first = records[0]
    s = first["settings"]
    images = "all images of each set" if s["count"] is None else f"{s['count']} images of each clean set"
    return (
        f"{s['steps']} steps of {s['batch_size']} crops of {s['crop'][0]} x {s['crop'][1]} from images of "
        f"{s['size'][0]} x {s['size'][1]}; {images}; {first['machine']}; torch {first['torch']}."
    )


def plot(groups_by_source: Mapping[str, Groups], path: Path) -> None:
    """Unseen mIoU against trained parameters, a panel a source; the same bytes for the same results."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mgfc"
    shape = {"figsize": (4 * len(groups_by_source) + 3, 3.6), "layout": "constrained", "squeeze": False}
    looks = {method: {"marker": marker} for method, marker in zip(TITLES, "osv^<>DPXhdp*", strict=False)}
    looks[OURS] |= {"color": "black", "markersize": 9}
    figure, panels = plt.subplots(1, len(groups_by_source), **shape)
    for panel, (source, groups) in zip(panels[0], groups_by_source.items(), strict=True):
        for method, runs in groups.items():
            values = list(report.by_seed(runs, "unseen").values())
            place = max(runs[0]["parameters"], 1e4), mean(values)
            spread = [[place[1] - min(values)], [max(values) - place[1]]]
            panel.errorbar(*place, yerr=spread, linestyle="none", label=TITLES[method].strip("*"), **looks[method])
        panel.set(xscale="log", ylabel="mean unseen mIoU", title=f"trained on {source}")
        panel.set_xlabel("trained parameters (none: at the left edge)")
    names: dict[str, Any] = {}
    for panel in panels[0]:
        names |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names, loc="outside right center", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def gather(results: Path, size: tuple[int, int], suite: str = "peers") -> dict[str, list[Record]]:
    """Runs at one scale by source, in the order of `SOURCES`."""
    records = report.read(results / FILES[suite])
    found = {source: select(records, size, source) for source in SOURCES}
    return {source: runs for source, runs in found.items() if runs}


def enough(groups: Groups, min_seeds: int) -> dict[str, Sequence[Record]]:
    """Rows with at least so many seeds."""
    return {name: runs for name, runs in groups.items() if len(runs) >= min_seeds}


def sections(results: Path, size: tuple[int, int], min_seeds: int = 1) -> dict[str, str]:
    """Every table of one scale in Markdown, by name, without rows of fewer seeds.

    Raises:
        SystemExit: if no run was made at this scale.
    """
    runs = gather(results, size)
    if not runs:
        raise SystemExit(f"No runs of {size[0]} x {size[1]} images in {results / 'runs.jsonl'}: run the suite `peers` first.")
    groups = {source: enough(by_method(found), min_seeds) for source, found in runs.items()}
    parts = {"summary": summary_table(groups), "protocol": protocol(next(iter(runs.values())))}
    for short in gather(results, size, "cost").values():
        parts["cost"] = cost_table(by_method(short))
    for source, found in groups.items():
        parts[f"{source} peers"] = peers_table(found)
        parts[f"{source} targets"] = targets_table(found)
        parts[f"{source} classes"] = classes_table(found, "dusk")
        forms = enough(variants(runs[source]), min_seeds)
        if "default" in forms:
            parts[f"{source} ablations"] = ablation_table(forms)
    return parts


def show(results: Path, size: tuple[int, int], draw: Path | None) -> None:
    """Prints the tables of one scale; draws the plot if there is a path for it."""
    for name, text in sections(results, size).items():
        print(f"## {name}\n\n{text}\n")
    if draw is not None:
        plot({source: by_method(found) for source, found in gather(results, size).items()}, draw)
