"""`mgfc show`: image files, an adapter and its backbone make one picture for each image."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgfc.backbones.description import describe
from mgfc.backbones.named import build, told_of_size
from mgfc.calibration import Calibration
from mgfc.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError
from mgfc.features import FeatureMaps
from mgfc.heads import SegmentationHead
from mgfc.storage.format import CONFIG, read_config
from mgfc.storage.loading import load_head, locate
from mgfc.storage.parsing import printable, shorten
from mgfc.storage.snapshot import consistently
from mgfc.viz.figures import plot_overview, require_matplotlib
from mgfc.viz.files import as_tensor, model_size, read_image, write_figure
from mgfc.viz.measure import Predict, record
from mgfc.wrapping import get_calibration, wrap_backbone


@dataclass(frozen=True)
class Shown:
    """One image of `show`.

    Args:
        image: its file.
        picture: the file that was written.
        size: (height, width) that the model saw.
        distance: from the source, or None, as in `Record`.
    """

    image: str
    picture: str
    size: tuple[int, int]
    distance: float | None


def show(
    images: Sequence[str | os.PathLike[str]],
    adapter: str,
    backbone: str | None = None,
    out: str | os.PathLike[str] = "shown",
    *,
    revision: str | None = None,
    size: tuple[int, int] | None = None,
    out_indices: Sequence[int] | None = None,
    overwrite: bool = False,
) -> tuple[list[Shown], str]:
    """Draws what an adapter does to images, as `plot_overview` does, and writes `NAME_calibration.png` for each.

    All that can be wrong with the words is found before a model is loaded, and nothing is written then.

    Args:
        images: files.
        adapter: directory or Hub repository.
        backbone: a timm name, or directory or Hub repository of a Transformers model; None for what the adapter names.
        out: directory, made if missing.
        revision: of the adapter's repository.
        size: (height, width) of the image that the model sees; None for its own shape, with the model's own size as the
            shorter side.
        out_indices: blocks whose maps the head reads; None for those of the adapter's training notes, else even distances.
        overwrite: write over pictures that are there.

    Returns:
        What was written, and what is shown of a prediction or why none is.

    Raises:
        ImportError: without Matplotlib.
        OSError: if an image cannot be read, a picture is there already, or the directory cannot be made.
        MGFCError: if the adapter or the backbone cannot be loaded, or they do not fit.
    """
    require_matplotlib()
    targets = _targets(images, Path(out), overwrite)
    for path in images:
        read_image(path)
    content = consistently(locate(adapter, revision=revision), lambda find: read_config(find(CONFIG)))
    name = backbone or content["backbone"].get("base_model")
    if name is None:
        raise AdapterNotFoundError(f"{adapter}: expected the name of its backbone, found none in it. Name one with --backbone.")
    named = build(name, pretrained=True)
    if named.channels not in (1, 3):
        raise ConfigError(
            f"{name}: expected a model of images of 1 or 3 channels, found {named.channels}. Read your images yourself, and "
            "call mgfc.viz.record and mgfc.viz.plot_overview."
        )
    calibration = get_calibration(wrap_backbone(named.model, adapter, revision=revision))
    predict, classes, told = _prediction(adapter, revision, content, calibration, out_indices)
    patch = describe(calibration.tower)["patch_size"] or (32, 32)
    Path(out).mkdir(parents=True, exist_ok=True)
    shown = []
    for path, target in zip(images, targets, strict=True):
        image = read_image(path)
        chosen = size or model_size(image.size[::-1], min(named.size), patch)
        with told_of_size(name, chosen):
            (found,) = record(
                named.model, as_tensor(image, chosen, named.mean, named.std), predict, mean=named.mean, std=named.std
            )
        write_figure(plot_overview(found, printable(Path(path).name), classes), target)
        shown.append(Shown(os.fspath(path), str(target), chosen, found.distance))
    return shown, told


def _targets(images: Sequence[str | os.PathLike[str]], out: Path, overwrite: bool) -> list[Path]:
    """Where the picture of each image goes; images of one name are numbered."""
    nearest = next(place for place in (out, *out.parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest}: expected a directory for the pictures, found a file. Name another with --out.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest}: expected a directory that may be written to. Name another with --out.")
    targets: list[Path] = []
    for path in images:
        stems = itertools.chain([Path(path).stem], (f"{Path(path).stem}_{number}" for number in itertools.count(2)))
        names = (out / f"{stem}_calibration.png" for stem in stems)
        targets.append(next(name for name in names if name not in targets))
    there = [str(target) for target in targets if target.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]}: expected no picture there yet, found one. Name another --out, or use --overwrite.")
    return targets


def _prediction(
    adapter: str,
    revision: str | None,
    content: dict[str, Any],
    calibration: Calibration,
    out_indices: Sequence[int] | None,
) -> tuple[Predict | None, Sequence[str] | None, str]:
    """How to predict with the head that was saved beside an adapter, the names of its classes, and all that in words."""
    described, notes = content.get("head"), content.get("training") or {}
    if described is None or described.get("class") != "SegmentationHead":
        found = "no head" if described is None else f"a head of class {shorten(str(described.get('class')))}"
        if out_indices is not None:
            raise ConfigError(f"{adapter}: expected a SegmentationHead for --out-indices, found {found} beside the adapter.")
        return None, None, f"no prediction: the adapter has {found}" + ("" if described is None else ", not a SegmentationHead")
    head = load_head(adapter, revision=revision).eval()
    assert isinstance(head, SegmentationHead)
    arguments: dict[str, Any] = head.arguments
    widths, depth = arguments["in_channels"], len(calibration.block_names)
    indices, origin = [(place + 1) * depth // len(widths) - 1 for place in range(len(widths))], "at even distances"
    noted = notes.get("out_indices")
    if out_indices is not None:
        indices, origin = list(out_indices), "as named"
    elif isinstance(noted, list) and all(type(index) is int for index in noted):
        indices, origin = noted, "as noted in training"
    maps = FeatureMaps(calibration.backbone, indices, blocks=calibration.block_names)
    if maps.channels != widths:
        raise AdapterMismatchError(
            f"{adapter}: expected maps of widths {widths} for its head, found {maps.channels} of blocks {indices}. "
            "Name the blocks with --out-indices."
        )
    names = notes.get("classes")
    classes = (
        [printable(str(name)) for name in names] if isinstance(names, list) and len(names) == arguments["num_classes"] else None
    )
    told = f"prediction by the adapter's head, from blocks {', '.join(map(str, indices))}, {origin}"
    return lambda image: head(maps(image)), classes, told
