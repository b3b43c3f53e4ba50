"""The tables and the plot of the docs, from the files of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from domain_generalization import report
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
}
COLUMNS = ("in-domain", "clean", "corrupted", "unseen")
Groups = Mapping[str, Sequence[Record]]


def select(records: Iterable[Record], size: tuple[int, int], source: str) -> list[Record]:
    """Runs at one scale, told by the size of its images, from one source."""
    return [r for r in records if tuple(r["settings"]["size"]) == size and r["settings"]["source"] == source]


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs of each method in its default form."""
    plain = [r for r in records if not r["settings"]["options"]]
    found = {method: [r for r in plain if r["settings"]["method"] == method] for method in TITLES}
    return {method: runs for method, runs in found.items() if runs}


def figures(runs: Sequence[Record]) -> list[str]:
    """Means and spreads over seeds, in the order of `COLUMNS`."""
    return [report.spread(list(report.by_seed(runs, of).values())) for of in COLUMNS]


def paired(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """What we lead by on unseen targets, over the seeds that both have."""
    first, second = report.by_seed(ours, "unseen"), report.by_seed(theirs, "unseen")
    return str(report.difference(first, second)) if first.keys() & second.keys() and ours is not theirs else ""


def cost(runs: Sequence[Record]) -> list[str]:
    """Trained parameters, seconds a step, peak memory."""
    seconds, peak = (mean(run[key] for run in runs) for key in ("seconds_per_step", "peak_memory_mib"))
    return [f"{runs[0]['parameters']:,}", f"{seconds:.2f}", f"{peak:.0f}"]


def peers_table(groups: Groups) -> str:
    """A row a method, from the worst to the best: cost, mIoU, and mgfc's paired lead over it."""
    ranked = sorted(groups, key=lambda method: mean(report.by_seed(groups[method], "unseen").values()))
    rows = [
        [TITLES[method], *cost(runs), f"{runs[0]['settings']['lr']:g}", *figures(runs), paired(groups.get(OURS, []), runs)]
        for method in ranked
        for runs in [groups[method]]
    ]
    header = ["method", "trained parameters", "s / step", "peak MiB", "learning rate", *COLUMNS, "mgfc's lead, unseen"]
    return report.markdown(header, rows)


def targets_table(groups: Groups) -> str:
    """A row a method: mean mIoU of each set."""
    names = list(next(iter(groups.values()))[0]["miou"])
    rows = [[TITLES[m], *(f"{mean(run['miou'][name] for run in runs):.1f}" for name in names)] for m, runs in groups.items()]
    return report.markdown(["method", *names], rows)


def classes_table(groups: Groups, target: str) -> str:
    """A row a method: mean IoU of each class on one target."""
    names = list(next(iter(groups.values()))[0]["iou"][target])
    rows = []
    for method, runs in groups.items():
        rows.append([TITLES[method], *(f"{mean(run['iou'][target][name] for run in runs):.1f}" for name in names)])
    return report.markdown([f"IoU, {target}", *names], rows)


def ablation_table(base: Sequence[Record], variants: Mapping[str, Sequence[Record]]) -> str:
    """A row a variant: mIoU, and what the change costs or gains, paired with the default."""
    rows = []
    for title, runs in {"default": base, **variants}.items():
        if runs:
            rows.append([title, f"{runs[0]['parameters']:,}", *figures(runs), paired(runs, base)])
    return report.markdown(["variant", "trained parameters", *COLUMNS, "change, unseen"], rows)


def protocol(records: Sequence[Record]) -> str:
    """How the runs of a table were made."""
    first, seeds = records[0], sorted({r["settings"]["seed"] for r in records})
    s = first["settings"]
    images = "all images of each set" if s["count"] is None else f"{s['count']} images of each clean set"
    return (
        f"{s['steps']} steps of {s['batch_size']} crops of {s['crop'][0]} x {s['crop'][1]} from images of "
        f"{s['size'][0]} x {s['size'][1]}; seeds {', '.join(map(str, seeds))}; {images}; {first['machine']}; "
        f"torch {first['torch']}."
    )


def plot(groups_by_source: Mapping[str, Groups], path: Path) -> None:
    """Unseen mIoU against trained parameters, a panel a source."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(groups_by_source), figsize=(5 * len(groups_by_source), 3.6), layout="constrained")
    for panel, (source, groups) in zip(panels, groups_by_source.items(), strict=True):
        for method, runs in groups.items():
            values = list(report.by_seed(runs, "unseen").values())
            place = max(runs[0]["parameters"], 1e4), mean(values)
            spread = [[place[1] - min(values)], [max(values) - place[1]]]
            panel.errorbar(*place, yerr=spread, fmt="o", color="tab:red" if method == OURS else "tab:gray")
            panel.annotate(TITLES[method].strip("*"), place, textcoords="offset points", xytext=(4, 4), fontsize=7)
        panel.set(xscale="log", ylabel="mean unseen mIoU", title=source)
        panel.set_xlabel("trained parameters beside the head (none: at the left edge)")
    figure.savefig(path)


def show(results: Path, size: tuple[int, int], sources: Iterable[str], draw: Path | None) -> None:
    """Prints the tables of one scale; draws the plot if there is a path for it."""
    records = report.read(results / "runs.jsonl")
    groups = {source: by_method(select(records, size, source)) for source in sources}
    groups = {source: found for source, found in groups.items() if found}
    for source, found in groups.items():
        print(f"\n## {source}\n\n{protocol([run for runs in found.values() for run in runs])}\n")
        print(peers_table(found) + "\n")
        print(targets_table(found))
    if draw is not None:
        plot(groups, draw)
