"""Sliding windows: scores of an image of any size from a model that sees windows of one size."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from street_benchmark.model import Segmenter

OVERLAP = 2 / 3  # of a window's side from one window to the next: 512 and 341, as published


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side; the last one ends with it."""
    count = max(0, math.ceil((length - window) / stride)) + 1
    return [min(index * stride, length - window) for index in range(count)]


@torch.inference_mode()
def slide(model: Segmenter, image: Tensor, window: int, batch_size: int = 8) -> Tensor:
    """Scores of each class, (1, K, H, W), as means over the windows that hold a pixel.

    Within `calibration.scene` windows are calibrated by the statistics of the whole image.

    Args:
        model: in eval mode.
        image: (1, 3, H, W), normalised; one smaller than a window is padded with 0.
        window: height and width of windows.
        batch_size: windows in a forward.
    """
    height, width = image.shape[2:]
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    stride = int(window * OVERLAP)
    rows, columns = (starts(length, window, stride) for length in padded.shape[2:])
    places = [(slice(top, top + window), slice(left, left + window)) for top in rows for left in columns]
    total, counts = None, padded.new_zeros(padded.shape[2:])
    with nullcontext() if model.calibration is None else model.calibration.scene(image):
        for first in range(0, len(places), batch_size):
            chosen = places[first : first + batch_size]
            scores = model(torch.cat([padded[:, :, row, column] for row, column in chosen]))
            total = scores.new_zeros(1, scores.shape[1], *padded.shape[2:]) if total is None else total
            for (row, column), found in zip(chosen, scores, strict=True):
                total[0, :, row, column] += found
                counts[row, column] += 1
    assert total is not None
    mean: Tensor = total / counts
    return mean[:, :, :height, :width]
