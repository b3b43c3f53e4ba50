"""Finding adapters on the Hugging Face Hub, by words in their names and by their base model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mgfc.errors import AdapterNotFoundError
from mgfc.storage.hub import connection_error
from mgfc.storage.parsing import printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

LIBRARY = "mgfc"
_BASE_MODEL, _DATASET = "base_model:", "dataset:"
_MEAN_IOU = "mean_iou"


@dataclass(frozen=True)
class Figure:
    """One result that a model card states; nobody has checked it."""

    value: float
    metric: str
    dataset: str


@dataclass(frozen=True)
class Listing:
    """An adapter on the Hub, as its card describes it.

    Args:
        name: organisation/name, which `wrap_backbone` takes.
        base_model: Hub id of the backbone that it was made for, if the card names one.
        datasets: that it was trained on.
        best: the highest mean IoU of its results, on whatever data; the first result where none is a mean IoU.
        downloads: of the last 30 days.
        gated: whether its terms have to be accepted before it can be loaded.
        private: whether only members of its organisation see it.
    """

    name: str
    base_model: str | None
    datasets: tuple[str, ...]
    best: Figure | None
    downloads: int
    gated: bool
    private: bool


def client() -> HfApi:
    """The Hub's own client, whose `endpoint` is the address of the Hub that it asks.

    Raises:
        AdapterNotFoundError: if `HF_ENDPOINT` is no address.
    """
    try:
        from huggingface_hub import HfApi
    except ValueError as error:  # the client reads its settings when it is imported
        address = os.environ.get("HF_ENDPOINT")
        raise AdapterNotFoundError(f"HF_ENDPOINT: expected the address of a Hub, found {address!r} ({error}).") from None
    return HfApi(library_name=LIBRARY)


def search(words: str = "", *, base_model: str | None = None, limit: int | None = None) -> list[Listing]:
    """Adapters of this library on the Hub that the client's settings name (`HF_ENDPOINT`, `HF_TOKEN`).

    Args:
        words: that the name contains, as in the Hub's own search; "" for any.
        base_model: Hub id of a backbone; None for any.
        limit: of how many to list; None for all.

    Returns:
        The most downloaded first.

    Raises:
        AdapterNotFoundError: if the Hub cannot be asked.
    """
    tags = [LIBRARY, *([] if base_model is None else [_BASE_MODEL + base_model])]
    api = client()
    try:
        found = api.list_models(
            filter=tags,
            search=words or None,
            sort="downloads",
            expand=["downloads", "gated", "library_name", "model-index", "private", "tags"],
        )
        # Any model may have a tag of this name.
        return [_listing(info) for info in islice((info for info in found if info.library_name == LIBRARY), limit)]
    except (OSError, connection_error(), ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterNotFoundError(f"{api.endpoint}: {_explain(error)}") from error


def _listing(info: ModelInfo) -> Listing:
    tags = [tag for tag in info.tags or [] if isinstance(tag, str)]
    # The Hub gives each base model one tag of this form, and others that tell the relation, as base_model:adapter:ID.
    bases = [tag.removeprefix(_BASE_MODEL) for tag in tags if tag.startswith(_BASE_MODEL) and tag.count(":") == 1]
    return Listing(
        name=info.id,
        base_model=bases[0] if bases else None,
        datasets=tuple(tag.removeprefix(_DATASET) for tag in tags if tag.startswith(_DATASET)),
        best=_best(list(_figures(info.model_index))),
        downloads=info.downloads or 0,
        gated=bool(info.gated),
        private=bool(info.private),
    )


def _best(figures: list[tuple[bool, Figure]]) -> Figure | None:
    scores = [figure for is_mean_iou, figure in figures if is_mean_iou]
    if scores:
        return max(scores, key=lambda figure: figure.value)
    return figures[0][1] if figures else None


def _figures(index: Any) -> Iterator[tuple[bool, Figure]]:
    """The numbers of a card's `model-index`, which may hold anything, and whether each is a mean IoU."""
    for model in _dicts(index):
        for result in _dicts(model.get("results")):
            dataset = result.get("dataset")
            name = dataset.get("name") or dataset.get("type") if isinstance(dataset, dict) else None
            for metric in _dicts(result.get("metrics")):
                value = metric.get("value")
                # Neither NaN, nor infinite, nor an integer that no float holds.
                if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
                    kind = str(metric.get("type"))
                    yield kind == _MEAN_IOU, Figure(value, kind, str(name or "unknown data"))


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    yield from (value for value in values if isinstance(value, dict)) if isinstance(values, list) else ()


def describe(found: Sequence[Listing], words: str, base_model: str | None, limit: int) -> str:
    """What a search found, as a table.

    Args:
        found: by `search` with the other arguments.
        words: that the names contain.
        base_model: of the adapters.
        limit: of the list.
    """
    if not found:
        asked = [f"for {base_model}"] * (base_model is not None) + [f"with {words!r} in its name"] * bool(words)
        hint = "Leave out words or the base model." if asked else "None was published there so far."
        return printable(" ".join([f"No mgfc adapter on {client().endpoint}", *asked]) + f". {hint}")
    rows = [["NAME", "BASE MODEL", "DATASETS", "BEST FIGURE", "DOWNLOADS"], *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"`mgfc info {printable(found[0].name)}` shows what it is and how to load it."]
    return "\n".join([*lines, f"These are the first {limit}; --limit lists more."] if len(found) == limit else lines)


def _row(listing: Listing) -> list[str]:
    marks = ["gated"] * listing.gated + ["private"] * listing.private
    best = listing.best
    metric = best and ("mIoU" if best.metric == _MEAN_IOU else best.metric)
    cells = (
        listing.name + (f" ({', '.join(marks)})" if marks else ""),
        listing.base_model or "",
        ", ".join(listing.datasets),
        f"{best.value:g} {metric} on {best.dataset}" if best else "",
        f"{listing.downloads:,}",
    )
    return [_cut(printable(cell)) for cell in cells]


def _cut(text: str, limit: int = 100) -> str:
    """A cell of a table. Names of repositories are never that long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _explain(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "expected a Hub that may be asked, found that HF_HUB_OFFLINE is set. Unset it; adapters in the cache load without."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the Hub refused the search (status {status}). Log in anew (`hf auth login`), or unset HF_TOKEN."
        return f"expected a list of models, found status {status}. Try again; if HF_ENDPOINT is set, check that it names a Hub."
    if isinstance(error, (OSError, connection_error())):
        return f"the Hub cannot be reached ({type(error).__name__}: {error}). Check the network, and HF_ENDPOINT if it is set."
    return f"expected a list of models, found another answer ({type(error).__name__}). Check that HF_ENDPOINT names a Hub."
