from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.running import RunningMean, is_recomputing


class MediumCalib(nn.Module):
    """Category-level statistics: what looks alike in this image, drawn towards what it is like in the source domain.

    K prototypes P are running centroids of the source's patch tokens. With patch tokens X (N x C), assigned softly to
    them, and the centroids c of this image:

        A = softmax(cos(X - m, P - m') / tau);   q_k = mean of A_k over the patches;   c_k = mean of X under A_k
        X <- X + s A [q / (q + q0) (P - c)]

    m' is the mean of the source's tokens, and m lies half-way from it to this image's mean. Categories that fill less
    than about q0 of the image move little, since their centroids are uncertain. Unlike `CoarseCalib`, a scene with other
    shares of sky or road than usual is no reason for a shift. Nothing here fits the source by gradient, and a module
    that has seen no training batch is the identity. Cost is linear in N. Source: `docs/method.md`, "Medium".

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

    def __init__(self, dim: int, num_prototypes: int = 16, temperature: float = 0.1, strength: float = 0.3) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        self.temperature = temperature
        self.strength = strength
        # Of each prototype: the sum of its tokens over an image, and their number, both divided by N.
        self.source = RunningMean(num_prototypes, dim + 1)

    def prototypes(self) -> Tensor:
        """P: (K, C); zeros before the first training batch."""
        return self.source.value[:, :-1] / self.source.value[:, -1:].clamp_min(1e-6)

    def similarity(self, tokens: Tensor) -> Tensor:
        """cos(X - m, P - m') / tau, the logits of the assignment: (B, N, C) -> (B, N, K)."""
        mean = self.source.value[:, :-1].sum(dim=0)
        middle = (mean + tokens.mean(dim=1, keepdim=True)) / 2
        directions = F.normalize(self.prototypes() - mean, dim=-1).to(tokens.dtype)
        return F.normalize(tokens - middle, dim=-1) @ directions.mT / self.temperature

    def shift(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What calibration adds, and the logits of the assignment: (B, N, C) -> (B, N, C), (B, N, K)."""
        tracking = self.training and not is_recomputing()
        if tracking:
            self.source.step()
        with torch.autocast(tokens.device.type, enabled=False):  # offsets are small differences of large numbers
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            similarity = self.similarity(tokens)
            assignment = similarity.softmax(dim=-1)
            share = assignment.mean(dim=1).unsqueeze(-1)
            sums = assignment.mT @ tokens / tokens.shape[1]
            certain = share / (share + self.CERTAIN_SHARE)
            offset = certain * (self.prototypes().to(tokens.dtype) - sums / share.clamp_min(1e-6))
            shift = self.source.ready * self.strength * (assignment @ offset)
        if tracking:
            self.source.observe(self._seen(tokens, torch.cat([sums, share], dim=-1)))
        return shift, similarity

    @torch.no_grad()
    def _seen(self, tokens: Tensor, sums: Tensor) -> Tensor:
        """The batch's sums and shares; of the first batch, tokens at even distances, as first centroids."""
        tokens = tokens.flatten(0, 1)
        places = torch.arange(self.num_prototypes, device=tokens.device) * len(tokens) // self.num_prototypes
        first = F.pad(tokens[places], (0, 1), value=1.0) / self.num_prototypes
        return torch.where(self.source.count > 0, sums.mean(dim=0), first)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Calibrates patch tokens. In training mode, also takes in their statistics.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since categories have no places.

        Returns:
            (B, h*w, C).
        """
        return tokens + self.shift(tokens)[0].to(tokens.dtype)
