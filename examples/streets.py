"""Street scenes in CamVid's 11 classes: reading them, augmenting them, and scoring a model on them."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import find
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from mgfc import SegmentationHead

PALETTE = {
    "sky": (96, 165, 218),
    "building": (150, 98, 84),
    "pole": (245, 240, 225),
    "road": (116, 84, 138),
    "sidewalk": (232, 128, 190),
    "tree": (88, 148, 60),
    "sign": (250, 210, 40),
    "fence": (205, 170, 110),
    "car": (30, 60, 190),
    "pedestrian": (226, 40, 50),
    "bicyclist": (255, 130, 20),
}
CLASSES = tuple(PALETTE)
IGNORE = 255
Pair = tuple[Image.Image, Image.Image]
SIZE = (336, 448)  # (height, width) that whole images are given to a model at
SPOT = 20  # images of a spot check
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StreetScenes(Dataset[tuple[Image.Image, Image.Image]]):
    """Pairs of an RGB image and its label map, as PIL images.

    Args:
        root: holds `images/NAME.jpg` or `.png`, `labels/NAME.png` and `splits/SPLIT.txt`, one name a line; or the name of a
            data set that `data.find` finds, such as synth_town.
        split: which names.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = find(root)
        self.names = (self.root / "splits" / f"{split}.txt").read_text().split()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        name = self.names[index]
        path = self.root / "images" / f"{name}.jpg"
        with Image.open(path if path.exists() else path.with_suffix(".png")) as image:
            image = image.convert("RGB")
        with Image.open(self.root / "labels" / f"{name}.png") as label:
            label.load()
        return image, label


class TrainingCrops(Dataset[tuple[Tensor, Tensor]]):
    """A shuffled, augmented stream of scenes. Item i depends on the seed and i alone, so that runs can resume.

    Args:
        scenes: the pairs.
        size: (height, width) of the crops.
        seed: of the order and the augmentation.
        start: first item.
        stop: the item after the last.
    """

    def __init__(self, scenes: Sequence[Pair] | StreetScenes, size: tuple[int, int], seed: int, start: int, stop: int) -> None:
        self.scenes, self.size, self.seed = scenes, size, seed
        self.items = range(start, stop)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.crop(index)
        return normalise(image), torch.from_numpy(np.array(label)).long()

    def crop(self, index: int) -> Pair:
        """An item before normalisation."""
        item = self.items[index]
        epoch, position = divmod(item, len(self.scenes))
        order = list(range(len(self.scenes)))
        random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
        return augment(*self.scenes[order[position]], self.size, random.Random(f"{self.seed} item {item}"))


def augment(
    image: Image.Image, label: Image.Image, size: tuple[int, int], draw: random.Random
) -> tuple[Image.Image, Image.Image]:
    """Random scale, crop, flip, and modest changes of brightness, contrast and colour."""
    height, width = size
    scale = math.exp(draw.uniform(math.log(0.6), math.log(1.5)))
    scale = max(scale, height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = draw.randint(0, scaled[0] - width), draw.randint(0, scaled[1] - height)
    box = (left, top, left + width, top + height)
    image = image.resize(scaled, Image.Resampling.BILINEAR).crop(box)
    label = label.resize(scaled, Image.Resampling.NEAREST).crop(box)
    if draw.random() < 0.5:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    return jitter(image, draw), label


def jitter(image: Image.Image, draw: random.Random) -> Image.Image:
    """Modest changes of brightness, contrast and colour."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(draw.uniform(0.6, 1.4))
    return image


def photographed_anew(image: Image.Image, seed: int, index: int) -> Image.Image:
    """A whole image as calibration observes it: with brightness, contrast and colour changed as in training."""
    return jitter(image, random.Random(f"{seed} observed {index}"))


def observed(scenes: StreetScenes, count: int, size: tuple[int, int], seed: int) -> Iterator[Tensor]:
    """So many of the scenes in random order, photographed anew, at the size that `evaluate` gives a model: (1, 3, H, W)."""
    for index in random.Random(seed).sample(range(len(scenes)), min(count, len(scenes))):
        image = photographed_anew(scenes[index][0], seed, index)
        yield normalise(image.resize(size[::-1], Image.Resampling.BILINEAR)).unsqueeze(0)


def normalise(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """An RGB image as (3, H, W), with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@dataclass(frozen=True)
class Scores:
    """Intersection over union in percent, of the classes that the labels hold."""

    iou: dict[str, float]

    @property
    def miou(self) -> float:
        return sum(self.iou.values()) / len(self.iou)

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2f} | " + "  ".join(f"{name} {value:.1f}" for name, value in self.iou.items())


@torch.inference_mode()
def evaluate(model: nn.Module, scenes: Iterable[Pair], size: tuple[int, int] = SIZE, title: str = "") -> Scores:
    """Scores a model at the labels' own resolution.

    Args:
        model: (1, 3, H, W) -> (1, K, h, w) logits.
        scenes: what to score it on.
        size: (height, width) that images are resized to for the model.
        title: of the progress bar.
    """
    model.eval()
    device = next(model.parameters()).device
    num_classes = len(CLASSES)
    confusion = torch.zeros(num_classes**2, dtype=torch.long)
    for image, label in tqdm(scenes, desc=title, mininterval=5):
        pixels = normalise(image.resize(size[::-1], Image.Resampling.BILINEAR)).unsqueeze(0).to(device)
        logits = F.interpolate(model(pixels), size=label.size[::-1], mode="bilinear", align_corners=False)
        target = torch.from_numpy(np.array(label)).long()
        valid = target != IGNORE
        found = logits[0].max(dim=0).indices.cpu()  # several times as fast as argmax on a CPU
        confusion += torch.bincount(target[valid] * num_classes + found[valid], minlength=num_classes**2)
    table = confusion.view(num_classes, num_classes)
    union = table.sum(0) + table.sum(1) - table.diag()
    ious = 100 * table.diag() / union.clamp_min(1)
    present = table.sum(1) > 0
    return Scores({name: ious[k].item() for k, name in enumerate(CLASSES) if present[k]})


def score(model: nn.Module, places: Iterable[str]) -> dict[str, float]:
    """Scores a model on splits of data sets, given as ROOT:SPLIT, and prints what it found.

    Returns:
        mIoU in percent, as a model card names it: by "NAME/SPLIT mIoU".
    """
    metrics = {}
    for place in places:
        root, split = place.rsplit(":", 1)
        name = f"{Path(root).name}/{split}"
        scores = evaluate(model, StreetScenes(root, split), title=name)
        metrics[f"{name} mIoU"] = round(scores.miou, 2)
        print(f"{name}: {scores}")
    return metrics


def some(scenes: StreetScenes, count: int) -> list[Pair]:
    """So many of the scenes, spread evenly over them."""
    return [scenes[index * len(scenes) // count] for index in range(min(count, len(scenes)))]


def spot(model: nn.Module, place: str) -> dict[str, float]:
    """A figure on a few scenes, which shows later that a loaded adapter is the one that was saved."""
    few = some(StreetScenes(*place.rsplit(":", 1)), SPOT)
    return {f"mIoU on {SPOT} validation images": round(evaluate(model, few, title="a few again").miou, 2)}


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes what a run goes on from; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def save_bare_head(head: SegmentationHead, directory: str | Path, training: dict[str, Any]) -> None:
    """Writes a head trained without calibrators; one trained with them goes into `save_pretrained(head=...)`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"head": {"class": type(head).__name__, "arguments": head.arguments}, "training": training}
    save_file(head.state_dict(), directory / "head.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_bare_head(directory: str | Path) -> SegmentationHead:
    """Reads what `save_bare_head` wrote."""
    config = json.loads((Path(directory) / "config.json").read_text())
    head = SegmentationHead(**config["head"]["arguments"])
    head.load_state_dict(load_file(Path(directory) / "head.safetensors"))
    return head
