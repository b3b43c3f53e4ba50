"""Tensors as pictures: images as they were before normalisation, features and classes in colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from mgfc.backbones.named import IMAGENET
from mgfc.errors import CalibrationError


class Shades:
    """Shows images that are normalised as a given one is.

    Args:
        image: (1, C, H, W).
        mean: of each channel, that it was normalised by. Default: ImageNet's for three channels; others are shown in shades
            from the image's least to its greatest value.
        std: of each channel.

    Raises:
        CalibrationError: if the mean or the standard deviation does not fit the channels.
    """

    def __init__(self, image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        channels = image.shape[1]
        if mean is None and std is None and channels == 3:
            mean, std = IMAGENET
        if mean is None and std is None:
            least, greatest = image.float().aminmax()
            self.shift, self.scale = least, (greatest - least).clamp_min(1e-6)
        elif mean is not None and std is not None and len(mean) == len(std) == channels:
            self.shift, self.scale = (torch.tensor(v, device=image.device).view(-1, 1, 1) for v in (mean, std))
            self.shift, self.scale = -self.shift / self.scale, 1 / self.scale
        else:
            raise CalibrationError(f"Expected mean and std of {channels} channels or neither, found {mean} and {std}.")

    def __call__(self, image: Tensor) -> Tensor:
        """The first three channels, or the first one in grey: (1, C, H, W) -> (H, W, 3) in 0 to 1."""
        shown = ((image[0].float() - self.shift) / self.scale).clamp(0, 1)
        shown = shown[:3] if len(shown) > 2 else shown[:1].expand(3, -1, -1)
        return rearrange(shown, "c h w -> h w c").cpu()


def palette(number: int) -> Tensor:
    """So many colours, told apart by hue and, between neighbours, by lightness: (number, 3) in 0 to 1."""
    golden = 0.618033988749895  # neighbours in number are far apart in hue
    tones = [(0.50, 0.62), (0.68, 0.60), (0.36, 0.52)]
    rows = [colorsys.hls_to_rgb((0.58 + index * golden) % 1, *tones[index % 3]) for index in range(number)]
    return torch.tensor(rows, dtype=torch.float32).view(number, 3)


def principal_colours(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps in the colours of their three first principal components, which they share, as they share the scale.

    Args:
        features: (h, w, C) each, of one C.

    Returns:
        (h, w, 3) each, in 0 to 1.
    """
    tokens = torch.cat([item.flatten(0, 1) for item in features]).double()
    tokens = tokens - tokens.mean(dim=0)
    _, vectors = torch.linalg.eigh(tokens.mT @ tokens)
    basis = vectors[:, -3:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    components = tokens @ (basis * largest.sign())  # an eigenvector has no sign of its own
    low, high = (torch.quantile(components, q, dim=0) for q in (0.01, 0.99))
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    if colours.shape[1] < 3:
        colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    sizes = [item.shape[0] * item.shape[1] for item in features]
    parts = zip(colours.split(sizes), features, strict=True)
    return [part.unflatten(0, item.shape[:2]) for part, item in parts]


def class_colours(picture: Tensor, classes: Tensor, colours: Tensor, strength: float = 0.65) -> Tensor:
    """Blends the colours of the classes into a grey picture, with a thin line between them.

    Args:
        picture: (H, W, 3) in 0 to 1.
        classes: (H, W).
        colours: (K, 3) in 0 to 1.
        strength: of the colours.

    Returns:
        (H, W, 3).
    """
    grey = picture @ picture.new_tensor([0.299, 0.587, 0.114])
    blended = strength * colours[classes] + (1 - strength) * grey.unsqueeze(-1)
    edge = torch.zeros_like(classes, dtype=torch.bool)
    edge[1:] |= classes[1:] != classes[:-1]
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    return torch.where(edge.unsqueeze(-1), 0.5 + 0.5 * blended, blended)
