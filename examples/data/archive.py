"""Writes `synth_town.zip` from the rendered scenes: the same files give the same archive.

python examples/data/archive.py --from FOLDER
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
QUALITY = 68  # with 69 the archive is above 12 MB
# Sky, building, pole, road, sidewalk, tree, sign, fence, car, pedestrian, bicyclist; as `PALETTE` of streets.py.
COLOURS = (
    *((96, 165, 218), (150, 98, 84), (245, 240, 225), (116, 84, 138), (232, 128, 190), (88, 148, 60)),
    *((250, 210, 40), (205, 170, 110), (30, 60, 190), (226, 40, 50), (255, 130, 20)),
)


def encode_image(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality, optimize=True, progressive=True)
    return file.getvalue()


def encode_label(label: Image.Image) -> bytes:
    """An indexed PNG: the same ids, which viewers show in the classes' colours."""
    file = io.BytesIO()
    label = label.copy()
    label.putpalette([value for colour in COLOURS for value in colour] + [0] * (3 * (256 - len(COLOURS))))
    label.save(file, "PNG", optimize=True)
    return file.getvalue()


def write(source: Path, archive: Path, quality: int = QUALITY) -> None:
    """Writes the archive of a data set.

    Args:
        source: holds `images/*.jpg`, `labels/*.png`, `splits/*.txt` and `meta.json`.
        archive: the file to write.
        quality: of the JPEGs.
    """
    with zipfile.ZipFile(archive, "w") as file:

        def add(name: str, content: bytes) -> None:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            stored = zipfile.ZIP_STORED if name.endswith(".jpg") else zipfile.ZIP_DEFLATED
            file.writestr(entry, content, stored, compresslevel=9)

        add("README.md", (HERE / "synth_town.md").read_bytes())
        add("meta.json", (source / "meta.json").read_bytes())
        for path in sorted((source / "splits").glob("*.txt")):
            add(f"splits/{path.name}", path.read_bytes())
        for path in tqdm(sorted((source / "images").glob("*.jpg")), desc=archive.name):
            with Image.open(path) as image, Image.open(source / "labels" / f"{path.stem}.png") as label:
                add(f"images/{path.name}", encode_image(image, quality))
                add(f"labels/{path.stem}.png", encode_label(label))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the folder of the rendered scenes")
    parser.add_argument("--to", type=Path, default=HERE / "synth_town.zip")
    parser.add_argument("--quality", type=int, default=QUALITY, help="of the JPEGs")
    args = parser.parse_args(arguments)
    write(args.source, args.to, args.quality)
    print(f"{args.to}: {args.to.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
