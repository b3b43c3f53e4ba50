"""One small reference segmentation head, for examples and pretrained demos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SegmentationHead(nn.Module):
    """Joins maps of several blocks and classifies every place at twice the largest map's resolution.

    Each map is normalised over its channels and projected to `hidden_dim`; the projections are brought to the largest
    map's size and added up; a depth-wise 5 x 5 and a point-wise convolution follow at twice that size.

    Args:
        in_channels: channels of each map.
        num_classes: classes K.
        hidden_dim: width of the head.

    Examples:
        >>> maps = [torch.randn(2, 384, 14, 19) for _ in range(4)]
        >>> SegmentationHead([384] * 4, 11)(maps).shape
        torch.Size([2, 11, 28, 38])
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.arguments = {"in_channels": list(in_channels), "num_classes": num_classes, "hidden_dim": hidden_dim}
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in in_channels)
        self.projections = nn.ModuleList(nn.Linear(channels, hidden_dim) for channels in in_channels)
        self.smooth = nn.Conv2d(hidden_dim, hidden_dim, 5, padding=2, groups=hidden_dim)
        self.mix = nn.Conv2d(hidden_dim, hidden_dim, 1)
        self.classify = nn.Conv2d(hidden_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Predicts class logits.

        Args:
            maps: one (B, C_i, h_i, w_i) for each entry of `in_channels`.

        Returns:
            (B, K, 2h, 2w) for the largest h, w.
        """
        size = (max(item.shape[2] for item in maps), max(item.shape[3] for item in maps))
        joined: list[Tensor] = []
        for item, norm, projection in zip(maps, self.norms, self.projections, strict=True):
            projected = projection(norm(item.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            if projected.shape[2:] != size:
                projected = F.interpolate(projected, size=size, mode="bilinear", align_corners=False)
            joined.append(projected)
        x = F.gelu(torch.stack(joined).sum(dim=0))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        logits: Tensor = self.classify(F.gelu(x + self.mix(F.gelu(self.smooth(x)))))
        return logits
