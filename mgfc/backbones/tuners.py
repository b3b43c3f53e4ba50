"""Layers that the `peft` library put into a backbone, told by their classes without importing it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_BASES = {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """PEFT's layers in a model, by name, each with the module that it wraps."""
    for name, module in model.named_modules():
        if any(base.__name__ in _BASES for base in type(module).__mro__):
            wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            if isinstance(wrapped, nn.Module):
                yield name, module, wrapped


def tuner_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that PEFT put into a model: all under its layers except what they wrap."""
    found: set[int] = set()
    for _, layer, wrapped in tuner_layers(model):
        found |= {id(p) for p in layer.parameters()} - {id(p) for p in wrapped.parameters()}
    return found


def own_name(name: str) -> str:
    """A parameter's name as it is without PEFT's layers around its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without what PEFT added: each of its layers is left out, what it wraps stands."""
    layers = {name: wrapped for name, _, wrapped in tuner_layers(model)}
    kept = {id(part) for wrapped in layers.values() for part in wrapped.modules()}
    inside = tuple(f"{name}." for name in layers)
    for name, module in model.named_modules():
        if id(module) in kept or (name not in layers and not name.startswith(inside)):
            yield name, module
