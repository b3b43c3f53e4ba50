"""Scores a model on scenes: batches of images of one size, each image by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from streets import MEAN, STD
from torch import Tensor, nn
from torch.nn import functional as F

from domain_generalization.inputs import Control
from domain_generalization.metrics import Boundaries, Confusion, Scatter, patch_classes
from domain_generalization.scenes import Scenes


@dataclass(frozen=True)
class Score:
    """Of one model on one target.

    Args:
        iou: of each class that the labels hold, in percent.
        boundary: F-score of the boundaries, in percent.
        scatter: between- over within-category scatter of the last block's tokens.
        seconds: of the model, an image.
        control_seconds: of the input control, an image.
    """

    iou: dict[str, float]
    boundary: float
    scatter: float
    seconds: float
    control_seconds: float


@cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, made once: a copy to a GPU would wait for it."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def normalise(pixels: Tensor) -> Tensor:
    """(B, H, W, 3), from 0 to 255 -> (B, 3, H, W), with ImageNet's mean and standard deviation."""
    mean, std = imagenet(pixels.device)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def score(model: nn.Sequential, scenes: Scenes, control: Control | None = None) -> Score:
    """Scores at the labels' own resolution.

    Args:
        model: feature maps, then a head: (B, 3, H, W) -> (B, K, h, w) logits.
        scenes: what to score it on.
        control: what is done to each image before.
    """
    model.eval()
    device = next(model.parameters()).device
    batch_size = 32 if device.type == "cuda" else 4
    confusion, boundaries, scatter = Confusion(device), Boundaries(device), None
    controlled, start = 0.0, time.perf_counter()
    for first in range(0, len(scenes), batch_size):
        images = scenes.images[first : first + batch_size]
        if control is not None:
            begin = time.perf_counter()
            images = np.stack([control(image) for image in images])
            controlled += time.perf_counter() - begin
        labels = torch.from_numpy(scenes.labels[first : first + batch_size]).to(device)
        features, head = model
        maps = features(normalise(torch.from_numpy(images).to(device)))
        logits = F.interpolate(head(maps), size=labels.shape[1:], mode="bilinear", align_corners=False)
        found = logits.max(dim=1).indices  # several times as fast as argmax on a CPU
        confusion.add(found, labels)
        boundaries.add(found, labels)
        scatter = scatter or Scatter(maps[-1].shape[1], device)
        scatter.add(maps[-1], patch_classes(labels, tuple(maps[-1].shape[2:])))
    iou = confusion.iou()
    seconds = (time.perf_counter() - start - controlled) / len(scenes)
    assert scatter is not None
    return Score(iou, boundaries.f_score(), scatter.ratio(), seconds, controlled / len(scenes))
