from __future__ import annotations

import torch
from torch import Tensor

from mgfc.calibrators.running import RunningMean
from mgfc.calibrators.statistics import EPS, SourceCalib


class CoarseCalib(SourceCalib):
    """Scene-level feature statistics: mean and standard deviation of an image's tokens are moved towards the source's.

    Light, weather and camera shift and scale whole channels of a scene; so does its content, within limits. With patch
    tokens X (N x C), t are the mean and the logarithm of the standard deviation of each channel over the patches, and t'
    and v' the mean and the variance of t over the source's images. The further t lies from t', measured by v', the closer
    the shrinkage factor a comes to s:

        z = mean of (t' - t)^2 / v' over the 2 C statistics;   a = s max(0, 1 - 0.5 / z)
        X <- mu + a (mu' - mu) + (sigma' / sigma)^a (X - mu),   where t = (mu, log sigma)

    In training mode tokens pass unchanged and the running statistics are updated. A module that has seen no training batch is
    the identity. Cost is linear in N, and the order of the patches does not matter. Source: `docs/method.md`, "Coarse".

    Args:
        dim: channels C of the tokens.
        strength: s; 0 leaves a scene as it is, 1 gives one that is far from all others the source's mean and
            standard deviation.

    Examples:
        >>> CoarseCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    # The variance is measured on augmented crops of training, which vary more than whole images.
    USUAL = 0.5

    def __init__(self, dim: int, strength: float = 1.0) -> None:
        super().__init__(strength)
        # First and second moment of the two statistics of an image.
        self.source = RunningMean(2, 2, dim)

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """In training mode, updates the running statistics with a batch: (B, N, C)."""
        found = _statistics(tokens)
        self.source.observe(torch.stack([found, found.square()], dim=1).mean(dim=0))

    def shift(self, tokens: Tensor) -> Tensor:
        """What calibration adds: (B, N, C) -> (B, N, C)."""
        found, (expected, square) = _statistics(tokens), self.source.value
        away = expected - found
        shift, log_scale = (self.fraction(away, square - expected.square(), (1, 2)) * away).unsqueeze(2).unbind(dim=1)
        scale = log_scale.expm1()
        return torch.addcmul(shift - scale * found[:, :1], tokens.to(found.dtype), scale)


def _statistics(tokens: Tensor) -> Tensor:
    """Of each image and channel, the mean and the logarithm of the standard deviation: (B, N, C) -> (B, 2, C)."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    mean = tokens.mean(dim=1, keepdim=True)
    variance = (tokens - mean).square().mean(dim=1)  # several times as fast as torch.var on a CPU
    return torch.stack([mean.squeeze(1), (variance + EPS).log() / 2], dim=1)
