"""DINOv2 by timm or Transformers, with patches of another size than it was trained with."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIMM = "timm:"


def load_backbone(name: str, patch: int, size: int) -> nn.Module:
    """A pretrained backbone for images in patches of a size.

    The weights of the patch embedding and the position embedding are resized by bicubic interpolation, as Rein and SoMA do
    (github.com/w1oves/Rein, tools/convert_models/convert_dinov2_large_512x512.py).

    Args:
        name: `timm:NAME`; or a Transformers name or directory of a DINOv2.
        patch: height and width of a patch.
        size: height and width of the images that positions are resized for; others are interpolated in each forward.
    """
    make = _timm if name.startswith(TIMM) else _transformers
    trained, wanted, keys = make(name.removeprefix(TIMM), patch, size)
    state = trained.state_dict()
    projection, positions = (state[key] for key in keys)
    state[keys[0]] = _bicubic(projection, (patch, patch))
    state[keys[1]] = _resize_positions(positions, size // patch)
    wanted.load_state_dict(state)
    return wanted


Made = tuple[nn.Module, nn.Module, tuple[str, str]]


def _timm(name: str, patch: int, size: int) -> Made:
    trained = timm.create_model(name, pretrained=True, num_classes=0)
    wanted = timm.create_model(name, img_size=size, patch_size=patch, num_classes=0, dynamic_img_size=True)
    return trained, wanted, ("patch_embed.proj.weight", "pos_embed")


def _transformers(name: str, patch: int, size: int) -> Made:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(name)
    config.patch_size, config.image_size = patch, size
    keys = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings")
    wanted = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return AutoModel.from_pretrained(name), wanted, keys


def _bicubic(weight: Tensor, size: tuple[int, int]) -> Tensor:
    return weight if weight.shape[2:] == size else F.interpolate(weight.float(), size, mode="bicubic", align_corners=False)


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1, extra + n * n, C) -> (1, extra + side * side, C)."""
    before = math.isqrt(positions.shape[1])
    extra = positions.shape[1] - before**2
    grid = positions[:, extra:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    return torch.cat([positions[:, :extra], _bicubic(grid, (side, side)).flatten(2).mT], dim=1)


def blocks_of(vit: Any) -> nn.ModuleList:
    """Its transformer blocks."""
    blocks: nn.ModuleList = vit.blocks if hasattr(vit, "blocks") else vit.encoder.layer
    return blocks


def checkpoint_activations(vit: Any) -> None:
    """Less memory for a third more time: activations of blocks are computed again in the backward pass."""
    if hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing()
    else:
        vit.gradient_checkpointing_enable()
