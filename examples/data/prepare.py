"""Brings a data set from its official archives into the form that the examples read, with the classes they score.

python examples/data/prepare.py cityscapes --from leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

from data import home, write_atomically
from data.classes import IGNORE, pack_colour
from data.files import Files
from data.layouts import LAYOUTS, Layout, Pair, layout_of

UNKNOWN = 254  # no class, nor `IGNORE`
# PIL keeps the high byte of 16-bit colours, and ids are in the low one: big-endian files are read as if little-endian.
LOW_BYTE = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=LAYOUTS)
    parser.add_argument(
        "--from", dest="places", type=Path, nargs="+", required=True, metavar="PATH", help="folders, zip archives"
    )
    parser.add_argument("--to", type=Path, help="the folder to write (default: DATASET in MGFC_DATA)")
    parser.add_argument("--jpeg", type=int, metavar="QUALITY", help="code images anew (default: as they are; camvid: 92)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="threads")
    args = parser.parse_args(arguments)
    args.to = args.to or home() / args.dataset
    args.jpeg = args.jpeg or (92 if args.dataset == "camvid" else None)
    return args


def table_of(layout: Layout) -> NDArray[np.uint8]:
    """The class of each 16-bit id or packed colour; `UNKNOWN` for ids that the data set does not define.

    Colours that it does not define are ignored: hand-drawn labels hold some here and there.
    """
    table = np.full(2**24 if layout.colours else 2**16, IGNORE if layout.colours else UNKNOWN, np.uint8)
    for value, index in layout.ids.items():
        table[value] = index
    return table


def read_label(content: bytes, layout: Layout) -> NDArray[np.integer[Any]]:
    """The ids or packed colours of a label file, at its own size or the one that the layout asks for."""
    with Image.open(io.BytesIO(content)) as image:
        if image.tile and image.tile[0].args in LOW_BYTE:
            image.tile = [image.tile[0]._replace(args=LOW_BYTE[image.tile[0].args])]
        if layout.colours:
            image = image.convert("RGB")
        if layout.size is not None and image.size != layout.size:
            image = image.resize(layout.size, Image.Resampling.NEAREST)
        values = np.asarray(image)
    if layout.colours:
        return np.asarray(pack_colour(*np.moveaxis(values.astype(np.int32), 2, 0)))
    return values if values.ndim == 2 else values[..., 0]  # SYNTHIA: the class, then the instance


def classes_of(content: bytes, layout: Layout, table: NDArray[np.uint8], name: str) -> Image.Image:
    """A label file as classes.

    Raises:
        SystemExit: if it holds an id that the data set does not define.
    """
    values = read_label(content, layout)
    classes = table[values]
    if (unknown := classes == UNKNOWN).any():
        raise SystemExit(
            f"{name} holds the label ids {np.unique(values[unknown]).tolist()}, which the data set does not define."
        )
    return Image.fromarray(classes)


def encode(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def recoded(content: bytes, layout: Layout, quality: int) -> bytes:
    """An image as JPEG, at the size that the layout asks for."""
    with Image.open(io.BytesIO(content)) as image:
        image = image.convert("RGB")
    if layout.size is not None and image.size != layout.size:
        image = image.resize(layout.size, Image.Resampling.LANCZOS)
    return encode(image, "JPEG", quality=quality)


def convert(pair: Pair, files: Files, layout: Layout, table: NDArray[np.uint8], out: Path, quality: int | None) -> str | None:
    """Writes an image and then its labels, unless they are there.

    Returns:
        Its name if image and labels differ in size, so that nothing was written; else None.
    """
    suffix = PurePosixPath(pair.image).suffix if quality is None else ".jpg"
    label = out / "labels" / f"{pair.name}.png"
    if label.exists():
        return None
    classes = classes_of(files.read(pair.label), layout, table, pair.label)
    content = files.read(pair.image)
    content = content if quality is None else recoded(content, layout, quality)
    with Image.open(io.BytesIO(content)) as image:
        if image.size != classes.size:
            return pair.name
    write_atomically(out / "images" / f"{pair.name}{suffix}", content)
    write_atomically(label, encode(classes, "PNG"))
    return None


def check_names(layout: Layout, files: Files) -> None:
    """Compares the names of the label ids with those that the archive states, if it does.

    Raises:
        SystemExit: if they differ.
    """
    if layout.config is None:
        return
    file, expected = layout.config
    for path in files.match(layout.pattern(file)).values():
        names = [label["name"] for label in json.loads(files.read(path))["labels"]]
        if names != expected:
            place = next((i for i, pair in enumerate(zip(names, expected, strict=False)) if pair[0] != pair[1]), len(expected))
            raise SystemExit(f"{path} defines {len(names)} labels, other ones than expected from id {place} on.")


def write_splits(pairs: Sequence[Pair], layout: Layout, out: Path) -> None:
    """Writes which images are in which split; the data set is complete with it."""
    splits: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        for split in pair.splits:
            splits[split].append(pair.name)
    write_atomically(out / "classes.json", (json.dumps(layout.classes) + "\n").encode())
    part = out / "splits.part"
    part.mkdir(exist_ok=True)
    for split, names in splits.items():
        (part / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    os.rename(part, out / "splits")


def prepare(dataset: str, places: Sequence[Path], out: Path, quality: int | None = None, jobs: int = 1) -> None:
    """Makes a data set; what an interrupted run has made is kept.

    Args:
        dataset: a name in `LAYOUTS`.
        places: folders and zip archives that hold its files.
        out: the folder to write.
        quality: of JPEGs; None for the images as they are.
        jobs: threads.

    Raises:
        SystemExit: if a file is missing or not as expected.
    """
    if (out / "splits").exists():
        raise SystemExit(f"{out} is complete already.")
    files = Files(places)
    layout = layout_of(dataset, files)
    pairs = layout.pairs(files)
    check_names(layout, files)
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    work = partial(convert, files=files, layout=layout, table=table_of(layout), out=out, quality=quality)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            uneven = set(tqdm(pool.map(work, pairs), desc=dataset, total=len(pairs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    left = [pair for pair in pairs if pair.name not in uneven]
    if len(left) < len(pairs):
        print(f"Left out, since image and labels differ in size: {', '.join(sorted(filter(None, uneven)))}")
    write_splits(left, layout, out)
    print(f"{out}: {len(left)} images, {len(layout.classes)} classes")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args.dataset, args.places, args.to, args.jpeg, args.jobs)


if __name__ == "__main__":
    main()
