from __future__ import annotations

import torch
from torch import Tensor, nn

from mgfc.calibrators.running import RunningMean, is_recomputing


class CoarseCalib(nn.Module):
    """Scene-level statistics, drawn towards those of the source domain.

    Light, weather and camera shift and scale whole channels of a scene. With patch tokens X (N x C), the mean mu and the
    standard deviation sigma of each channel over the patches, and what both were on average in training, mu' and sigma':

        X <- (X - mu) (sigma' / sigma)^s + mu + s (mu' - mu)

    mu' and sigma' are running statistics and s is fixed, so that nothing here fits the source by gradient. A module that
    has seen no training batch is the identity. Cost is linear in N, and the order of the patches does not matter.
    Source: `docs/method.md`, "Coarse".

    Args:
        dim: channels C of the tokens.
        strength: s; 0 leaves a scene as it is, 1 gives it the source's statistics.

    Examples:
        >>> CoarseCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, strength: float = 0.5) -> None:
        super().__init__()
        self.strength = strength
        self.source = RunningMean(2, dim)

    def shift(self, tokens: Tensor) -> Tensor:
        """What calibration adds: (B, N, C) -> (B, N, C)."""
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        mean = tokens.mean(dim=1, keepdim=True)
        log_deviation = 0.5 * (tokens.var(dim=1, correction=0, keepdim=True) + 1e-6).log()
        if self.training and not is_recomputing():
            self.source.step()
            self.source.observe(torch.cat([mean, log_deviation], dim=1).mean(dim=0))
        source_mean, source_log_deviation = self.source.value
        scale = (self.strength * (source_log_deviation - log_deviation)).exp() - 1
        shift: Tensor = self.source.ready * ((tokens - mean) * scale + self.strength * (source_mean - mean))
        return shift

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Calibrates patch tokens. In training mode, also takes in their statistics.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since the scene has no places.

        Returns:
            (B, h*w, C).
        """
        return tokens + self.shift(tokens).to(tokens.dtype)
