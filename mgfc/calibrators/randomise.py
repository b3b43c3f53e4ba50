from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Standard deviations of the random logarithms of gamma and contrast, and of the brightness in the image's standard
# deviations: first for all channels together, then channel by channel.
_GAMMA, _CONTRAST, _BRIGHTNESS = (0.5, 0.12), (0.35, 0.1), (0.65, 0.2)
# Largest standard deviations of the blur, in pixels, and of the noise, in ranges of the image.
_BLUR, _NOISE = 2.0, 0.12
_REACH = 4  # of the blur's kernel, in pixels


def randomise_scenes(images: Tensor, share: float) -> Tensor:
    """Puts some images of a batch into another light, colour, sharpness and noise, whatever their normalisation.

    Each chosen image gets a gamma curve, then another contrast and brightness, all with some difference between its
    channels, then blur along both axes, then noise; the last two each with probability 0.5. Domain randomisation for
    segmentation: Yue et al. (ICCV 2019).

    Args:
        images: (B, C, H, W).
        share: expected share of the images that are changed, from 0 to 1.

    Returns:
        (B, C, H, W), within the range of each image's channels.
    """
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    extent = (high - low).clamp_min(1e-6)
    changed = _relight((values - low) / extent)
    changed = _add_noise(_blur(changed)).clamp(0, 1) * extent + low
    chosen = _with_probability(share, images)
    return torch.where(chosen, changed, values).to(images.dtype)


def _relight(values: Tensor) -> Tensor:
    """Gamma, contrast and brightness, of values in [0, 1]."""
    values = values.clamp_min(1e-3).pow(_random(_GAMMA, values).exp())
    mean, deviation = values.mean(dim=(2, 3), keepdim=True), values.std(dim=(2, 3), keepdim=True, correction=0)
    shift = _random(_BRIGHTNESS, values) * deviation
    return ((values - mean) * _random(_CONTRAST, values).exp() + mean + shift).clamp(0, 1)


def _random(deviations: tuple[float, float], like: Tensor) -> Tensor:
    """Normal values (B, C, 1, 1): one for each image plus one for each of its channels."""
    batch, channels = like.shape[:2]
    together = torch.randn(batch, 1, 1, 1, device=like.device)
    apart = torch.randn(batch, channels, 1, 1, device=like.device)
    return deviations[0] * together + deviations[1] * apart


def _with_probability(share: float, like: Tensor) -> Tensor:
    """Whether an image is chosen: (B, 1, 1, 1)."""
    return torch.rand(len(like), 1, 1, 1, device=like.device) < share


def _blur(values: Tensor) -> Tensor:
    """A Gaussian blur of random width along each axis, for half of the images."""
    batch, channels = values.shape[:2]
    places = torch.arange(-_REACH, _REACH + 1, device=values.device)
    chosen = _with_probability(0.5, values).view(batch, 1)
    maps = values.reshape(1, batch * channels, *values.shape[2:])
    for axis in (2, 3):
        width = 0.05 + chosen * _BLUR * torch.rand(batch, 1, device=values.device)
        kernel = (-(places / width).square() / 2).softmax(dim=1).repeat_interleave(channels, dim=0)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padding = (0, 0, _REACH, _REACH) if axis == 2 else (_REACH, _REACH, 0, 0)
        kernel = kernel.view(batch * channels, *shape[1:]).to(maps.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            maps = F.conv2d(F.pad(maps, padding, mode="replicate"), kernel, groups=batch * channels)
    return maps.view_as(values)


def _add_noise(values: Tensor) -> Tensor:
    """Normal noise of a random standard deviation, for half of the images."""
    level = _with_probability(0.5, values) * _NOISE * torch.rand(len(values), 1, 1, 1, device=values.device)
    return values + level * torch.randn_like(values)
