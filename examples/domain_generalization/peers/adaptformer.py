"""AdaptFormer, written from the equations of arXiv 2205.13535."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class ParallelAdapter(nn.Module):
    """A bottleneck beside the MLP of a block: x + MLP(LN(x)) + s * relu(x W_down) W_up, with W_up zero at first."""

    def __init__(self, dim: int, rank: int = 64, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(self.down(x)), self.dropout, self.training)
        added: Tensor = self.scale * self.up(hidden)
        return added


def add_adaptformer(vit: Any, blocks: Sequence[nn.Module]) -> None:
    """Adds what the adapter makes of the MLP branch's input to the block's output."""
    vit.requires_grad_(False)
    vit.adapters = nn.ModuleList(ParallelAdapter(vit.config.hidden_size) for _ in blocks)
    for index, block in enumerate(blocks):
        beside: list[Tensor] = []

        def branch(_norm: nn.Module, args: tuple[Tensor, ...], index: int = index, beside: list[Tensor] = beside) -> None:
            beside[:] = [vit.adapters[index](args[0])]

        def add(_block: nn.Module, _args: object, tokens: Tensor, beside: list[Tensor] = beside) -> Tensor:
            return tokens + beside.pop()

        block.get_submodule("norm2").register_forward_pre_hook(branch)
        block.register_forward_hook(add, prepend=True)
