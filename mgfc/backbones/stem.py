"""Where images enter a backbone, and how many channels they have."""

from __future__ import annotations

from torch import nn

from mgfc.backbones.detection import Tower
from mgfc.backbones.grid import is_pair


def image_entry(tower: Tower) -> nn.Module | None:
    """The module outside the blocks that is given the image: the patch embedding, or the first convolution.

    None where there is neither, as in models whose patches come cut out already.
    """
    inside = tuple(name + "." for name in tower.blocks)
    for name, module in tower.root.named_modules():
        is_entry = isinstance(module, nn.Conv2d) or is_pair(getattr(module, "patch_size", None))
        if name and is_entry and not (name + ".").startswith(inside):
            found: nn.Module = module
            return found
    return None


def in_channels(tower: Tower) -> int | None:
    """Channels of the images that a backbone takes; None where it does not tell."""
    entry = image_entry(tower)
    first = None if entry is None else next((m for m in entry.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        return int(first.in_channels)
    config = getattr(tower.root, "config", None)
    for source in (entry, tower.root, config):
        for name in ("in_chans", "num_channels", "in_channels"):
            if isinstance(value := getattr(source, name, None), int):
                return value
    return None
