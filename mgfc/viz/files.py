"""Image files: read for a model, and figures written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

_PAPER = (255, 255, 255)
_DEEPEST = 2**16 - 1
_LONGEST = 3  # times the shorter side


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Any image file as upright RGB.

    Raises:
        OSError: if it cannot be read, or holds values of more than 16 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # a damaged file makes PIL's plugins raise errors of any kind
        raise OSError(f"{path}: expected an image, found none that can be read ({error}).") from None
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > _DEEPEST:
            raise OSError(f"{path}: expected an image of at most 16 bits, found other values. Save it with 8 or 16 bits.")
        image = Image.fromarray((values / (_DEEPEST / 255)).round().astype(np.uint8))  # PIL would clip instead of scaling
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAPER), image)
    return image.convert("RGB")


def model_size(image: tuple[int, int], shorter: int, patch: tuple[int, int]) -> tuple[int, int]:
    """The size that a model sees an image at: of the same shape, in whole patches.

    Args:
        image: its two sides.
        shorter: what the shorter one becomes; less where the other would be over three times as long.
        patch: the sides of a patch, in the same order.
    """
    scale = min(shorter / min(image), _LONGEST * shorter / max(image))
    first, second = (max(2, round(length * scale / side)) * side for length, side in zip(image, patch, strict=True))
    return first, second


def as_tensor(image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image at a size (height, width), normalised by the mean and standard deviation of each of its channels.

    Args:
        image: an RGB one; for one channel, it is brought to grey.
        size: (height, width).
        mean: of 3 channels or 1.
        std: likewise.

    Returns:
        (1, C, height, width).
    """
    from PIL import Image

    resized = image.resize(size[::-1], Image.Resampling.BICUBIC).convert("RGB" if len(mean) == 3 else "L")
    pixels = torch.from_numpy(np.array(resized)).view(*size, -1).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).unsqueeze(0)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG file, which is there whole or as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
