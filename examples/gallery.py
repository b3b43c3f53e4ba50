"""Makes the pictures of `docs/pictures.md` and the table in it: what calibration does to the sample images.

python examples/gallery.py
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from backbone import load_dinov2_small
from domain_generalization.corruptions import corrupt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from segment import COLOURS
from streets import CLASSES, IGNORE, StreetScenes, normalise
from torch import Tensor, nn

from mgfc import FeatureMaps, load_head, viz, wrap_backbone
from mgfc.viz.files import model_size, read_image
from mgfc.viz.pictures import class_colours

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
STRENGTH, SEED = 2, 0  # the strongest of three, as in the benchmark
SHORTER, PATCH = 336, (14, 14)
CONDITIONS = (None, "fog", "night")
SHEETS = (("town_0451", "fog"), ("trier_basilica_parked_cars", "night"), ("rome_colosseum_street", None))
HOME = ("town_0451", "fog")
INK = "#26262b"


class Gallery:
    """The adapter of this directory, its backbone and its head."""

    def __init__(self, backbone: Path | None) -> None:
        self.vit: nn.Module = wrap_backbone(load_dinov2_small(backbone), HERE / "adapter")
        self.model = nn.Sequential(FeatureMaps(self.vit, (2, 5, 8, 11)), load_head(HERE / "adapter")).eval()

    def record(self, name: str, kind: str | None) -> viz.Record:
        image = read_image(HERE / "images" / f"{name}.jpg")
        image = image if kind is None else corrupt(image, kind, STRENGTH, SEED)
        size = model_size(image.size, SHORTER, PATCH)
        pixels = normalise(image.resize(size, Image.Resampling.BILINEAR)).unsqueeze(0)
        (found,) = viz.record(self.vit, pixels, self.model)
        return found


def labels(name: str, size: tuple[int, int]) -> Tensor | None:
    """Of a rendered scene, at a size (height, width); None for a photograph."""
    if not name.startswith("town_"):
        return None
    scenes = StreetScenes("synth_town", "val")
    _, label = scenes[scenes.names.index(name)]
    return torch.from_numpy(np.array(label.resize(size[::-1], Image.Resampling.NEAREST))).long()


def right(record: viz.Record, name: str) -> list[float] | None:
    """Percent of the labelled pixels that the predictions without and with calibration get right."""
    height, width = record.picture.shape[:2]
    expected = labels(name, (height, width))
    if expected is None or record.prediction is None:
        return None
    valid = expected != IGNORE
    return [100 * (found[valid] == expected[valid]).float().mean().item() for found in record.prediction]


def row(name: str, kind: str | None, record: viz.Record) -> str:
    assert record.prediction is not None
    changed = 100 * (record.prediction[0] != record.prediction[1]).float().mean().item()
    scores = right(record, name)
    cells = [f"{changed:.1f}", *(["", ""] if scores is None else [f"{score:.1f}" for score in scores])]
    return " | ".join([f"| `{name}`", kind or "as it is", f"{record.distance:.1f}", *cells]) + " |"


def home(record: viz.Record, name: str, kind: str) -> Figure:
    """The image and both predictions in a row, and the classes below."""
    assert record.prediction is not None
    scores = right(record, name)
    shown = [class_colours(record.picture, classes, COLOURS) for classes in record.prediction]
    titles = [f"a rendered street, in drawn {kind}", "without calibration", "with mgfc's calibration"]
    if scores is not None:
        titles[1:] = [f"{title}: {score:.0f} % right" for title, score in zip(titles[1:], scores, strict=True)]
    figure = Figure(figsize=(15, 4.7), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for axes, title, picture in zip(figure.subplots(1, 3), titles, [record.picture, *shown], strict=True):
        axes.imshow(picture.numpy())
        axes.set_title(title, loc="left", fontsize=16, color=INK)
        axes.set_axis_off()
    present = sorted({int(index) for found in record.prediction for index in found.unique()})
    for index in present:
        figure.axes[0].plot([], [], "s", ms=13, color=tuple(COLOURS[index].tolist()), label=CLASSES[index])
    figure.legend(loc="outside lower left", ncols=len(present), frameon=False, fontsize=14, labelcolor=INK, handletextpad=0.2)
    return figure


def write(figure: Figure, path: Path, dpi: int) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").save(path, quality=84, method=6)
    print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size / 1000:.0f} kB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2-S (default: from the Hub)")
    gallery = Gallery(parser.parse_args(arguments).backbone)
    (DOCS / "images").mkdir(exist_ok=True)
    rows = [
        "| image | condition | distance | pixels changed, % | right without, % | right with, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted((HERE / "images").glob("*.jpg")):
        for kind in CONDITIONS:
            name, found = path.stem, gallery.record(path.stem, kind)
            rows.append(row(name, kind, found))
            if (name, kind) in SHEETS:
                title = f"{path.name}, " + ("as it is" if kind is None else f"with drawn {kind}")
                sheet = viz.plot_overview(found, title, CLASSES, COLOURS)
                write(sheet, DOCS / "images" / f"calibration_{name}_{kind or 'clean'}.webp", dpi=84)
            if (name, kind) == HOME:
                write(home(found, *HOME), DOCS / "images" / "home.webp", dpi=100)
    page = DOCS / "pictures.md"
    begin, end = "<!-- distances: begin -->", "<!-- distances: end -->"
    table = f"{begin}\n\n" + "\n".join(rows) + f"\n\n{end}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: table, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
