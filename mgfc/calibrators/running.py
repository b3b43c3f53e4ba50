from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mgfc.distributed import is_replica, sum_over_processes

D = TypeVar("D")


def is_recomputing() -> bool:
    """Whether this is activation checkpointing's second pass, which runs inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def statistics_in_words(num_batches: int | None, is_observed: bool) -> str | None:
    """How many batches running statistics are of, and when they were gathered; None if there are none.

    Args:
        num_batches: in them; None for calibrators without any.
        is_observed: whether they were gathered after training, in one pass over the source.
    """
    if not num_batches:
        return None if num_batches is None else "statistics of no batch yet: coarse and medium calibration have no effect"
    return f"statistics of {num_batches} batches, gathered {'after' if is_observed else 'during'} training"


def is_traced() -> bool:
    """Whether tensors may have no values to look at: under compile, export, `torch.jit.trace` and `torch.func`."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@contextmanager
def as_one_batch(module: nn.Module) -> Iterator[None]:
    """Within it, the images of a batch may pass one by one: running means are updated by all of them at the end."""
    means = [part for part in module.modules() if isinstance(part, RunningMean)]
    for mean in means:
        mean.held = []
    try:
        yield
    finally:
        found = [mean.held for mean in means]
        for mean in means:
            mean.held = None
    for mean, values in zip(means, found, strict=True):
        if values:
            # In the first batch every image offers a start, of which one has to be taken.
            mean.observe(torch.cat(values) if mean.count else values[0])


class _Derived(dict[str, Any]):
    """What was derived from a mean. Copies and files of a model start without."""

    def __deepcopy__(self, memo: object) -> _Derived:
        return _Derived()

    def __reduce__(self) -> tuple[type[_Derived], tuple[()]]:
        return _Derived, ()


class RunningMean(nn.Module):
    """The mean of what training images showed: plain at first, then exponential, as in BatchNorm.

    It is kept as a weighted sum and the sum of the weights. Whatever linear mixture of two states is taken, as moving
    averages of a model and merged adapters do, its mean is then the weighted mean of theirs, also if one is empty.

    Args:
        *shape: of the tensor that is averaged.
        window: images after which a new one weighs as much as in a mean of so many.

    Attributes:
        observing: whether values are added in eval mode, too.
        held: where values are kept instead of being added; None to add them.
    """

    total: Tensor
    weight: Tensor
    count: Tensor
    observed: Tensor

    def __init__(self, *shape: int, window: int = 200) -> None:
        super().__init__()
        self.window = window
        self.observing = False
        self.held: list[Tensor] | None = None
        self._derived = _Derived()
        self.register_buffer("total", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))  # batches
        self.register_buffer("observed", torch.zeros(()))  # 1 if they were gathered after training, in one pass

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        """Moves as any module does, but stays in full precision: a variance is a small difference of large numbers."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if buffer is not None and torch.finfo(moved.dtype).bits < 32:
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def value(self) -> Tensor:
        """The mean; zeros before the first batch."""
        return torch.where(self.weight > 0, self.total / self.weight, 0)

    def derive(self, function: Callable[[Tensor], D]) -> D:
        """What a function makes of the mean; computed anew only after the mean changed.

        Always the same function.
        """
        total = self.total
        if torch.compiler.is_compiling() or total.is_inference() or is_replica(self):
            return function(self.value)
        known, versions = self._derived, (total._version, self.weight._version)
        if known.get("of") is not total or known["versions"] != versions:
            with torch.inference_mode(False), torch.no_grad():  # a later forward may want gradients
                result = function(self.value)
            known.update({"of": total, "versions": versions, "result": result})
            return result
        return known["result"]  # type: ignore[no-any-return]

    @property
    def ready(self) -> Tensor:
        """1 if there is a mean, else 0."""
        return (self.weight > 0).to(self.weight.dtype)

    def start_observing(self) -> list[Tensor]:
        """Forgets all values; from now on they are added in eval mode, too. Returns the state of before."""
        before = [buffer.clone() for buffer in self.buffers()]
        for buffer in self.buffers():
            buffer.zero_()
        self.observing = True
        return before

    def give_up(self, before: list[Tensor]) -> None:
        """Takes the state of before `start_observing` back."""
        self.observing = False
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)

    def stop_observing(self) -> None:
        """Keeps the mean of what was added since `start_observing`."""
        self.observing = False
        self.observed.copy_(self.ready)

    def set(self, value: Tensor, count: float = 1) -> None:
        """Makes a tensor the mean, as if so many batches had shown it."""
        self.total.copy_(value)
        self.weight.fill_(1)
        self.count.fill_(count)

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """In training mode, adds what each image of a batch showed: (B, *shape), of all processes together.

        An image with a value that is not finite is left out.
        """
        if not (self.training or self.observing) or is_recomputing():
            return
        if self.held is not None:
            self.held.append(values)
            return
        finite = values.isfinite().flatten(1).all(dim=1)
        values = torch.where(finite.view(-1, *[1] * (values.ndim - 1)), values, 0).to(self.total.dtype)
        total, number = sum_over_processes(values.sum(dim=0)), sum_over_processes(finite.sum().to(self.total.dtype))
        self.count += number > 0
        share = (number > 0) * torch.maximum(1 / self.count.clamp_min(1), number / self.window).clamp_max(1)
        self.total += share * (total / number.clamp_min(1) - self.total)
        self.weight += share * (1 - self.weight)
        if not self.observing:
            self.observed.zero_()
