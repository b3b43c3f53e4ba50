from __future__ import annotations

import torch
from torch import Tensor, nn


def is_recomputing() -> bool:
    """Whether this is activation checkpointing's second pass, which runs inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RunningMean(nn.Module):
    """The mean of what training batches showed, as in BatchNorm: plain at first, then exponential.

    What one forward saw counts from the next forward on. So a forward uses what came before it alone, a fresh module
    has no effect on its first batch, and activation checkpointing recomputes with the values of its own forward.

    Args:
        *shape: of the tensor that is averaged.
        momentum: least weight of a new value.
    """

    value: Tensor
    count: Tensor
    _next: Tensor
    _has_next: Tensor

    def __init__(self, *shape: int, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("_next", torch.zeros(shape), persistent=False)
        self.register_buffer("_has_next", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def step(self) -> None:
        """Takes in what the last forward saw."""
        self.count += self._has_next
        weight = (1 / self.count.clamp_min(1)).clamp_min(self.momentum) * self._has_next
        self.value += weight * (self._next - self.value)
        self._has_next.zero_()

    @torch.no_grad()
    def observe(self, value: Tensor) -> None:
        """Leaves a value for the next `step`."""
        self._next.copy_(value)
        self._has_next.fill_(1)

    @property
    def ready(self) -> Tensor:
        """1 once something was taken in, else 0."""
        return self.count.clamp_max(1)
