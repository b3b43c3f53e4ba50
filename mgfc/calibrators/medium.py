from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.running import RunningMean
from mgfc.distributed import process


class MediumCalib(nn.Module):
    """Category-level statistics: what looks alike in this image, drawn towards what it is like in the source domain.

    K prototypes P are running centroids of the source's patch tokens. With patch tokens X (N x C), assigned softly to
    them, and the centroids c of this image:

        A = softmax(cos(X - m, P - m') / tau);   q_k = mean of A_k over the patches;   c_k = mean of X under A_k
        X <- X + s A [q / (q + q0) (P - c)]

    m' is the mean of the source's tokens, and m lies half-way from it to this image's mean. Categories that fill less
    than about q0 of the image move little, since their centroids are uncertain. Unlike `CoarseCalib`, a scene with other
    shares of sky or road than usual is no reason for a shift. Nothing here fits the source by gradient. In training mode
    tokens pass unchanged, and the centroids take them in. A module that has seen no training batch is the identity. Cost
    is linear in N. Source: `docs/method.md`, "Medium".

    Args:
        dim: channels C of the tokens.
        num_prototypes: K.
        temperature: tau; smaller is harder.
        strength: s; 0 leaves a category as it is, 1 gives it the source's mean.

    Examples:
        >>> MediumCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    CERTAIN_SHARE = 0.025

    def __init__(self, dim: int, num_prototypes: int = 16, temperature: float = 0.05, strength: float = 0.2) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        self.temperature = temperature
        self.strength = strength
        # Of each prototype: the sum of its tokens over an image, and their number, both divided by N.
        self.source = RunningMean(num_prototypes, dim + 1)

    def prototypes(self) -> Tensor:
        """P: (K, C); zeros before the first training batch."""
        return _centroids(self.source.value)

    def similarity(self, tokens: Tensor) -> Tensor:
        """The logits of A: (B, N, C) -> (B, N, K)."""
        prototypes, mean = self.prototypes(), self.source.value[:, :-1].sum(dim=0)
        with torch.autocast(tokens.device.type, enabled=False):  # offsets are small differences of large numbers
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            middle = (mean + tokens.mean(dim=1, keepdim=True)) / 2
            directions = F.normalize(prototypes - mean, dim=-1)
            similarity: Tensor = F.normalize(tokens - middle, dim=-1) @ directions.to(tokens.dtype).mT / self.temperature
        return similarity

    def _assign(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A, and the sums of each image's tokens under it and their numbers, over N: (B, N, K), (B, K, C + 1)."""
        assignment = self.similarity(tokens).softmax(dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):
            sums = assignment.mT @ tokens.to(assignment.dtype) / tokens.shape[1]
        return assignment, torch.cat([sums, assignment.mean(dim=1).unsqueeze(-1)], dim=-1)

    def shift(self, tokens: Tensor) -> Tensor:
        """What calibration adds: (B, N, C) -> (B, N, C)."""
        assignment, sums = self._assign(tokens)
        share = sums[..., -1:]
        offset = share / (share + self.CERTAIN_SHARE) * (self.prototypes() - _centroids(sums))
        with torch.autocast(tokens.device.type, enabled=False):
            return self.source.ready * self.strength * (assignment @ offset.to(assignment.dtype))

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """In training mode, takes in the statistics of a batch: (B, N, C)."""
        sums = self._assign(tokens)[1].mean(dim=0)
        self.source.observe(torch.where(self.source.ready > 0, sums, self._first(tokens)))

    def _first(self, tokens: Tensor) -> Tensor:
        """Tokens at even distances in the first batch of all processes, as sums and shares of the first prototypes."""
        rank, size = process()
        tokens = tokens.flatten(0, 1)
        count = len(tokens)
        places = torch.arange(self.num_prototypes, device=tokens.device) * count * size // self.num_prototypes - rank * count
        own = (places >= 0) & (places < count)
        sums = F.pad(tokens[places.clamp(0, count - 1)], (0, 1), value=1.0) / self.num_prototypes
        return sums * own.unsqueeze(-1) * size  # the mean over processes makes them one batch

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Calibrates patch tokens; in training mode, takes in their statistics instead.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since categories have no places.

        Returns:
            (B, h*w, C).
        """
        if self.training:
            self.observe(tokens)
            return tokens
        return tokens + self.shift(tokens).to(tokens.dtype)


def _centroids(sums: Tensor) -> Tensor:
    """(..., K, C + 1) sums of tokens and their numbers -> (..., K, C)."""
    return sums[..., :-1] / sums[..., -1:].clamp_min(1e-6)
