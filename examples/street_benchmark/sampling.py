"""Which scene an item of training is: all in turn, or those with rare classes more often."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from data import write_atomically
from data.classes import CITYSCAPES
from numpy.typing import NDArray
from streets import StreetScenes
from tqdm import tqdm

# DAFormer (arXiv 2111.14887, Section 3.2), with the values of its configurations.
TEMPERATURE, PIXELS, SHARE_OF_A_CROP = 0.01, 3000, 0.5
FEW_PIXELS = PIXELS * SHARE_OF_A_CROP
"""A crop of an image that was drawn for a class should hold more than so many pixels of it."""


class Uniform:
    """Every scene once an epoch, in random order.

    Args:
        count: scenes.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def choose(self, item: int) -> tuple[int, int | None]:
        """Scene of an item, and the class that it was chosen for: none."""
        epoch, position = divmod(item, self.count)
        return _shuffled(self.count, f"{self.seed} epoch {epoch}")[position], None


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


class RareClasses:
    """Rare-class sampling of DAFormer (arXiv 2111.14887): a class is drawn, then a scene that holds it.

    With f_c, the share of class c in the labelled pixels of all scenes, class c is drawn with the probability
    softmax((1 - f_c) / T), T = 0.01, over the classes that occur; then one of the scenes with more than 3000 pixels of it.

    Args:
        counts: pixels of each class in each scene, (N, K).
        seed: of the draws.

    Raises:
        ValueError: if no scene has more than 3000 pixels of any class.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int) -> None:
        self.seed = seed
        self.scenes = {c: np.flatnonzero(counts[:, c] > PIXELS) for c in range(counts.shape[1])}
        self.classes = [c for c, found in self.scenes.items() if len(found)]
        if not self.classes:
            raise ValueError(f"Rare-class sampling: expected scenes with more than {PIXELS} pixels of a class, found none.")
        totals = counts.sum(axis=0)[self.classes]
        logits = (1 - totals / totals.sum()) / TEMPERATURE
        weights = np.exp(logits - logits.max())
        self.probabilities = weights / weights.sum()

    def choose(self, item: int) -> tuple[int, int | None]:
        """Scene of an item, and the class that it was chosen for."""
        draw = random.Random(f"{self.seed} rare {item}")
        index = draw.choices(self.classes, self.probabilities.tolist())[0]
        return int(draw.choice(self.scenes[index])), index


def class_counts(scenes: StreetScenes, cache: Path) -> NDArray[np.int64]:
    """Pixels of each class in each scene, (N, K), counted once and kept in a file.

    Raises:
        ValueError: if the file is of other scenes.
    """
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            title = f"counting classes in {scenes.root.name}"
            rows = list(tqdm(pool.map(lambda index: _counts(scenes, index), range(len(scenes))), title, total=len(scenes)))
        content = BytesIO()
        np.save(content, np.stack(rows))
        write_atomically(cache, content.getvalue())
    counts: NDArray[np.int64] = np.load(cache, allow_pickle=False)
    if counts.shape != (len(scenes), len(CITYSCAPES)):
        raise ValueError(f"{cache}: expected counts of {len(scenes)} scenes, found {counts.shape}. Delete the file.")
    return counts


def _counts(scenes: StreetScenes, index: int) -> NDArray[np.int64]:
    return np.bincount(np.asarray(scenes[index][1]).ravel(), minlength=256)[: len(CITYSCAPES)]
