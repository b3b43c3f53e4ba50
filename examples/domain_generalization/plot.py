"""Unseen mIoU against trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from domain_generalization import report
from domain_generalization.report import Record


def plot(by_source: Mapping[str, Mapping[str, Sequence[Record]]], titles: Mapping[str, str], path: Path) -> None:
    """A panel a source, with the range over seeds; the same bytes for the same results.

    Args:
        by_source: runs by source and method.
        titles: of the methods; a bold one is drawn so.
        path: an SVG file.
    """
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mgfc"
    shape: dict[str, Any] = {"figsize": (4 * len(by_source) + 3, 3.6), "layout": "constrained", "squeeze": False}
    markers = zip(titles, "osv^<>DPXhdp*", strict=False)
    looks: dict[str, dict[str, Any]] = {method: {"marker": marker} for method, marker in markers}
    for method, title in titles.items():
        looks[method] |= {"color": "black", "markersize": 9} if title.startswith("**") else {}
    figure, panels = plt.subplots(1, len(by_source), **shape)
    for panel, (source, groups) in zip(panels[0], by_source.items(), strict=True):
        for method in (method for method in titles if method in groups):
            runs = groups[method]
            values = list(report.by_seed(runs, "unseen").values())
            place = max(runs[0]["parameters"], 1e4), mean(values)
            spread = [[place[1] - min(values)], [max(values) - place[1]]]
            panel.errorbar(*place, yerr=spread, linestyle="none", label=titles[method].strip("*"), **looks[method])
        panel.set(xscale="log", ylabel="mean unseen mIoU", title=f"trained on {source}")
        panel.set_xlabel("trained parameters (none: at the left edge)")
    names: dict[str, Any] = {}
    for panel in panels[0]:
        names |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names, loc="outside right center", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
