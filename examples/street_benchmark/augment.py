"""Crops of training: another size, a crop that no class fills, a flip, and photometric distortion.

The pipeline that Rein and SoMA configure, with the parameters of mmsegmentation's transforms of these names
(`RandomChoiceResize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion`). Images are (H, W, 3) uint8 RGB, labels (H, W).
"""

from __future__ import annotations

import random

import cv2
import numpy as np
from numpy.typing import NDArray
from streets import IGNORE

Pixels = NDArray[np.uint8]
LONGEST = 4  # times the crop
MOST_OF_ONE_CLASS, TRIES = 0.75, 10


def resized(image: Pixels, label: Pixels, crop: int, draw: random.Random) -> tuple[Pixels, Pixels]:
    """Another size: the short side is 0.5, 0.6, ... or 2 times the crop."""
    height, width = label.shape
    short = int(crop * draw.randrange(5, 21) * 0.1)
    factor = min(short / min(height, width), LONGEST * crop / max(height, width))
    size = round(width * factor), round(height * factor)
    larger = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
    return larger, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


def cropped(image: Pixels, label: Pixels, crop: int, draw: random.Random) -> tuple[Pixels, Pixels]:
    """A crop in which no class has more than 75 % of the labelled pixels, if one of ten has that."""
    height, width = label.shape
    for _ in range(TRIES):
        top, left = draw.randint(0, max(0, height - crop)), draw.randint(0, max(0, width - crop))
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        counts = np.bincount(label[rows, columns].ravel(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < MOST_OF_ONE_CLASS:
            break
    return image[rows, columns], label[rows, columns]


def distorted(image: Pixels, draw: random.Random) -> Pixels:
    """Photometric distortion: brightness, contrast, saturation and hue, each with a probability of one half."""
    if draw.random() < 0.5:
        image = _scaled(image, 1, draw.uniform(-32, 32))
    contrast_first = draw.random() < 0.5
    if contrast_first and draw.random() < 0.5:
        image = _scaled(image, draw.uniform(0.5, 1.5))
    saturation = draw.uniform(0.5, 1.5) if draw.random() < 0.5 else None
    hue = draw.randrange(-18, 18) if draw.random() < 0.5 else None
    if saturation is not None or hue is not None:
        values = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.uint8, copy=False)
        if saturation is not None:
            values[..., 1] = _scaled(values[..., 1], saturation)
        if hue is not None:
            values[..., 0] = (values[..., 0].astype(int) + hue) % 180
        image = cv2.cvtColor(values, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)
    if not contrast_first and draw.random() < 0.5:
        image = _scaled(image, draw.uniform(0.5, 1.5))
    return image


def _scaled(values: Pixels, factor: float, offset: float = 0) -> Pixels:
    scaled: Pixels = np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
    return scaled


def augmented(image: Pixels, label: Pixels, crop: int, draw: random.Random) -> tuple[Pixels, Pixels]:
    """All of it; what is smaller than a crop stays so."""
    image, label = cropped(*resized(image, label, crop, draw), crop, draw)
    if draw.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    return distorted(np.ascontiguousarray(image), draw), np.ascontiguousarray(label)
