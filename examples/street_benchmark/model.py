"""The model of a run: an adapted backbone's maps of four blocks, then a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgfc import Calibration, FeatureMaps
from street_benchmark.backbones import blocks_of, load_backbone
from street_benchmark.heads import HEADS
from street_benchmark.methods import METHODS
from street_benchmark.settings import Settings

BLOCKS = (8, 12, 16, 24)  # of 24, counted from 1: those of Rein and SoMA


class Segmenter(nn.Module):
    """Loss in training, scores of the classes otherwise.

    The backbone computes in bfloat16 if asked to; the head, the loss and the parameters are in full precision.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        vit = load_backbone(settings.backbone, settings.patch, settings.crop)
        torch.manual_seed(settings.seed)
        METHODS[settings.method](vit)
        depth = len(blocks_of(vit))
        head = HEADS[settings.head]
        self.maps = FeatureMaps(vit, [max(1, depth * block // BLOCKS[-1]) - 1 for block in BLOCKS], head.scales)
        self.head = head(self.maps.channels, settings.crop)
        self.bf16 = settings.bf16

    @property
    def calibration(self) -> Calibration | None:
        """Of the backbone, if its method has one."""
        return getattr(self.maps.backbone, "calibration", None)

    def features(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return [item.float() for item in self.maps(images)]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """A loss if there are labels (B, H, W), else the scores of each class, (B, K, H, W).

        Args:
            images: (B, 3, H, W), normalised.
            labels: class ids, 255 to ignore.
        """
        maps = self.features(images)
        if labels is None:
            return self.head.scores(maps, (images.shape[2], images.shape[3]))
        loss = self.head.loss(maps, labels)
        return loss if self.calibration is None else loss + self.calibration.loss(labels)
