"""Frequency-adapted tokens: FADA's idea with a Haar transform that is right for grids of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def haar(maps: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (4, B, C, h, w): the low band, then horizontal, vertical and diagonal detail."""
    a, b, c, d = rearrange(maps, "b c (h p) (w q) -> (p q) b c h w", p=2, q=2)
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def inverse_haar(bands: Tensor) -> Tensor:
    """(4, B, C, h, w) -> (B, C, 2h, 2w), the inverse of `haar`, which is its own."""
    low, x, y, xy = bands
    pixels = torch.stack([low + x + y + xy, low - x + y - xy, low + x - y - xy, low - x - y + xy]) / 2
    return rearrange(pixels, "(p q) b c h w -> b c (h p) (w q)", p=2, q=2)


class BandTokens(nn.Module):
    """Low-rank tokens, as Rein's, for one band; `normalise` takes the image's style out of the similarities."""

    def __init__(self, depth: int, dim: int, normalise: bool, num_tokens: int = 100, rank: int = 16) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * 14**2 + math.sqrt(dim * rank)))
        self.a = nn.Parameter(torch.empty(depth, num_tokens, rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.empty(depth, rank, dim).uniform_(-bound, bound))
        self.mix = nn.Linear(dim, dim)
        self.normalise = normalise

    def forward(self, band: Tensor, layer: int) -> Tensor:
        """(B, N, C) -> (B, N, C): what the tokens add."""
        tokens = self.a[layer] @ self.b[layer]
        similarity = band @ tokens.T * band.shape[-1] ** -0.5
        if self.normalise:
            similarity = F.instance_norm(similarity.mT).mT
        added: Tensor = self.mix(band + similarity.softmax(dim=-1) @ tokens)
        return added


class HaarTokens(nn.Module):
    """Refines the low band and the three detail bands of the patch grid with tokens of their own."""

    def __init__(self, depth: int, dim: int) -> None:
        super().__init__()
        self.low = BandTokens(depth, dim, normalise=False)
        self.high = BandTokens(depth, dim, normalise=True)
        self.scale = nn.Parameter(torch.tensor(0.001))

    def forward(self, patches: Tensor, grid: tuple[int, int], layer: int) -> Tensor:
        height, width = grid
        maps = rearrange(patches, "b (h w) c -> b c h w", h=height)
        bands = haar(F.pad(maps, (0, width % 2, 0, height % 2), mode="replicate"))
        size = bands.shape[-2:]
        low = self.low(bands[0].flatten(2).mT, layer)
        high = self.high(rearrange(bands[1:], "k b c h w -> (k b) (h w) c"), layer)
        low = rearrange(low, "b (h w) c -> 1 b c h w", h=size[0])
        high = rearrange(high, "(k b) (h w) c -> k b c h w", k=3, h=size[0])
        delta = inverse_haar(torch.cat([low, high]))[..., :height, :width]
        return patches + self.scale * delta.flatten(2).mT


def add_haar_tokens(vit: Any, blocks: Sequence[nn.Module], patch_size: int) -> None:
    """Refines the patch tokens after each block."""
    vit.requires_grad_(False)
    vit.haar_tokens = HaarTokens(len(blocks), vit.config.hidden_size)
    grid = [0, 0]

    def see(_vit: nn.Module, args: tuple[Tensor, ...]) -> None:
        grid[:] = [side // patch_size for side in args[0].shape[-2:]]

    vit.register_forward_pre_hook(see)
    for index, block in enumerate(blocks):

        def refine(_block: nn.Module, _args: object, tokens: Tensor, index: int = index) -> Tensor:
            patches = vit.haar_tokens(tokens[:, 1:], (grid[0], grid[1]), index)
            return torch.cat([tokens[:, :1], patches], dim=1)

        block.register_forward_hook(refine, prepend=True)
