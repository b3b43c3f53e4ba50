"""Low-rank adapters in the weights of the layers that they adapt, for inference, and out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgfc.adapter import Adapter
from mgfc.backbones.description import first_outputs, linear_size, weight_of
from mgfc.backbones.tuners import tuner_layers
from mgfc.blocks import BlockHooks
from mgfc.calibrators import CalibLayer, LowRank
from mgfc.errors import CalibrationError


@torch.no_grad()
def fuse(root: nn.Module, blocks: Sequence[BlockHooks], adapter: Adapter) -> list[tuple[nn.Parameter, Tensor]]:
    """Adds what the low-rank adapters compute to the weights of a backbone.

    Args:
        root: the backbone.
        blocks: hooks of its blocks.
        adapter: whose low-rank adapters are fused.

    Returns:
        The weights that were changed, each with what it held before.

    Raises:
        CalibrationError: if a weight is quantised, sharded or under an adapter of PEFT's; nothing is changed then.
    """
    places = list(_places(root, blocks, adapter))
    for name, linear, _, _ in places:
        _require_plain(root, name, linear)
    kept = [(linear.weight, linear.weight.detach().clone()) for _, linear, _, _ in places]
    for _, linear, low_rank, channels in places:
        linear.weight += low_rank.weight(channels).view_as(linear.weight).to(linear.weight.dtype)
    return kept


@torch.no_grad()
def unfuse(kept: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Gives the weights back what they held before."""
    for weight, before in kept:
        weight.copy_(before)


def _places(root: nn.Module, blocks: Sequence[BlockHooks], adapter: Adapter) -> Iterator[tuple[str, Any, LowRank, slice]]:
    """The linear layers that low-rank adapters adapt, by block name, with the channels of theirs."""
    layers = dict(adapter.layers.items())
    for hooks in blocks:
        layer = layers.get(str(hooks.index))
        if not isinstance(layer, CalibLayer) or layer.low_rank is None:
            continue
        for linear, channels in first_outputs(root.get_submodule(hooks.name)):
            yield hooks.name, linear, layer.low_rank, channels


def _require_plain(root: nn.Module, name: str, linear: Any) -> None:
    weight, wrapped = weight_of(linear), {id(module) for _, _, module in tuner_layers(root)}
    problem = None
    if id(linear) in wrapped:
        problem = "an adapter of PEFT's sits on it, too. Merge that one first (merge_and_unload)"
    elif weight is None or weight.is_meta:
        problem = "it is offloaded or has no values. Leave it unfused"
    elif type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.numel() != _size(linear):
        problem = f"its weight is {type(weight).__name__} of {weight.dtype}: quantised or sharded. Leave it unfused"
    if problem is not None:
        raise CalibrationError(f"Block {name!r}: expected a plain weight to fuse the low-rank adapter into, but {problem}.")


def _size(linear: Any) -> int:
    inputs, outputs = linear_size(linear)
    return inputs * outputs
