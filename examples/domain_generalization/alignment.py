"""Test-time alignment of others: feature statistics towards the source's, and class-conditional alignment.

Both need one pass over images of the source and no gradient. Written from the papers' descriptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from domain_generalization.metrics import K, patch_classes
from domain_generalization.scenes import Scenes
from domain_generalization.scoring import normalise

BLOCKS = (1, 2, 3)  # early blocks hold what is known as style
ALPHA = 0.5  # share of the source's statistics
BATCH = 4


def batches(scenes: Scenes, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels."""
    for first in range(0, len(scenes), BATCH):
        part = slice(first, first + BATCH)
        yield normalise(torch.from_numpy(scenes.images[part]).to(device)), torch.from_numpy(scenes.labels[part]).to(device)


def statistics(tokens: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over an image's tokens: (B, N, C) -> (2, B, 1, C)."""
    return torch.stack([tokens.mean(dim=1, keepdim=True), tokens.std(dim=1, keepdim=True, correction=0)])


class FeatureStatistics:
    """Brings channel means and standard deviations of patch tokens towards the source's, at the entrance of early blocks.

    The statistics are mixed as in alpha-BN (You et al., arXiv 2110.04065), alpha of the source's and 1 - alpha of the
    image's, and given to the tokens as in AdaIN (Huang and Belongie, ICCV 2017). There is one class token in front.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.sums: dict[int, Tensor] = {}
        self.count = 0
        self.observing = False
        # Before the hooks of prompts, which come after the patches.
        self.handles = [
            blocks[index].register_forward_pre_hook(lambda _, args, index=index: self.enter(index, *args), prepend=True)
            for index in BLOCKS
        ]

    def enter(self, index: int, tokens: Tensor, *others: object) -> tuple[object, ...] | None:
        prefix, patches = tokens[:, :1], tokens[:, 1:]
        found = statistics(patches)
        if self.observing:
            self.sums[index] = self.sums.get(index, 0) + found.sum(dim=1, keepdim=True)
            return None
        mixed = torch.lerp(found, self.sums[index] / self.count, ALPHA)
        aligned = (patches - found[0]) / found[1].clamp_min(1e-5) * mixed[1] + mixed[0]
        return torch.cat([prefix, aligned], dim=1), *others


@contextmanager
def aligned_statistics(model: nn.Sequential, source: Scenes) -> Iterator[nn.Sequential]:
    """Within it, the model's tokens are aligned with the source's."""
    backbone: Any = model[0].backbone
    alignment = FeatureStatistics(backbone.encoder.layer)
    try:
        alignment.observing = True
        with torch.inference_mode():
            for images, _ in batches(source, next(model.parameters()).device):
                model[0](images)
                alignment.count += len(images)
        alignment.observing = False
        yield model
    finally:
        for handle in alignment.handles:
            handle.remove()


class ClassConditionalHead(nn.Module):
    """A head whose last map is moved, class by class, to where the source's tokens of that class are, and read again.

    CFA's alignment (Kojima et al., IJCAI 2022) as far as it goes without gradients and for one image: the classes are the
    model's own predictions, and each class's mean goes to the source's instead of a step of an optimiser.

    Args:
        head: a segmentation head.
        means: (K + 1, C), the source's mean token of each class, and a row for none.
        held: (K + 1,), whether the source has the class.
    """

    means: Tensor
    held: Tensor

    def __init__(self, head: nn.Module, means: Tensor, held: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("means", means)
        self.register_buffer("held", held)

    def forward(self, maps: list[Tensor]) -> Tensor:
        grid = maps[-1].shape[2:]
        classes = F.interpolate(self.head(maps), size=grid, mode="bilinear", align_corners=False).argmax(dim=1)
        member = F.one_hot(classes.flatten(1), K + 1).to(maps[-1].dtype)  # (B, N, K + 1)
        tokens = maps[-1].flatten(2).mT
        found = member.mT @ tokens / member.sum(dim=1).clamp_min(1).unsqueeze(2)
        away = (self.means - found) * self.held.unsqueeze(1)
        moved = tokens + ALPHA * member @ away
        logits: Tensor = self.head([*maps[:-1], moved.mT.unflatten(2, grid)])
        return logits


@torch.inference_mode()
def aligned_classes(model: nn.Sequential, source: Scenes) -> nn.Sequential:
    """The model's features, and a head that aligns the classes of an image with the source's."""
    device = next(model.parameters()).device
    sums, counts = torch.zeros((), device=device), torch.zeros((), device=device)
    for images, labels in batches(source, device):
        last = model[0](images)[-1]
        member = F.one_hot(patch_classes(labels, tuple(last.shape[2:])).flatten(), K + 1).to(last.dtype)
        sums = sums + member.T @ last.permute(0, 2, 3, 1).flatten(0, 2)
        counts = counts + member.sum(dim=0)
    held = (counts > 0) & (torch.arange(K + 1, device=counts.device) < K)
    return nn.Sequential(model[0], ClassConditionalHead(model[1], sums / counts.clamp_min(1).unsqueeze(1), held))
