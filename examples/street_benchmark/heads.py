"""Two heads for maps of a backbone: Mask2Former's, by Transformers, and the small one of this library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from data.classes import CITYSCAPES
from streets import IGNORE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from mgfc import SegmentationHead
from street_benchmark.processes import sum_over_processes, world

K = len(CITYSCAPES)
Size = tuple[int, int]


class SharedLoss(Mask2FormerLoss):
    """Transformers' loss, whose mean over masks is over those of all processes."""

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Tensor:
        number = torch.tensor(float(sum(map(len, class_labels))), device=device)
        return (sum_over_processes(number) / world()).clamp_min(1)


class Mask2FormerHead(Mask2FormerPreTrainedModel):
    """Pixel decoder, transformer decoder and loss of Transformers' Mask2Former (arXiv 2112.01527), without its backbone.

    It has the sizes and weights of losses that Rein and SoMA configure, which are Transformers' defaults: 100 queries, 6
    layers of deformable attention, 9 of masked attention.

    Args:
        channels: of the four maps, whose sizes are those of strides 4, 8, 16 and 32.
        crop: height and width of crops. The loss samples 12544 points of a mask, or all that a smaller one has.
    """

    scales = (4, 2, 1, 0.5)

    def __init__(self, channels: Sequence[int], crop: int) -> None:
        config = Mask2FormerConfig(ignore_value=IGNORE)
        config.num_labels = K
        config.train_num_points = min(config.train_num_points, (crop // 4) ** 2)
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, list(channels))
        self.transformer = Mask2FormerTransformerModule(config.feature_size, config)
        self.classify = nn.Linear(config.hidden_dim, K + 1)
        self.weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.criterion = SharedLoss(config, self.weights)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Masks and classes of the queries after each layer, the last one last: (B, Q, h, w) and (B, Q, K + 1)."""
        decoded = self.pixel_decoder(list(maps))
        output = self.transformer(decoded.multi_scale_features, decoded.mask_features)
        classes = [self.classify(hidden.transpose(0, 1)) for hidden in output.intermediate_hidden_states]
        pairs = zip(output.masks_queries_logits, classes, strict=True)
        return [{"masks_queries_logits": masks, "class_queries_logits": found} for masks, found in pairs]

    def loss(self, maps: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Classes and masks of every layer against the classes of each image, (B, H, W)."""
        *others, last = self(maps)
        present = [image.unique() for image in labels]
        present = [found[found != IGNORE] for found in present]
        masks = [(image == found[:, None, None]).float() for image, found in zip(labels, present, strict=True)]
        losses = self.criterion(**last, mask_labels=masks, class_labels=present, auxiliary_predictions=others)
        weighted = [self.weights[name.rstrip("_0123456789")] * value for name, value in losses.items()]
        return torch.stack(weighted).sum()

    def scores(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Of each class at each pixel, (B, K, H, W): the masks, weighted by their classes' probabilities."""
        last = self(maps)[-1]
        masks = F.interpolate(last["masks_queries_logits"], size, mode="bilinear", align_corners=False).sigmoid()
        return torch.einsum("bqk, bqhw -> bkhw", last["class_queries_logits"].softmax(dim=-1)[..., :-1], masks)


class SmallHead(SegmentationHead):
    """`mgfc.SegmentationHead` with cross-entropy.

    Args:
        channels: of the maps.
        crop: not needed.
    """

    scales = None

    def __init__(self, channels: Sequence[int], crop: int) -> None:
        super().__init__(channels, K)

    def loss(self, maps: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The mean over the labelled pixels of all processes, as far as they are this one's, times the number of processes."""
        logits = self.scores(maps, (labels.shape[1], labels.shape[2]))
        summed = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return summed / (sum_over_processes((labels != IGNORE).sum()) / world()).clamp_min(1)

    def scores(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        return F.interpolate(self(maps), size, mode="bilinear", align_corners=False)


HEADS: dict[str, type[Mask2FormerHead] | type[SmallHead]] = {"mask2former": Mask2FormerHead, "small": SmallHead}
