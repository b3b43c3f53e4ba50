"""VPT-deep, written from the description in arXiv 2203.12119."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def add_prompts(vit: Any, blocks: Sequence[nn.Module], count: int = 20) -> None:
    """Each block sees `count` prompts of its own beside the tokens; what becomes of them is dropped after it."""
    vit.requires_grad_(False)
    bound = math.sqrt(6 / (3 * vit.config.patch_size**2 + vit.config.hidden_size))
    vit.prompts = nn.Parameter(torch.empty(len(blocks), count, vit.config.hidden_size).uniform_(-bound, bound))
    for index, block in enumerate(blocks):

        def insert(_block: nn.Module, args: tuple[Tensor, ...], index: int = index) -> tuple[Tensor, ...]:
            prompts = vit.prompts[index].expand(len(args[0]), -1, -1)
            return torch.cat([args[0], prompts], dim=1), *args[1:]

        def remove(_block: nn.Module, _args: object, tokens: Tensor) -> Tensor:
            return tokens[:, :-count]

        block.register_forward_pre_hook(insert)
        block.register_forward_hook(remove, prepend=True)
