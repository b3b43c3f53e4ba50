"""What little the library needs to know of `torch.distributed`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def process() -> tuple[int, int]:
    """Rank of this process, and how many there are: 0 and 1 without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of what every process holds. All of them have to call it."""
    _, size = process()
    if size == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / size


def whole(value: Tensor) -> Tensor:
    """A sharded tensor in one piece, which all processes have to ask for; any other as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
