"""The stream of crops that a run trains on, and whole images for calibration: an item depends on seed and number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from data import find
from streets import IGNORE, StreetScenes, normalise
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from street_benchmark.augment import TRIES, augmented, distorted
from street_benchmark.experiments import EXPERIMENTS, SIZES, fitted
from street_benchmark.processes import first_process_first, rank, world
from street_benchmark.sampling import FEW_PIXELS, RareClasses, Uniform, class_counts
from street_benchmark.settings import Settings


def sources(settings: Settings, data: Path | None) -> list[StreetScenes]:
    """The scenes that an experiment trains on."""
    return [StreetScenes(find(name, data), "train") for name in EXPERIMENTS[settings.experiment].sources]


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Items of training: normalised images (3, H, W), padded with 0 to a crop's size, and labels, padded with 255.

    Args:
        settings: of the run.
        scenes: of each source.
        cache: a folder for what rare-class sampling counts.
    """

    def __init__(self, settings: Settings, scenes: list[StreetScenes], cache: Path) -> None:
        self.settings = settings
        self.scenes: ConcatDataset[tuple[object, object]] = ConcatDataset(scenes)
        if settings.sampling == "uniform":
            self.sampler: Uniform | RareClasses = Uniform(len(self.scenes), settings.seed)
        else:
            with first_process_first():
                counts = [class_counts(each, cache / f"{each.root.name}.npy") for each in scenes]
            self.sampler = RareClasses(np.concatenate(counts), settings.seed)

    def __len__(self) -> int:
        return self.settings.steps * self.settings.batch_size

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        index, wanted = self.sampler.choose(item)
        image, label = (np.asarray(part) for part in self.scenes[index])
        crop = self.settings.crop
        for attempt in range(TRIES):
            draw = random.Random(f"{self.settings.seed} item {item} {attempt}")
            found = augmented(image, label, crop, draw)
            if wanted is None or (found[1] == wanted).sum() > FEW_PIXELS:
                break
        pixels, classes = normalise(found[0]), torch.from_numpy(found[1]).long()
        missing = (0, crop - classes.shape[1], 0, crop - classes.shape[0])
        return torch.nn.functional.pad(pixels, missing), torch.nn.functional.pad(classes, missing, value=IGNORE)


def batches(crops: Crops, start: int, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's part of each batch from a step on."""
    size, part = crops.settings.batch_size, crops.settings.batch_size // world()
    first = rank() * part
    items = [list(range(step * size + first, step * size + first + part)) for step in range(start, crops.settings.steps)]
    return DataLoader(
        crops, batch_sampler=items, num_workers=workers, pin_memory=torch.cuda.is_available(), worker_init_fn=_one_thread
    )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def observed(settings: Settings, scenes: list[StreetScenes]) -> Iterator[Tensor]:
    """This process's share of whole source images, in random order, distorted as in training, at the size of scoring.

    All processes have the same number of them. Each is (1, 3, H, W), with sides that are multiples of the patch.
    """
    places = [(each, index) for each in scenes for index in range(len(each))]
    count = min(settings.observe, len(places)) // world() * world()
    for number, (each, index) in list(enumerate(random.Random(settings.seed).sample(places, count)))[rank() :: world()]:
        image = np.asarray(each[index][0])
        width, height = fitted((image.shape[1], image.shape[0]), SIZES["full"].get(each.root.name))
        width, height = (max(1, round(length / settings.patch)) * settings.patch for length in (width, height))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        yield normalise(distorted(image, random.Random(f"{settings.seed} observed {number}"))).unsqueeze(0)
