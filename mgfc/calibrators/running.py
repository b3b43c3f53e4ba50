from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mgfc.distributed import mean_over_processes


def is_recomputing() -> bool:
    """Whether this is activation checkpointing's second pass, which runs inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def as_one_batch(module: nn.Module) -> Iterator[None]:
    """Within it, the images of a batch may pass one by one: running means take them in together at the end."""
    means = [part for part in module.modules() if isinstance(part, RunningMean)]
    held: list[list[Tensor]] = [[] for _ in means]
    for mean, values in zip(means, held, strict=True):
        mean._held = values
    try:
        yield
    finally:
        for mean in means:
            mean._held = None
    for mean, values in zip(means, held, strict=True):
        if values:
            # In the first batch every image offers a start, of which one has to be taken.
            mean.observe(torch.stack(values).mean(dim=0) if mean.count else values[0])


class RunningMean(nn.Module):
    """The mean of what training batches showed, as in BatchNorm: plain at first, then exponential.

    Args:
        *shape: of the tensor that is averaged.
        momentum: least weight of a new value.
    """

    value: Tensor
    count: Tensor

    def __init__(self, *shape: int, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self._held: list[Tensor] | None = None
        self.register_buffer("value", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        """Moves as any module does, but stays in full precision: a variance is a small difference of large numbers."""
        before = {"value": self.value, "count": self.count}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if torch.finfo(moved.dtype).bits < 32:
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def ready(self) -> Tensor:
        """1 if there is a mean, else 0."""
        return self.count.clamp_max(1)

    @torch.no_grad()
    def observe(self, value: Tensor) -> None:
        """In training mode, adds what a batch showed: of all processes, which share it equally."""
        if not self.training or is_recomputing():
            return
        if self._held is not None:
            self._held.append(value)
            return
        self.count += 1
        self.value += (1 / self.count).clamp_min(self.momentum) * (mean_over_processes(value) - self.value)
