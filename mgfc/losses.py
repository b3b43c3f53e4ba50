"""The hierarchical losses, one per granularity. Labels may have any resolution. Source: `docs/method.md`, "Losses"."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mgfc.errors import LabelError

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_labels(labels: Tensor, batch: int, num_classes: int, ignore_index: int) -> None:
    """Raises `LabelError` unless labels are (batch, H, W) integers in [0, num_classes) or `ignore_index`."""
    if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.shape[0] != batch:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise LabelError(
            f"Labels: expected shape ({batch}, H, W), one class id a pixel for each image of the last forward, found {found}."
        )
    if labels.dtype not in _INTEGERS:
        raise LabelError(f"Labels: expected integers, found {labels.dtype}. Convert them, e.g. labels.long().")
    # In a narrow dtype an ignore_index out of its range would wrap to another id.
    valid = labels[labels.long() != ignore_index]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < num_classes:
        raise LabelError(
            f"Labels: expected class ids from 0 to {num_classes - 1} or ignore_index={ignore_index}, "
            f"found {int(valid.min())} to {int(valid.max())}. Set num_classes or ignore_index to what the labels hold."
        )


def label_mix(labels: Tensor, grid: tuple[int, int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """The share of each class in each patch.

    Args:
        labels: (B, H, W) class ids.
        grid: (h, w) in patches.
        num_classes: K.
        ignore_index: id of pixels that do not count.

    Returns:
        (B, h*w, K); rows sum to 1, or to 0 where no pixel counts.
    """
    labels = labels.long()
    valid = labels != ignore_index
    # One class at a time: a one-hot map of all of them would be large at label resolution.
    shares = [F.adaptive_avg_pool2d(((labels == k) & valid).float().unsqueeze(1), grid) for k in range(num_classes)]
    counts = torch.cat(shares, dim=1).flatten(2).mT
    return counts / counts.sum(dim=-1, keepdim=True).clamp_min(1e-6)


def label_boundaries(labels: Tensor, grid: tuple[int, int], ignore_index: int = 255) -> Tensor:
    """Which patches hold a boundary between two classes: (B, H, W) -> (B, h*w) of 0 or 1."""
    edges = torch.zeros(labels.shape, device=labels.device)
    labels = labels.long()
    for dim in (1, 2):
        size = labels.shape[dim] - 1
        first, second = labels.narrow(dim, 0, size), labels.narrow(dim, 1, size)
        differ = (first != second) & (first != ignore_index) & (second != ignore_index)
        edges.narrow(dim, 0, size).masked_fill_(differ, 1.0)
    return F.adaptive_max_pool2d(edges.unsqueeze(1), grid).flatten(1)


def coarse_loss(presence: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Which categories the scene holds, as a multi-label problem.

    Args:
        presence: (..., B, K) logits.
        labels: (B, H, W) class ids.
        ignore_index: id of pixels that do not count.

    Returns:
        Scalar: mean binary cross-entropy.
    """
    target = torch.zeros(presence.shape[-2:], device=presence.device)
    for image, ids in enumerate(labels.long()):
        target[image, ids[ids != ignore_index].unique()] = 1.0
    return F.binary_cross_entropy_with_logits(presence.float(), target.expand_as(presence))


def medium_loss(category: Tensor, mix: Tensor) -> Tensor:
    """Soft cross-entropy of what the assignment says against each patch's label mix.

    Args:
        category: (B, N, K) logits.
        mix: (B, N, K) as from `label_mix`; rows of zeros do not count.

    Returns:
        Scalar: mean cross-entropy.
    """
    return -(mix * category.float().log_softmax(dim=-1)).sum() / mix.sum().clamp_min(1.0)


def fine_loss(boundary: Tensor, target: Tensor) -> Tensor:
    """Where detail is let through against where the labels have boundaries, both kinds of patches weighing the same.

    Args:
        boundary: (B, N) logits.
        target: (B, N) of 0 or 1, as from `label_boundaries`.

    Returns:
        Scalar: balanced binary cross-entropy.
    """
    share = target.mean().clamp(1e-3, 1 - 1e-3)
    weight = torch.where(target > 0, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(boundary.float(), target, weight)
