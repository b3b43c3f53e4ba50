"""Rein's low-rank tokens, written from the equations of arXiv 2312.04265."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Rein(nn.Module):
    """Refines the tokens f (N x C) that leave block l with m learnt tokens t = A_l B_l of low rank.

        S = softmax(f t^T / sqrt C);   d = S[:, 1:] (t[1:] W_t + b_t);   f <- f + s * ((f + d) W_f + b_f)

    The two linear layers and the scale s are shared by the blocks. The link to object queries is left out, since the
    head has none.
    """

    def __init__(self, depth: int, dim: int, num_tokens: int = 100, rank: int = 16, patch_size: int = 14) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * patch_size**2 + math.sqrt(dim * rank)))
        self.a = nn.Parameter(torch.empty(depth, num_tokens, rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.empty(depth, rank, dim).uniform_(-bound, bound))
        self.token_to_feature = nn.Linear(dim, dim)
        self.delta = nn.Linear(dim, dim)
        for linear in (self.token_to_feature, self.delta):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            nn.init.zeros_(linear.bias)
        self.scale = nn.Parameter(torch.tensor(0.001))

    def forward(self, patches: Tensor, layer: int) -> Tensor:
        tokens = self.a[layer] @ self.b[layer]
        similarity = (patches @ tokens.T * patches.shape[-1] ** -0.5).softmax(dim=-1)
        drawn = similarity[..., 1:] @ self.token_to_feature(tokens[1:])
        refined: Tensor = patches + self.scale * self.delta(patches + drawn)
        return refined


def add_rein(vit: Any, blocks: Sequence[nn.Module]) -> None:
    """Refines the patch tokens after each block."""
    vit.requires_grad_(False)
    vit.rein = Rein(len(blocks), vit.config.hidden_size, patch_size=vit.config.patch_size)
    for index, block in enumerate(blocks):

        def refine(_block: nn.Module, _args: object, tokens: Tensor, index: int = index) -> Tensor:
            return torch.cat([tokens[:, :1], vit.rein(tokens[:, 1:], index)], dim=1)

        block.register_forward_hook(refine, prepend=True)
