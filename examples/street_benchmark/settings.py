"""Everything that a run depends on, with the values that Rein and SoMA publish as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# github.com/w1oves/Rein, configs/dinov2/rein_dinov2_mask2former_512x512_bs1x4.py, and github.com/ysj9909/SoMA,
# configs/sora/sora_dinov2-L_mask2former.py agree on all of these.
BACKBONE = "timm:vit_large_patch14_dinov2.lvd142m"
STEPS, BATCH_SIZE, CROP, PATCH = 40_000, 4, 512, 16
HEAD_LR, WEIGHT_DECAY, POWER = 1e-4, 0.05, 0.9
# Of what is trained in the backbone. Rein's: its configuration. LoRA's: SoMA's, half of the head's. Full fine-tuning: the
# published ones differ (Rein's configuration 1e-4, SoMA's 1e-6), this lies between. mgfc's: Rein's, not tuned here.
LR = {"frozen": 0.0, "full": 1e-5, "lora": 5e-5, "rein": 1e-4, "mgfc": 1e-4}


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run.

    Args:
        experiment: a name in `EXPERIMENTS`.
        method: a name in `METHODS`.
        backbone: `timm:NAME`, or a Transformers name or directory.
        lr: learning rate of what the method trains in the backbone.
        head: "mask2former" or "small".
        seed: of all that is drawn.
        head_lr: learning rate of the head.
        steps: optimiser steps.
        batch_size: crops in a step, of all processes together.
        crop: height and width of a crop, and of a window in scoring.
        patch: height and width that the backbone's patches are resized to.
        sampling: "uniform" or "rare", by DAFormer's rule.
        bf16: whether the backbone computes in bfloat16.
        observe: source images that calibration gathers its statistics from at the end.
    """

    experiment: str
    method: str
    backbone: str
    lr: float
    head: str = "mask2former"
    seed: int = 0
    head_lr: float = HEAD_LR
    steps: int = STEPS
    batch_size: int = BATCH_SIZE
    crop: int = CROP
    patch: int = PATCH
    sampling: str = "uniform"
    bf16: bool = True
    observe: int = 240


def published(experiment: str, method: str, **changes: Any) -> Settings:
    """The settings of the protocol, with changes; None leaves a setting as it is."""
    values = {"backbone": BACKBONE, "lr": LR[method], **{name: value for name, value in changes.items() if value is not None}}
    return Settings(experiment, method, **values)
