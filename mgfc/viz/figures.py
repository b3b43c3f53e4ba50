"""Matplotlib figures of a record: one for each stage, and all of them on one sheet. Nothing here needs pyplot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from mgfc.errors import CalibrationError
from mgfc.viz import panels
from mgfc.viz.pictures import palette as own_palette
from mgfc.viz.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["list[Axes]"], None]
T = TypeVar("T")

_COLUMN = 4.4  # inches
_TITLE = 0.4
_NO_MATPLOTLIB = 'mgfc.viz: expected Matplotlib, found that it is not installed. Install it with: pip install "mgfc[viz]"'


def require_matplotlib() -> None:
    """Raises an error in our words if Matplotlib is missing.

    Raises:
        ImportError: then.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(_NO_MATPLOTLIB) from None


def plot_coarse(record: Record) -> Figure:
    """The image, what the coarse stage made of it, and how far its channels' statistics lay from the source's.

    Raises:
        CalibrationError: if the adapter has no coarse stage, or one without statistics.
        ImportError: without Matplotlib, as all plots.
    """
    return _figure(record, [(3, _coarse(record))])


def plot_medium(record: Record, block: str | None = None) -> Figure:
    """The categories of the image, how far each patch was moved, and how far each category.

    Args:
        record: of the image.
        block: name of a block; None for the last that has a medium stage.

    Raises:
        CalibrationError: if there is no medium stage, or one without statistics.
    """
    return _figure(record, [(3, _medium(record, block))])


def plot_fine(record: Record, block: str | None = None) -> Figure:
    """The image, the share of the detail that each patch lets through, and where how much was added.

    Args:
        record: of the image.
        block: name of a block; None for the last that has a fine stage.

    Raises:
        CalibrationError: if there is no fine stage.
    """
    return _figure(record, [(3, _fine(record, block))])


def plot_change(record: Record) -> Figure:
    """How far what was learnt, and calibration, move the patch tokens that leave each block."""
    return _figure(record, [(1, lambda axes: panels.changes(axes[0], record))])


def plot_features(record: Record) -> Figure:
    """The features that leave the last block, before and after, in the colours of the principal components of both."""
    return _figure(record, [(2, lambda axes: panels.features(axes, record))])


def plot_prediction(record: Record, classes: Sequence[str] | None = None, palette: Tensor | None = None) -> Figure:
    """The prediction before and after, and a legend with the share of the image that each class fills.

    Args:
        record: of the image.
        classes: names of the classes; None for their numbers.
        palette: colours of the classes, (K, 3) in 0 to 1; None for colours of our own.

    Raises:
        CalibrationError: if the record was made without `predict`, or the names or colours do not fit it.
    """
    return _figure(record, [(3, _prediction(record, classes, palette))])


def plot_overview(
    record: Record, title: str = "", classes: Sequence[str] | None = None, palette: Tensor | None = None
) -> Figure:
    """All that the record holds on one sheet, a row for each stage; rows that it has nothing for are left out.

    Args:
        record: of the image.
        title: such as the name of the image; the distance from the source is added.
        classes: as in `plot_prediction`.
        palette: as in `plot_prediction`.
    """
    rows: list[tuple[int, Draw]] = [(3, _coarse(record)) if record.coarse else (1, lambda axes: panels.image(axes[0], record))]
    if record.medium:
        rows.append((3, _medium(record, None)))
    if record.fine:
        rows.append((3, _fine(record, None)))
    rows.append((3, lambda axes: panels.features_and_changes(axes, record)))
    if record.prediction is not None:
        rows.append((3, _prediction(record, classes, palette)))
    return _figure(record, rows, "\n".join(filter(None, [title, panels.distance(record)])))


def _coarse(record: Record) -> Draw:
    coarse = record.coarse
    if coarse is None:
        raise _missing("a coarse stage with statistics of the source")
    return lambda axes: panels.coarse(axes, record, coarse)


def _medium(record: Record, block: str | None) -> Draw:
    name, found = _choose(record.medium, block, "a medium stage with statistics of the source")
    return lambda axes: panels.medium(axes, record, name, found)


def _fine(record: Record, block: str | None) -> Draw:
    name, found = _choose(record.fine, block, "a fine stage")
    return lambda axes: panels.fine(axes, record, name, found)


def _prediction(record: Record, classes: Sequence[str] | None, palette: Tensor | None) -> Draw:
    if record.prediction is None:
        raise CalibrationError("Expected a record with a prediction, found none. Give `record` the argument `predict`.")
    names = [f"class {index}" for index in range(record.num_classes)] if classes is None else list(classes)
    colours = own_palette(record.num_classes) if palette is None else palette
    if len(names) != record.num_classes or tuple(colours.shape) != (record.num_classes, 3):
        raise CalibrationError(
            f"Expected names of {record.num_classes} classes and colours ({record.num_classes}, 3), found {len(names)} names "
            f"and colours {tuple(colours.shape)}."
        )
    return lambda axes: panels.prediction(axes, record, names, colours)


def _choose(found: dict[str, T], block: str | None, what: str) -> tuple[str, T]:
    """One of the blocks that a record holds a stage of."""
    if not found:
        raise _missing(what)
    name = list(found)[-1] if block is None else block
    if name not in found:
        raise CalibrationError(f"Expected one of the blocks {', '.join(found)}, found {name!r}.")
    return name, found[name]


def _missing(what: str) -> CalibrationError:
    return CalibrationError(f"Expected a record of an adapter with {what}, found none in it.")


def _figure(record: Record, rows: Sequence[tuple[int, Draw]], title: str = "") -> Figure:
    """A figure of rows, each a number of panels as large as the image and what draws them."""
    require_matplotlib()
    from matplotlib.figure import Figure

    height, width = record.picture.shape[:2]
    row = _COLUMN * min(max(height / width, 0.5), 1.5) + _TITLE
    columns = max(number for number, _ in rows)
    lines = title.count("\n") + 1 if title else 0
    figure = Figure(figsize=(columns * _COLUMN, len(rows) * row + 0.3 * lines), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (number, draw) in zip(grid, rows, strict=True):
        draw(list(line[:number]))
        for axes in line[number:]:
            axes.remove()
    if title:
        figure.suptitle(title, parse_math=False, x=0.01, ha="left", color=panels.INK, fontsize=13)
    return figure
