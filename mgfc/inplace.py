"""Whether what a layer computed may be written to, since nobody else can hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mgfc.calibrators.running import is_traced
from mgfc.tree import owner_of

# Layers that are known to compute a tensor of their own, as long as nobody gave them another forward.
_FORWARDS: dict[type, Callable[..., Any]] = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}
_GLOBAL = nn.modules.module


def may_write(output: Tensor, layer: nn.Module, owner: object, reader: nn.Module) -> bool:
    """Whether a hook may write into a tensor: it is the first to see it, and no graph, mode or other hook can hold it.

    A hook that ran before and has removed itself since is not noticed.

    Args:
        output: what the layer computed.
        layer: PyTorch's own, else the answer is no.
        owner: whose hook asks.
        reader: the module that the hook passes the tensor to, which may have hooks, too.
    """
    if torch.is_grad_enabled() or is_traced() or type(output) is not Tensor:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if "forward" in vars(layer) or _FORWARDS.get(type(layer)) is not type(layer).forward:
        return False
    hooks = reader._forward_hooks, reader._forward_pre_hooks, _GLOBAL._global_forward_hooks, _GLOBAL._global_forward_pre_hooks
    return not any(hooks) and owner_of(next(iter(layer._forward_hooks.values()))) is owner
