"""Segments photographs with a pretrained adapter, beside the same head on the bare backbone.

python examples/segment.py                                 # the sample images, with the adapter in this directory
python examples/segment.py street.jpg --out segmented
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from backbone import load_dinov2_small
from PIL import Image, ImageDraw, ImageFont, ImageOps
from streets import CLASSES, PALETTE, load_bare_head, normalise
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc import FeatureMaps, MGFCError, get_calibration, load_head, wrap_backbone
from mgfc.viz.files import model_size, read_image
from mgfc.viz.pictures import class_colours

HERE = Path(__file__).parent
PATCH = 14, 14
COLOURS = torch.tensor(list(PALETTE.values())) / 255
MARGIN, TITLE, ROW = 14, 36, 34
INK, PAPER = (40, 40, 44), (255, 255, 255)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="default: the sample images")
    parser.add_argument("--adapter", help="directory or Hub repository (default: the one in this directory)")
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2-S (default: from the Hub)")
    parser.add_argument("--bare", type=Path, help="a head trained without calibrators, to compare")
    parser.add_argument("--out", type=Path, default=Path("segmented"))
    parser.add_argument("--side", type=int, default=392, help="shorter side that the model sees, in pixels")
    args = parser.parse_args(arguments)
    args.images = args.images or sorted((HERE / "images").glob("*.jpg"))
    if args.adapter is None:
        args.adapter, args.bare = HERE / "adapter", args.bare or HERE / "bare_head"
    return args


def colour(image: Image.Image, classes: np.ndarray) -> Image.Image:
    """Blends the classes' colours into the image and draws a thin line between classes."""
    pixels = class_colours(torch.from_numpy(np.array(image)) / 255, torch.tensor(classes).long(), COLOURS)
    return Image.fromarray((255 * pixels).byte().numpy())


def compose(panels: dict[str, Image.Image]) -> Image.Image:
    """Titled panels in a row, and the legend below."""
    font = ImageFont.load_default(size=19)
    width, height = next(iter(panels.values())).size
    column = max(width, *(round(font.getlength(title)) for title in panels))
    total = len(panels) * (column + MARGIN) + MARGIN
    entries: list[tuple[int, int, str]] = []
    x, row = MARGIN, 0
    for name in CLASSES:
        step = 26 + round(font.getlength(name)) + 24
        if x + step > total and x > MARGIN:
            x, row = MARGIN, row + 1
        entries.append((x, row, name))
        x += step
    top = TITLE + height + MARGIN
    picture = Image.new("RGB", (total, top + (row + 1) * ROW + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (title, panel) in enumerate(panels.items()):
        left = MARGIN + index * (column + MARGIN)
        draw.text((left, TITLE // 2), title, fill=INK, font=font, anchor="lm")
        picture.paste(panel, (left, TITLE))
    for left, row, name in entries:
        middle = top + row * ROW + ROW // 2
        swatch = (left, middle - 9, left + 18, middle + 9)
        draw.rounded_rectangle(swatch, radius=4, fill=PALETTE[name], outline=(170, 170, 170))
        draw.text((left + 26, middle), name, fill=INK, font=font, anchor="lm")
    return picture


class Segmenter:
    """A wrapped backbone with its head, and optionally a head for the bare backbone."""

    def __init__(self, backbone: Path | None, adapter: str | Path, bare: Path | None) -> None:
        self.head = load_head(adapter).eval()
        self.bare_head = None if bare is None else load_bare_head(bare).eval()
        for name, head in (("adapter", self.head), ("bare", self.bare_head)):
            if head is not None and head.get_submodule("classify").out_channels != len(CLASSES):
                raise ValueError(f"--{name}: expected a head of the {len(CLASSES)} classes of streets.py.")
        self.vit: nn.Module = wrap_backbone(load_dinov2_small(backbone), adapter)
        self.vit.eval()  # type: ignore[no-untyped-call]
        self.maps = FeatureMaps(self.vit, out_indices=(2, 5, 8, 11))

    @torch.inference_mode()
    def __call__(self, image: Image.Image, side: int) -> dict[str, np.ndarray]:
        """The class of each pixel, at the image's own size, by model."""
        pixels = normalise(image.resize(model_size(image.size, side, PATCH), Image.Resampling.BICUBIC)).unsqueeze(0)
        found = {"with calibrators": _classes(self.head(self.maps(pixels)), image)}
        if self.bare_head is not None:
            with get_calibration(self.vit).disabled():
                found["bare backbone"] = _classes(self.bare_head(self.maps(pixels)), image)
        return found


def _classes(logits: Tensor, image: Image.Image) -> np.ndarray:
    logits = F.interpolate(logits, size=image.size[::-1], mode="bilinear", align_corners=False)
    return logits[0].argmax(dim=0).numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        segment = Segmenter(args.backbone, args.adapter, args.bare)
    except (MGFCError, OSError, ValueError) as error:
        print(f"segment.py: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    failed, stems = 0, Counter[str]()
    for path in args.images:
        try:
            image = read_image(path)
        except OSError as error:
            print(f"segment.py: {error}", file=sys.stderr)
            failed += 1
            continue
        start = time.perf_counter()
        found = segment(image, args.side)
        seconds = time.perf_counter() - start
        image = ImageOps.contain(image, (640, 640))
        panels = {"image": image}
        for name, classes in found.items():
            small = Image.fromarray(classes.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
            panels[name] = colour(image, np.asarray(small))
        stems[path.stem] += 1
        number = f"_{stems[path.stem]}" if stems[path.stem] > 1 else ""
        target = args.out / f"{path.stem}_segmented{number}.jpg"
        compose(panels).save(target, quality=92)
        print(f"{target} ({seconds:.1f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
