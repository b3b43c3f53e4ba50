from __future__ import annotations

import torch
from torch import Tensor

from mgfc.calibrators.randomise import randomise_scenes
from mgfc.calibrators.running import RunningMean
from mgfc.calibrators.statistics import EPS, SourceCalib, squared_distance


class CoarseCalib(SourceCalib):
    """Scene-level statistics: mean and standard deviation of an image's channels are moved towards the source's.

    Light, weather and camera shift and scale whole channels of a scene; so does its content, within limits. With an image
    X (C x H x W), t are the mean and the logarithm of the standard deviation of each channel over the pixels, and t' and
    v' the mean and the variance of t over the source's images. The further t lies from t', measured by v', the closer
    the shrinkage factor a comes to s:

        z = mean of (t' - t)^2 / v' over the 2 C statistics;   a = s max(0, 1 - 0.5 / z)
        X <- mu + a (mu' - mu) + (sigma' / sigma)^a (X - mu),   where t = (mu, log sigma)

    In training mode images pass unchanged and the running statistics are updated. If asked to, a share of the images is
    then moved away instead, into another light, colour, sharpness and noise (`mgfc.calibrators.randomise`): what is learnt
    behind has to stand it. A module without statistics is the identity. Rows and columns at the border that are 0 in all
    channels are padding: they do not count and stay 0. Source: `docs/method.md`, "Coarse".

    Args:
        channels: C of the images.
        strength: s; 0 leaves a scene as it is, 1 gives one that is far from all others the source's mean and
            standard deviation.
        randomise: share of training's images that are randomised, from 0 to 1.

    Examples:
        >>> CoarseCalib(3)(torch.randn(2, 3, 28, 42)).shape
        torch.Size([2, 3, 28, 42])
    """

    # The variance is measured on augmented crops of training, which vary more than whole images.
    THRESHOLD = 0.5

    def __init__(self, channels: int, strength: float = 1.0, randomise: float = 0.0) -> None:
        super().__init__(strength, self.THRESHOLD)
        self.randomise = randomise
        # First and second moment of the two statistics of an image.
        self.source = RunningMean(2, 2, channels)

    def statistics(self, images: Tensor, area: Tensor | None = None) -> Tensor:
        """The t of each image, the mean and the logarithm of the standard deviation.

        Args:
            images: (B, C, H, W).
            area: their `image_area`, where it is known.

        Returns:
            (B, 2, C).
        """
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        count = (image_area(images) if area is None else area).sum(dim=(2, 3)).clamp_min(1)
        mean = images.sum(dim=(2, 3)) / count
        squares = images.square().sum(dim=(2, 3)) / count  # not vector_norm, which loses digits over many pixels on a CPU
        variance = torch.addcmul(squares, mean, mean, value=-1).clamp_min(0)
        return torch.stack([mean, (variance + EPS).log() / 2], dim=1)

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Updates the running statistics with a batch: (B, C, H, W)."""
        found = self.statistics(images)
        self.source.observe(torch.stack([found, found.square()], dim=1))

    def _derive(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """From first and second moment (2, 2, C): t', and 1 over the square root of v' or 0 if there is none, (2, C) each."""
        first, second = moments
        return first, self.source.ready * (second - first.square()).clamp_min(EPS).rsqrt()

    def distance(self, statistics: Tensor) -> Tensor:
        """The z of each image, from its statistics: (B, 2, C) -> (B,); 0 without statistics of the source."""
        return squared_distance(self.deviations(statistics), (1, 2)).flatten()

    def deviations(self, statistics: Tensor) -> Tensor:
        """The t - t' of each image in standard deviations of the source, whose mean square is z; 0 without statistics.

        Shapes: (B, 2, C) -> (B, 2, C).
        """
        expected, inverse_std = self.source.derive(self._derive)
        return (statistics - expected) * inverse_std

    def forward(self, images: Tensor, statistics: Tensor | None = None, area: Tensor | None = None) -> Tensor:
        """Calibrates images; in training mode, updates the running statistics and randomises images instead.

        Args:
            images: (B, C, H, W).
            statistics: (B, 2, C) or (1, 2, C) of the scenes that the images are parts of; None for the images' own.
            area: the images' `image_area`, where it is known.

        Returns:
            (B, C, H, W).
        """
        if self.is_gathering:
            self.observe(images)
            if not self.training or self.randomise == 0:
                return images
            return torch.where(image_area(images), randomise_scenes(images, self.randomise), images)
        area = image_area(images) if area is None else area
        found = self.statistics(images, area) if statistics is None else statistics
        expected, inverse_std = self.source.derive(self._derive)
        away = expected - found
        fraction = self.fraction(away * inverse_std, (1, 2))
        shift, log_scale = (fraction * away)[..., None, None].unbind(dim=1)
        mean, scale = found[:, 0, :, None, None], log_scale.exp()
        start = torch.addcmul(mean + shift, mean, scale, value=-1)
        calibrated = torch.addcmul(start, images.to(start.dtype), scale)
        # A pixel that is not finite spoils its image's statistics, but not the image.
        moved = area & (fraction > 0).unsqueeze(-1)
        return torch.where(moved, calibrated.to(images.dtype), images)


def image_area(images: Tensor) -> Tensor:
    """Which pixels are of the image, and not padding around it: (B, C, H, W) -> (B, 1, H, W)."""
    filled = images.bool().any(dim=1)
    rows, columns = _between(filled.any(dim=2)), _between(filled.any(dim=1))
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _between(filled: Tensor) -> Tensor:
    """What lies between the first and the last true value of each row, both included: (B, N) -> (B, N)."""
    ones = filled.long()
    until = ones.cumsum(dim=1)
    return (until > 0) & (until < until[:, -1:] + ones)
