"""The tables and the plot of the docs, from the files of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def peers_table(groups: Groups) -> str:
    """A row a method: cost, mIoU, and mgfc's paired lead over it."""
    ours = report.by_seed(groups.get(OURS, []), "unseen")
    rows = []
    for method, runs in sorted(groups.items(), key=lambda item: mean(report.by_seed(item[1], "unseen").values())):
        figures = [report.spread(list(report.by_seed(runs, of).values())) for of in COLUMNS]
        theirs = report.by_seed(runs, "unseen")
        lead = "" if method == OURS or not ours.keys() & theirs.keys() else str(report.difference(ours, theirs))
        cost = [
            f"{mean(run[key] for run in runs):{form}}"
            for key, form in (("seconds_per_step", ".2f"), ("peak_memory_mib", ".0f"))
        ]
        rows.append([TITLES[method], f"{runs[0]['parameters']:,}", *cost, f"{runs[0]['settings']['lr']:g}", *figures, lead])
    return report.markdown(
        ["method", "trained parameters", "s / step", "peak MiB", "learning rate", *COLUMNS, "mgfc's lead, unseen"], rows
    )


def targets_table(groups: Groups) -> str:
    """A row a method: mean mIoU of each unseen target."""
    names = list(next(iter(groups.values()))[0]["miou"])
    rows = [
        [TITLES[method], *(f"{mean(run['miou'][name] for run in runs):.1f}" for name in names)]
        for method, runs in groups.items()
    ]
    return report.markdown(["method", *names], rows)


def classes_table(groups: Groups, target: str) -> str:
    """A row a method: mean IoU of each class on one target."""
    names = list(next(iter(groups.values()))[0]["iou"][target])
    rows = [
        [TITLES[method], *(f"{mean(run['iou'][target][name] for run in runs):.1f}" for name in names)]
        for method, runs in groups.items()
    ]
    return report.markdown([f"IoU, {target}", *names], rows)


def ablation_table(base: Sequence[Record], variants: Mapping[str, Sequence[Record]]) -> str:
    """A row a variant: mIoU, and what the change costs or gains, paired with the default."""
    rows = []
    for title, runs in {"default": base, **variants}.items():
        if runs:
            figures = [report.spread(list(report.by_seed(runs, of).values())) for of in COLUMNS]
            change = (
                "" if runs is base else str(report.difference(report.by_seed(runs, "unseen"), report.by_seed(base, "unseen")))
            )
            rows.append([title, f"{runs[0]['parameters']:,}", *figures, change])
    return report.markdown(["variant", "trained parameters", *COLUMNS, "change, unseen"], rows)


def protocol(records: Sequence[Record]) -> str:
    """How the runs of a table were made."""
    first, seeds = records[0], sorted({r["settings"]["seed"] for r in records})
    s = first["settings"]
    images = "all images of each set" if s["count"] is None else f"{s['count']} images of each clean set"
    return (
        f"{s['steps']} steps of {s['batch_size']} crops of {s['crop'][0]} x {s['crop'][1]} from images of "
        f"{s['size'][0]} x {s['size'][1]}; seeds {', '.join(map(str, seeds))}; {images}; {first['machine']}; torch {first['torch']}."
    )


def plot(groups_by_source: Mapping[str, Groups], path: Path) -> None:
    """Unseen mIoU against trained parameters, a panel a source."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(groups_by_source), figsize=(5 * len(groups_by_source), 3.6), layout="constrained")
    for panel, (source, groups) in zip(panels, groups_by_source.items(), strict=True):
        for method, runs in groups.items():
            values = list(report.by_seed(runs, "unseen").values())
            cost = max(runs[0]["parameters"], 1e4)
            colour = "tab:red" if method == OURS else "tab:gray"
            panel.errorbar(
                cost, mean(values), yerr=[[mean(values) - min(values)], [max(values) - mean(values)]], fmt="o", color=colour
            )
            panel.annotate(
                TITLES[method].strip("*"), (cost, mean(values)), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
        panel.set(
            xscale="log",
            xlabel="trained parameters beside the head (frozen: at the left edge)",
            ylabel="mean unseen mIoU",
            title=source,
        )
    figure.savefig(path)


def show(
    results: Path, size: tuple[int, int], sources: Iterable[str], draw: Path | None, say: Callable[[str], None] = print
) -> None:
    """Prints the tables of one scale; draws the plot if there is a path for it."""
    records = report.read(results / "runs.jsonl")
    groups = {source: by_method(select(records, size, source)) for source in sources}
    groups = {source: found for source, found in groups.items() if found}
    for source, found in groups.items():
        say(f"\n## {source}\n\n{protocol([run for runs in found.values() for run in runs])}\n")
        say(peers_table(found) + "\n")
        say(targets_table(found))
    if draw is not None:
        plot(groups, draw)
