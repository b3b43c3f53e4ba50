"""What little the library needs to know of `torch.distributed`, of DeepSpeed and of accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn


def process() -> tuple[int, int]:
    """Rank of this process, and how many there are: 0 and 1 without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_replica(module: nn.Module) -> bool:
    """Whether it is a copy that `nn.DataParallel` made for one forward on another device."""
    return getattr(module, "_is_replica", False)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of what every process holds. All of them have to call it."""
    if process()[1] == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def gathered(*modules: nn.Module | None) -> AbstractContextManager[None]:
    """Within it, parameters that DeepSpeed's ZeRO-3 sharded are in one piece; all processes have to enter."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[None] = zero.GatheredParameters(parameters)
    return context


def at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, tensors of a module's own that accelerate keeps elsewhere are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(module)
    return context


def whole(value: Tensor) -> Tensor:
    """A sharded tensor in one piece, which all processes have to ask for; any other as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
