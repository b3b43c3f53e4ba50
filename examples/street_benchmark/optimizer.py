"""AdamW as published: rates and weight decay by parameter, and a polynomial schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from street_benchmark.settings import POWER, WEIGHT_DECAY, Settings

# Embeddings of queries and levels, and Rein's tokens and scale, are not pulled to 0; nor are normalisation layers.
FREE = ("queries_embedder", "queries_features", "level_embed", ".tokens", ".basis", "shared.scale")


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Groups of what is trained: of backbone and head, with and without weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, normalises in _parameters(model):
        if parameter.requires_grad:
            rate = settings.head_lr if name.startswith("head.") else settings.lr
            decay = 0.0 if normalises or any(part in name for part in FREE) else WEIGHT_DECAY
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": found, "lr": rate, "initial_lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
    )


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each parameter once, by name, with whether it belongs to a normalisation layer."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}", parameter, isinstance(module, (nn.LayerNorm, nn.GroupNorm))


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """The learning rates of a step, counted from 0: (1 - step / steps) ** 0.9 of the first ones."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - step / steps) ** POWER
