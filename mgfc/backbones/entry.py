"""Where a low-rank adapter sits in a block: around its first linear layers, and around what PEFT put around those."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mgfc.backbones.description import first_outputs
from mgfc.backbones.tuners import tuner_layers
from mgfc.errors import UnsupportedBackboneError


def adapted_layers(block: nn.Module) -> Iterator[tuple[nn.Module, slice]]:
    """The modules whose output low-rank adapters adapt, each with its place among the channels of all.

    Where PEFT adapts such a layer, too, its own layer counts, which gives what both are to add to: methods that scale or
    rotate what the layer computes, as DoRA, IA3 and OFT do, then leave the low-rank adapter's share alone, and can be
    merged.

    Raises:
        UnsupportedBackboneError: if PEFT runs a copy of more than the layer.
    """
    layers = list(tuner_layers(block))
    for linear, channels in first_outputs(block):
        outer = linear
        for name, layer, wrapped in reversed(layers):  # the innermost first
            if wrapped is outer:
                outer = layer
            elif hasattr(layer, "original_module") and any(part is linear for part in wrapped.modules()):
                raise UnsupportedBackboneError(
                    f"{type(block).__name__}: expected its feed-forward network's first linear layer to run, found that PEFT's "
                    f"modules_to_save runs a copy of {name}. Leave it out of modules_to_save, or name the layer alone."
                )
        yield outer, channels
