"""What coarse and medium calibration share: running statistics of the source, and how far to move towards them."""

from __future__ import annotations

from torch import Tensor, nn

from mgfc.calibrators.running import RunningMean

# Added to variances, so that a statistic without any has a distance, and a channel without any a logarithm.
EPS = 1e-6


class SourceCalib(nn.Module):
    """Moves statistics of an image towards those of the source domain, by a shrinkage factor.

    For statistics t of an image, whose mean and variance over the images of the source are t' and v':

        z = mean of (t' - t)^2 / v';   a = s max(0, 1 - z0 / z);   t <- t + a (t' - t)

    In training mode, and while it is observing, images pass unchanged and the running statistics are updated, so that what
    is learnt meets the source's full variety. A module without statistics is the identity. Nothing here fits the source by
    gradient. Source: `docs/method.md`, "Coarse"; a is the positive-part estimator of James and Stein (1961).

    Args:
        strength: s; 0 leaves an image as it is, 1 gives one that is far from all others the source's statistics.
        threshold: z0, the z up to which an image is not moved; over the images of the source, z is 1 on average.
    """

    source: RunningMean

    def __init__(self, strength: float, threshold: float) -> None:
        super().__init__()
        self.strength = strength
        self.threshold = threshold

    @property
    def is_gathering(self) -> bool:
        """Whether the next forward updates the statistics instead of using them."""
        return self.training or self.source.observing

    def fraction(self, deviations: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """The factor a, from t' - t in standard deviations of the source; z is a mean over `dim`, which stays with size 1."""
        z = squared_distance(deviations, dim).clamp_min(self.threshold / 2)
        return (self.strength - self.strength * self.threshold / z).clamp_min(0)


def squared_distance(deviations: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The z of t' - t in standard deviations of the source, a mean over `dim`, which stays with size 1."""
    return deviations.square().mean(dim=dim, keepdim=True)
