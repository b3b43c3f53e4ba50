"""Small real backbones for many test files, and calibrators on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from helpers import assert_unchanged, randomise, snapshot
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from mgfc import Calibration, FineConfig, MGFCConfig, wrap_backbone


def tiny_vit(seed: int = 0, **options: Any) -> nn.Module:
    """A timm ViT of 3 blocks, width 32, patches of 16 pixels, one class token."""
    torch.manual_seed(seed)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True, "num_classes": 0, **options}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def tiny_dinov2(**options: Any) -> Dinov2Model:
    """Its like in Transformers, with patches of 14 pixels."""
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, **options}
    return Dinov2Model(Dinov2Config(**options)).eval()


def calibrated(backbone: nn.Module, config: MGFCConfig | None = None) -> Calibration:
    """Wraps a backbone with calibrators of all stages that clearly change its tokens."""
    calibration = wrap_backbone(backbone, config or MGFCConfig(rank=8, fine=FineConfig())).calibration
    randomise(calibration)
    return calibration


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that what happens inside leaves the model as it was."""
    before = snapshot(model)
    yield
    assert_unchanged(model, before)
