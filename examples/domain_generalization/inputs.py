"""What anyone could do to an image before the model: standardise it, match its histogram to the source's, CLAHE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.exposure import match_histograms

from domain_generalization.domains import Target
from domain_generalization.scenes import Pixels, read

Image = NDArray[Any]  # (H, W, 3), 0 to 255


class Standardise:
    """Brings the mean and standard deviation of an image's channels to the source's: the averages of its images' own."""

    def __init__(self, source: Pixels) -> None:
        pixels = source.reshape(len(source), -1, 3)
        self.mean = np.mean([image.mean(axis=0) for image in pixels], axis=0, dtype=np.float32)
        self.std = np.mean([image.std(axis=0) for image in pixels], axis=0, dtype=np.float32)

    def __call__(self, image: Image) -> Image:
        mean, std = cv2.meanStdDev(image)
        stretch = self.std / np.maximum(std[:, 0].astype(np.float32), 1e-3)
        return image * stretch + (self.mean - mean[:, 0].astype(np.float32) * stretch)


class MatchHistogram:
    """Scikit-image's histogram matching, to the source's histogram: the mean of its images' quantile functions."""

    def __init__(self, source: Pixels, levels: int = 1024) -> None:
        at = np.linspace(0, 1, levels)
        quantiles = [np.quantile(image.reshape(-1, 3), at, axis=0) for image in source]
        self.reference = np.mean(quantiles, axis=0).round().astype(np.uint8).reshape(levels, 1, 3)

    def __call__(self, image: Image) -> Image:
        return np.asarray(match_histograms(image, self.reference, channel_axis=-1))


class Clahe:
    """OpenCV's contrast-limited adaptive histogram equalisation of the lightness."""

    def __call__(self, image: Image) -> Image:
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
        lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(lab[..., 0])
        return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


Control = Callable[[Image], Image]
CONTROLS = ("input standardised", "histogram matching", "CLAHE")
SOURCE_IMAGES = 100


@cache
def control(name: str, packed: Path, place: str, height: int) -> Control:
    """A control by its name in `CONTROLS`, with the statistics of the images of a source's training set."""
    if name == "CLAHE":
        return Clahe()
    images = read(packed, Target(place), height).some(SOURCE_IMAGES).images
    return Standardise(images) if name == "input standardised" else MatchHistogram(images)
