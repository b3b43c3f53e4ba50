"""The stream of training crops of a source and a seed, made once and shared by all methods."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from streets import TrainingCrops
from torch import Tensor
from torch.utils.data import DataLoader

from domain_generalization.domains import SOURCES
from domain_generalization.scenes import read_training
from domain_generalization.scoring import normalise

LARGEST = 2**30  # bytes of a stream that is kept


@dataclass(frozen=True)
class Stream:
    """What a run trains on; two runs with equal streams see the same crops in the same order.

    Args:
        source: a name in `SOURCES`.
        seed: of the order and the augmentation.
        steps: batches.
        batch_size: crops in each.
        crop: (height, width) of a crop.
        size: (height, width) of the images that they are cut from.
    """

    source: str
    seed: int
    steps: int
    batch_size: int
    crop: tuple[int, int]
    size: tuple[int, int]

    @property
    def kept(self) -> bool:
        """Whether it is small enough to be kept in a file."""
        return 4 * math.prod(self.crop) * self.steps * self.batch_size <= LARGEST

    def open(self, packed: Path, start: int) -> TrainingCrops:
        """The crops from a step on."""
        scenes = read_training(packed, SOURCES[self.source].train, self.size).pairs()
        items = start * self.batch_size, self.steps * self.batch_size
        return TrainingCrops(scenes, self.crop, self.seed, *items)

    def file(self, cache: Path, packed: Path) -> Path:
        """Where it is kept: (items, height, width, 4), the image and its labels."""
        return cache / f"{hashlib.sha256(f'{self} {packed.resolve()}'.encode()).hexdigest()[:16]}.npy"


def prepare(stream: Stream, cache: Path, packed: Path) -> None:
    """Makes the file of a stream, if it is one to keep and not there."""
    path = stream.file(cache, packed)
    if not stream.kept or path.exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    crops = stream.open(packed, 0)
    part = path.with_suffix(f".{os.getpid()}.part")
    kept = open_memmap(part, "w+", np.uint8, (len(crops), *stream.crop, 4))
    for index in range(len(crops)):
        image, label = crops.crop(index)
        kept[index, ..., :3], kept[index, ..., 3] = image, label
    kept.flush()
    os.replace(part, path)


def batches(stream: Stream, cache: Path, packed: Path, start: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised crops (B, 3, H, W) and labels (B, H, W), from a step on."""
    if not stream.kept:
        # Made beside the training, by processes that a GPU leaves idle.
        workers = 3 if device.type == "cuda" else 0
        for images, labels in DataLoader(stream.open(packed, start), stream.batch_size, num_workers=workers):
            yield images.to(device), labels.to(device)
        return
    prepare(stream, cache, packed)
    kept = np.load(stream.file(cache, packed), mmap_mode="c")
    pixels = torch.from_numpy(kept)
    if device.type == "cuda":
        pixels = pixels.to(device)
    for step in range(start, stream.steps):
        batch = pixels[step * stream.batch_size : (step + 1) * stream.batch_size].to(device)
        yield normalise(batch[..., :3]), batch[..., 3].long()
