"""How well a model segments: IoU, boundaries, and how far apart the categories' tokens lie. Sums on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from streets import CLASSES, IGNORE
from torch import Tensor
from torch.nn import functional as F

K = len(CLASSES)
TOLERANCE = 3  # pixels


class Confusion:
    """Intersection over union of classes, in percent.

    Args:
        device: where it is summed up.
        classes: their names.
    """

    def __init__(self, device: torch.device, classes: Sequence[str] = CLASSES) -> None:
        self.classes = classes
        number = len(classes)
        self.counts = torch.zeros((number + 1) * number, dtype=torch.long, device=device)

    def add(self, found: Tensor, labels: Tensor) -> None:
        """Class ids, both (B, H, W); pixels to ignore go to a row of their own, so that nothing waits for their number."""
        number = len(self.classes)
        rows = labels.long().clamp_max(number)
        self.counts += torch.bincount((rows * number + found).flatten(), minlength=(number + 1) * number)

    def iou(self, *, found: bool = False) -> dict[str, float]:
        """Of each class that the labels hold; with `found`, also 0 for one that was found and that they do not hold."""
        number = len(self.classes)
        table = self.counts.view(number + 1, number)[:number].double().cpu()
        union = table.sum(0) + table.sum(1) - table.diag()
        counted, ious = (union if found else table.sum(1)) > 0, 100 * table.diag() / union.clamp_min(1)
        return {name: ious[k].item() for k, name in enumerate(self.classes) if counted[k]}


class Boundaries:
    """F-score of class boundaries within `TOLERANCE` pixels, the mean over the classes that the labels hold, in percent.

    A boundary pixel of class k has a neighbour of another class; it is right if the other map has one of class k in the
    square of 7 x 7 around it. Nothing is counted where that square meets pixels to ignore.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, 2, K + 1, dtype=torch.long, device=device)  # of found, labels: right, all

    def add(self, found: Tensor, labels: Tensor) -> None:
        """Class ids, both (B, H, W)."""
        counted = dilate((labels == IGNORE).short()) == 0
        edges = boundary(found.short()), boundary(labels.short())
        for side, (own, other) in enumerate((edges, edges[::-1])):
            classes = torch.where(counted & (own > 0), own, 1 << K)
            right = (dilate(other) & classes) > 0
            index = classes.float().log2().round().long()  # one bit is set
            self.counts[side, 1] += torch.bincount(index.flatten(), minlength=K + 1)
            self.counts[side, 0] += torch.bincount(torch.where(right, index, K).flatten(), minlength=K + 1)

    def f_score(self) -> float:
        (found, all_found), (labels, all_labels) = self.counts[..., :K].double().cpu()
        precision, recall = found / all_found.clamp_min(1), labels / all_labels.clamp_min(1)
        scores = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
        held = all_labels > 0
        return 100 * scores[held].mean().item() if held.any() else float("nan")


def boundary(classes: Tensor) -> Tensor:
    """Bit k where a pixel of class k has one of another class above, below, left or right: (B, H, W) -> (B, H, W)."""
    down, across = classes[:, 1:] != classes[:, :-1], classes[:, :, 1:] != classes[:, :, :-1]
    differs = F.pad(down, (0, 0, 1, 0)) | F.pad(down, (0, 0, 0, 1)) | F.pad(across, (1, 0)) | F.pad(across, (0, 1))
    bits = torch.ones_like(classes) << classes.clamp_max(K)
    return torch.where(differs & (classes < K), bits, 0)


def dilate(bits: Tensor, by: int = TOLERANCE) -> Tensor:
    """The bits of the square around each pixel: (B, H, W) -> (B, H, W)."""
    for axis in (1, 2):
        grown = bits.clone()
        length = bits.shape[axis]
        for shift in range(1, min(by, length - 1) + 1):
            near, far = bits.narrow(axis, 0, length - shift), bits.narrow(axis, shift, length - shift)
            grown.narrow(axis, shift, length - shift).bitwise_or_(near)
            grown.narrow(axis, 0, length - shift).bitwise_or_(far)
        bits = grown
    return bits


class Scatter:
    """Ratio of between- to within-category scatter of patch tokens, each normalised over its channels.

    A patch belongs to the class that most of its pixels have, if half of them have labels.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(K + 1, dim, dtype=torch.double, device=device)
        self.squares = torch.zeros(K + 1, dtype=torch.double, device=device)
        self.counts = torch.zeros(K + 1, dtype=torch.double, device=device)

    def add(self, maps: Tensor, classes: Tensor) -> None:
        """Maps (B, C, h, w) and the patches' classes (B, h, w), as `patch_classes` finds them."""
        tokens = F.layer_norm(maps.permute(0, 2, 3, 1).flatten(0, 2), maps.shape[1:2]).double()
        index = classes.flatten().long()
        self.sums.index_add_(0, index, tokens)
        self.squares.index_add_(0, index, tokens.square().sum(dim=1))
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=torch.double))

    def ratio(self) -> float:
        sums, squares, counts = (value[:K].cpu() for value in (self.sums, self.squares, self.counts))
        means = sums / counts.clamp_min(1).unsqueeze(1)
        middle = sums.sum(dim=0) / counts.sum().clamp_min(1)
        between = (counts * (means - middle).square().sum(dim=1)).sum()
        within = squares.sum() - (counts * means.square().sum(dim=1)).sum()
        return (between / within.clamp_min(1e-9)).item()


def patch_classes(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The class of each patch, K where there is none: (B, H, W) -> (B, h, w)."""
    shares = torch.stack([F.interpolate((labels == k).float().unsqueeze(1), grid, mode="area") for k in range(K)])
    most, index = shares.squeeze(2).max(dim=0)
    return torch.where((most > 0) & (shares.sum(dim=0).squeeze(1) >= 0.5), index, K)
