"""Adapters of format 1, read as those of today."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgfc.storage.tensors import Entry

_RENAMED = (
    (re.compile(r"^(layers\.\d+)\.(down|up)\.weight$"), r"\1.low_rank.\2"),
    (re.compile(r"^(layers\.\d+\.medium\.source)\.value$"), r"\1.total"),
)
_DROPPED = re.compile(r"^layers\.\d+\.coarse\.")
_COUNT = re.compile(r"^(layers\.\d+\.medium\.source)\.count$")


def upgrade_calibration(values: Mapping[str, Any]) -> dict[str, Any]:
    """The dict form of a format-1 `MGFCConfig` as one of today, with the same meaning.

    A missing stage meant its defaults of then. Blocks of the coarse stage, which calibrated features, are gone.
    """
    upgraded = {"coarse": {}, "medium": {}, "fine": {}} | dict(values)
    if isinstance(upgraded["medium"], dict):
        upgraded["medium"] = {"layers": "last:4", "threshold": 1.0} | upgraded["medium"]
    if isinstance(upgraded["coarse"], dict):
        upgraded["coarse"] = {key: value for key, value in upgraded["coarse"].items() if key != "layers"}
    return upgraded


def upgrade_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """A header of format 1 under today's names; what format 1 did not know is not in it."""
    return {_renamed(name): entry for name, entry in entries.items() if not _DROPPED.match(name)}


def upgrade_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of format 1 under today's names, a running mean as a sum and its weight."""
    upgraded = {_renamed(name): value for name, value in tensors.items() if not _DROPPED.match(name)}
    for name, value in tensors.items():
        match = _COUNT.match(name)
        if match:
            upgraded[f"{match[1]}.weight"] = value.clamp(0, 1)
            upgraded[f"{match[1]}.observed"] = torch.zeros_like(value)
    return upgraded


def is_new_since(name: str) -> bool:
    """Whether a tensor of today has no counterpart in format 1: it is filled as in a fresh adapter."""
    return name.startswith("coarse.") or name.endswith((".medium.source.weight", ".medium.source.observed"))


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def warn_of_format(source: str, stacklevel: int) -> None:
    """Says what changed since format 1, and what to do."""
    warnings.warn(
        f"{source} is of format 1. Its coarse stage calibrated features and is no longer used; today's calibrates images, and "
        "has no statistics yet: `with backbone.calibration.observing(): ...` on images of the source fills them. Its low-rank "
        "adapter now adapts class and register tokens, too. Then save it again.",
        stacklevel=stacklevel,
    )
