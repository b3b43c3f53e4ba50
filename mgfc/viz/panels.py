"""Draws parts of a record into Matplotlib axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgfc.viz.pictures import class_colours, palette, principal_colours
from mgfc.viz.records import CoarseRecord, FineRecord, MediumRecord, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, LINE = "#26262b", "#8a8a94", "#d9d9df"
BEFORE, AFTER = "#a3a3ad", "#c2410c"
_MOST_ROWS = 16
_LEAST_SHARE = 0.005


def distance(record: Record) -> str:
    """The distance from the source, in words; empty without one."""
    return (
        ""
        if record.distance is None
        else f"distance from the source: {record.distance:.1f} (the source's own: about 1 or less)"
    )


def image(axes: Axes, record: Record) -> None:
    """The image as it is."""
    _show(axes, record.picture, record, "image")


def coarse(axes: Sequence[Axes], record: Record, found: CoarseRecord) -> None:
    """The image, the calibrated one, and the deviations of their channels' statistics."""
    image(axes[0], record)
    _show(axes[1], found.picture, record, "coarse: the image after calibration")
    channels = min(found.before.shape[1], _MOST_ROWS // 2)
    of = ("red", "green", "blue") if found.before.shape[1] == 3 else [f"channel {i}" for i in range(channels)]
    names = [f"{name}, {what}" for what in ("mean", "spread") for name in of]
    before, after = (item[:, :channels].flatten() for item in (found.before, found.after))
    title = "coarse: statistics of the channels" + (f", the first {channels}" if channels < found.before.shape[1] else "")
    _dumbbells(axes[2], names, before, after, [AFTER] * len(names), title)
    axes[2].axvspan(-1, 1, color=LINE, alpha=0.6, lw=0, zorder=0)
    axes[2].axvline(0, color=FAINT, lw=0.8, zorder=1)
    axes[2].set_xlabel("from the source's mean, in its standard deviations", color=INK, fontsize=9)


def medium(axes: Sequence[Axes], record: Record, block: str, found: MediumRecord) -> None:
    """Categories of the patches, how far each patch was moved, and how far each category."""
    colours = palette(found.assignment.shape[-1])
    _show(axes[0], found.assignment @ colours, record, f"medium: categories, {block}")
    _heat(axes[1], found.moved, record, "medium: how far patches moved, in % of their length")
    order = [index for index in found.shares.argsort(descending=True).tolist() if found.shares[index] >= _LEAST_SHARE]
    shown = order[:_MOST_ROWS]
    names = [f"{100 * found.shares[index]:.0f} %" for index in shown]
    picked = [tuple(colours[index].tolist()) for index in shown]
    _dumbbells(axes[2], names, found.before[shown], found.after[shown], picked, "medium: how far categories moved")
    axes[2].set_xlabel("from the prototype, in the source's standard deviations", color=INK, fontsize=9)
    axes[2].set_ylabel("category, share of the image", color=INK, fontsize=9)
    axes[2].set_xlim(left=0)


def fine(axes: Sequence[Axes], record: Record, block: str, found: FineRecord) -> None:
    """The image, the share of the detail that is let through, and how much was added."""
    image(axes[0], record)
    _heat(axes[1], found.share, record, f"fine: detail let through, in %, {block}", limit=1.0)
    _heat(axes[2], found.added, record, "fine: detail added, in % of the token's length")


def features(axes: Sequence[Axes], record: Record) -> None:
    """Features before and after, in the colours of their common principal components."""
    for ax, name, colours in zip(axes, _names(record), principal_colours(record.features), strict=True):
        _show(ax, colours, record, f"features, {name}")


def changes(axes: Axes, record: Record) -> None:
    """The change that leaves each block, as curves."""
    curves = {
        "learnt, against the bare backbone": (record.learnt, BEFORE),
        "calibration, against none": (record.calibrated, AFTER),
    }
    for name, (values, colour) in curves.items():
        if values is not None:
            axes.plot(range(len(values)), [100 * value for value in values], marker="o", ms=4, color=colour, label=name)
    axes.set_ylim(0, 1.25 * max(axes.get_ylim()[1], 1e-6))  # room for the legend
    axes.set_xlim(-0.4, len(record.blocks) - 0.6)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("block", color=INK, fontsize=9)
    axes.grid(axis="y", color=LINE, lw=0.8)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
    _frame(axes, "change per block, in % of the tokens' length")


def features_and_changes(axes: Sequence[Axes], record: Record) -> None:
    """Both, in one row."""
    features(axes[:2], record)
    changes(axes[2], record)


def prediction(axes: Sequence[Axes], record: Record, names: Sequence[str], colours: Tensor) -> None:
    """Predictions before and after, and their legend."""
    assert record.prediction is not None
    for ax, name, classes in zip(axes, _names(record), record.prediction, strict=False):
        _show(ax, class_colours(record.picture, classes, colours), record, f"prediction, {name}")
    before, after = (torch.bincount(item.flatten(), minlength=len(names)) / item.numel() for item in record.prediction)
    changed = (record.prediction[0] != record.prediction[1]).float().mean()
    order = [
        index for index in torch.maximum(before, after).argsort(descending=True).tolist() if before[index] + after[index] > 0
    ]
    _legend(axes[2], [(names[i], colours[i], before[i].item(), after[i].item()) for i in order], changed.item())


def _names(record: Record) -> tuple[str, str]:
    return record.baseline, "with calibration" if record.baseline == "without calibration" else "with the adapter"


def _show(axes: Axes, picture: Tensor, record: Record, title: str) -> None:
    """A picture, or a map of patches stretched over the image."""
    height, width = record.picture.shape[:2]
    axes.imshow(picture.float().clamp(0, 1).numpy(), extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_anchor("NW")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_axis_off()


def _heat(axes: Axes, values: Tensor, record: Record, title: str, limit: float | None = None) -> None:
    """A map of shares, with its scale in percent."""
    height, width = record.picture.shape[:2]
    top = 100 * max(values.max().item(), 1e-6) if limit is None else 100 * limit
    shown = axes.imshow(100 * values.numpy(), cmap="magma", vmin=0, vmax=top, extent=(0, width, height, 0))
    beside = axes.inset_axes((1.02, 0, 0.03, 1))
    bar = axes.figure.colorbar(shown, cax=beside)
    bar.outline.set_visible(False)
    beside.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_anchor("NW")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_axis_off()


def _dumbbells(axes: Axes, names: Sequence[str], before: Tensor, after: Tensor, colours: Sequence[object], title: str) -> None:
    """A row for each name: a hollow dot where it was, and an arrow to a filled one where it is."""
    for row, (start, stop, colour) in enumerate(zip(before.tolist(), after.tolist(), colours, strict=True)):
        axes.plot([start, stop], [row, row], color=colour, lw=2, solid_capstyle="round", zorder=2)
        axes.plot(start, row, "o", ms=6, mfc="white", mec=colour, mew=1.6, zorder=3)
        axes.plot(stop, row, "o", ms=6, color=colour, zorder=4)
    axes.plot([], [], "o", ms=6, mfc="white", mec=INK, mew=1.6, label="before")
    axes.plot([], [], "o", ms=6, color=INK, label="after")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=LINE, lw=0.8)
    _frame(axes, title)


def _legend(axes: Axes, rows: Sequence[tuple[str, Tensor, float, float]], changed: float) -> None:
    """A row for each class: its colour, its name, and the share of the image that it fills before and after."""
    axes.set_axis_off()
    axes.set_title(f"legend; {100 * changed:.1f} % of the pixels changed class", loc="left", fontsize=11, color=INK)
    axes.set(xlim=(0, 1), ylim=(max(len(rows[:_MOST_ROWS]), 8) + 1.2, -0.4))
    for x, text in ((0.72, "before"), (0.95, "after")):
        axes.text(x, 0.2, text, ha="right", va="center", fontsize=9, color=FAINT)
    for row, (name, colour, before, after) in enumerate(rows[:_MOST_ROWS], start=1):
        axes.plot(0.03, row + 0.2, "s", ms=11, color=tuple(colour.tolist()), mec=LINE, mew=0.8)
        axes.text(0.09, row + 0.2, name, parse_math=False, va="center", fontsize=10, color=INK)
        for x, share in ((0.72, before), (0.95, after)):
            axes.text(x, row + 0.2, f"{100 * share:.1f} %", ha="right", va="center", fontsize=10, color=INK)
    if len(rows) > _MOST_ROWS:
        axes.text(0.09, _MOST_ROWS + 1, f"and {len(rows) - _MOST_ROWS} more", va="center", fontsize=9, color=FAINT)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.set_axisbelow(True)
