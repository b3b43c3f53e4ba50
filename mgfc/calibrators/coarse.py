from __future__ import annotations

import torch
from torch import Tensor, nn

from mgfc.calibrators.running import RunningMean


class CoarseCalib(nn.Module):
    """Scene-level statistics: an image's mean token, drawn towards that of the source domain.

    Light, weather and camera shift whole channels of a scene. With patch tokens X (N x C), their mean mu over the patches,
    and mu', what that was on average in training:

        X <- X + s (mu' - mu)

    mu' is a running mean and s is fixed, so that nothing here fits the source by gradient. A module that has seen no
    training batch is the identity. Cost is linear in N, and the order of the patches does not matter.
    Source: `docs/method.md`, "Coarse".

    Args:
        dim: channels C of the tokens.
        strength: s; 0 leaves a scene as it is, 1 gives it the source's mean.

    Examples:
        >>> CoarseCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, strength: float = 0.5) -> None:
        super().__init__()
        self.strength = strength
        self.source = RunningMean(dim)

    def shift(self, tokens: Tensor) -> Tensor:
        """What calibration adds to every patch of an image: (B, N, C) -> (B, 1, C)."""
        mean = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean(dim=1, keepdim=True)
        source, ready = self.source.read()
        self.source.observe(mean.mean(dim=(0, 1)))
        return ready * self.strength * (source - mean)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Calibrates patch tokens. In training mode, also takes in their statistics.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since the scene has no places.

        Returns:
            (B, h*w, C).
        """
        return tokens + self.shift(tokens).to(tokens.dtype)
