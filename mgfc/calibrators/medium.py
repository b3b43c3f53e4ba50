from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mgfc.calibrators.running import RunningMean
from mgfc.calibrators.statistics import EPS, SourceCalib, squared_distance
from mgfc.distributed import process

# The least weight of a category that its sums are divided by.
TINY = 1e-6


class _Source(NamedTuple):
    """What the running statistics say of the source.

    Args:
        prototypes: P, (K, C).
        mean: m', (C,).
        inverse_std: 1 over the square root of v', (K, C); 0 for a category that the source has nothing of.
        directions: of P - m', of length 1 / tau, (C, K).
    """

    prototypes: Tensor
    mean: Tensor
    inverse_std: Tensor
    directions: Tensor


class MediumCalib(SourceCalib):
    """Category-level feature statistics: each category of an image is moved towards its prototype in the source domain.

    K prototypes P are running centroids of the source's patch tokens. With patch tokens X (N x C), assigned softly to
    them, and the centroids c of this image:

        A = softmax(cos(X - m, P - m') / tau);   q_k = mean of A_k over the patches;   c_k = mean of X under A_k
        z_k = mean of (P_k - c_k)^2 / v'_k over the channels;   a_k = s max(0, 1 - z0 / z_k) q_k / (q_k + q0)
        X <- X + A [a (P - c)]

    m' is the mean of the source's tokens, and m lies half-way from it to this image's mean. v'_k is the variance of c_k
    over the images of the source, weighted by q_k: a category that looks about as it does there stays as it is. Categories
    that fill less than about q0 of the image move little, since their centroids are uncertain, and one that the source has
    nothing of does not. Unlike `CoarseCalib`, a
    scene with other shares of sky or road than usual is not moved for that. In training mode tokens pass unchanged, and the
    running centroids are updated. A module that has seen no training batch is the identity. Cost is linear in N. Source:
    `docs/method.md`, "Medium".

    Args:
        dim: channels C of the tokens.
        num_prototypes: K.
        temperature: tau; smaller is harder.
        strength: s; 0 leaves a category as it is, 1 gives one that is far from the source's the source's mean.
        threshold: z0; a category of the source's own images has a z of about 1.

    Examples:
        >>> MediumCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    CERTAIN_SHARE = 0.025

    def __init__(
        self,
        dim: int,
        num_prototypes: int = 16,
        temperature: float = 0.05,
        strength: float = 1.0,
        threshold: float = 2.0,
    ) -> None:
        super().__init__(strength, threshold)
        self.num_prototypes = num_prototypes
        self.temperature = temperature
        # Of each prototype, over images: q, q c and q c^2.
        self.source = RunningMean(num_prototypes, 1 + 2 * dim)

    def prototypes(self) -> Tensor:
        """P: (K, C); zeros before the first training batch."""
        return self.source.derive(self._derive).prototypes

    def similarity(self, tokens: Tensor) -> Tensor:
        """The logits of A: (B, N, C) -> (B, N, K)."""
        source = self.source.derive(self._derive)
        with torch.autocast(tokens.device.type, enabled=False):
            _, away = _center(tokens, source)
            return _similarity(away, source)

    def assign(self, tokens: Tensor) -> Tensor:
        """A: (B, N, C) -> (B, N, K)."""
        return self.similarity(tokens).softmax(dim=-1)

    def deviations(self, tokens: Tensor, assignment: Tensor) -> Tensor:
        """The square root of z, in standard deviations of the source, for tokens under an A: (B, N, C), (B, N, K) -> (B, K)."""
        source = self.source.derive(self._derive)
        with torch.autocast(tokens.device.type, enabled=False):
            _, centroids = _gather(*_center(tokens, source), assignment)
            return squared_distance((source.prototypes - centroids) * source.inverse_std, -1).squeeze(-1).sqrt()

    def _derive(self, value: Tensor) -> _Source:
        """From the means over the source's images of q (K, 1), q c and q c^2 (K, C)."""
        dim = value.shape[1] // 2
        shares, sums, squares = value[:, :1], value[:, 1 : dim + 1], value[:, dim + 1 :]
        prototypes, mean = sums / shares.clamp_min(TINY), sums.sum(dim=0)
        variance = squares / shares.clamp_min(TINY) - prototypes.square()
        inverse_std = torch.where(shares > 0, variance.clamp_min(EPS).rsqrt(), 0)
        directions = F.normalize(prototypes - mean, dim=-1).transpose(-2, -1) / self.temperature
        return _Source(prototypes, mean, inverse_std, directions)

    def calibrate(self, tokens: Tensor) -> Tensor:
        """X + A [a (P - c)], in the dtype of the tokens: (B, N, C) -> (B, N, C)."""
        with torch.autocast(tokens.device.type, enabled=False):
            source = self.source.derive(self._derive)
            assignment, counts, centroids = _assign(tokens, source)
            away = source.prototypes - centroids
            certainty = counts / (counts + self.CERTAIN_SHARE * tokens.shape[1])
            offset = self.fraction(away * source.inverse_std, -1) * certainty * away
            assignment, offset = assignment.to(tokens.dtype), offset.to(tokens.dtype)
            # The result of baddbmm would be contiguous where the block's tokens are the transpose of a map.
            return torch.baddbmm(tokens, assignment, offset) if tokens.stride(-1) == 1 else tokens + assignment @ offset

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """Updates the running centroids with a batch: (B, N, C)."""
        # Soft clustering takes many small steps to settle, however large the batches of one pass over the source are.
        for part in torch.split(tokens, 4 if self.source.observing else len(tokens)):
            with torch.autocast(tokens.device.type, enabled=False):
                _, counts, centroids = _assign(part, self.source.derive(self._derive))
            moments = torch.cat([torch.ones_like(counts), centroids, centroids.square()], dim=-1)
            found = counts / part.shape[1] * moments
            self.source.observe(torch.where(self.source.ready > 0, found, self._first(part)))

    def _first(self, tokens: Tensor) -> Tensor:
        """Tokens at even distances in the first batch of all processes, as the centroids of images with equal shares."""
        rank, size = process()
        tokens = tokens.flatten(0, 1)
        count = len(tokens)
        places = torch.arange(self.num_prototypes, device=tokens.device) * count * size // self.num_prototypes - rank * count
        own = (places >= 0) & (places < count)
        chosen = tokens[places.clamp(0, count - 1)].to(torch.promote_types(tokens.dtype, torch.float32))
        moments = torch.cat([torch.ones_like(chosen[:, :1]), chosen, chosen.square()], dim=1) / self.num_prototypes
        return moments * own.unsqueeze(-1) * size  # the mean over all processes' images makes them one batch

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Calibrates patch tokens; in training mode, updates the running centroids instead.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since categories have no places.

        Returns:
            (B, h*w, C).
        """
        if self.is_gathering:
            self.observe(tokens)
            return tokens
        return self.calibrate(tokens)


def _center(tokens: Tensor, source: _Source) -> tuple[Tensor, Tensor]:
    """The m and X - m, in full precision, since it is a small difference of large numbers: (B, 1, C), (B, N, C)."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    center = torch.lerp(tokens.mean(dim=1, keepdim=True, dtype=dtype), source.mean, 0.5)
    return center, tokens - center


def _similarity(away: Tensor, source: _Source) -> Tensor:
    """The logits of A, from X - m: (B, N, C) -> (B, N, K)."""
    lengths = torch.linalg.vector_norm(away, dim=-1, keepdim=True).clamp_min(1e-12)
    logits: Tensor = (away @ source.directions) / lengths
    return logits


def _gather(center: Tensor, away: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """The counts N q and the centroids c of each image, from m, X - m and A: (B, K, 1), (B, K, C)."""
    counts = assignment.sum(dim=1).unsqueeze(-1)
    return counts, center + assignment.transpose(-2, -1) @ away / counts.clamp_min(TINY)


def _assign(tokens: Tensor, source: _Source) -> tuple[Tensor, Tensor, Tensor]:
    """A, counts and centroids: (B, N, K), (B, K, 1), (B, K, C)."""
    center, away = _center(tokens, source)
    assignment = _similarity(away, source).softmax(dim=-1)
    return assignment, *_gather(center, away, assignment)
