"""What a calibration is and does, in words: one forward as its blocks saw it, and a table of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mgfc.adapter import GRANULARITIES
from mgfc.backbones.grid import Grid
from mgfc.calibrators import CalibLayer
from mgfc.errors import CalibrationError

if TYPE_CHECKING:
    from mgfc.calibration import Calibration


@dataclass(frozen=True)
class BlockReport:
    """What one calibrated block saw in a forward.

    Args:
        name: the block's name in the backbone.
        shape: of the block's tensor.
        grid: (h, w) of its patches, or None where it has none.
        num_patches: patches refined in each image.
        leading: extra tokens before the patches, passed through.
        trailing: extra tokens after them, passed through.
        changed: whether refinement changed anything; False in a fresh calibration.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid | None
    num_patches: int
    leading: int
    trailing: int
    changed: bool

    def __str__(self) -> str:
        grid = "no grid, fine stage skipped" if self.grid is None else f"grid {self.grid[0]} x {self.grid[1]}"
        extra = f"{self.leading} leading and {self.trailing} trailing tokens passed through"
        return f"{self.name}: {self.num_patches} patches, {grid}, {extra}, {'refined' if self.changed else 'unchanged'}"


@torch.no_grad()
def check(calibration: Calibration, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[BlockReport]:
    """Runs one forward of a model and reports what each calibrated block saw, as `Calibration.check` says."""
    modes = {module: module.training for module in model.modules()}
    for hooks in calibration.blocks:
        hooks.watch(True)
    try:
        model.eval()
        model(*args, **kwargs)
        called = {hooks.index: hooks.report for hooks in calibration.blocks if hooks.report is not None}
        adapted = {hooks.index for hooks in calibration.blocks if hooks.adapted is not None}
    finally:
        for hooks in calibration.blocks:
            hooks.watch(False)
        for module, mode in modes.items():
            module.training = mode
    layers = {int(key): layer for key, layer in calibration.layers.items()}
    _require_none(
        model,
        [calibration.block_names[index] for index in layers if index not in called],
        "every calibrated block to be called",
        "The model skips them or runs their parts itself, so that their calibrators have no effect.",
    )
    with_bottleneck = [index for index, layer in layers.items() if isinstance(layer, CalibLayer)]
    _require_none(
        model,
        [calibration.block_names[index] for index in with_bottleneck if index not in adapted],
        "the first linear map of every block's feed-forward network to be called",
        "They use its weight in another way, so that their bottlenecks have no effect.",
    )
    return list(called.values())


def _require_none(model: nn.Module, missing: Sequence[str], expected: str, reason: str) -> None:
    if missing:
        raise CalibrationError(
            f"{type(model).__name__}: expected {expected}, found that these blocks were passed by: {', '.join(missing)}. "
            f"{reason} Leave them out with MGFCConfig(layers=...), or call them."
        )


def summary(calibration: Calibration) -> str:
    """A table of trainable parameters, as `Calibration.summary` says."""
    adapter = calibration.adapter
    rows = [(calibration.block_names[index], counts) for index, counts in adapter.count_stages()]
    shared = sum(p.numel() for n, p in adapter.named_parameters() if not n.startswith("layers."))
    columns = ("bottleneck", *GRANULARITIES)
    width = max([len(name) for name, _ in rows] + [len("shared")])
    lines = ["  ".join([" " * width, *(f"{column:>10}" for column in columns)])]
    lines += ["  ".join([f"{name:<{width}}", *(f"{counts[c]:>10,}" for c in columns)]) for name, counts in rows]
    lines.append(f"{'shared':<{width}}  {shared:>10,}  ({'heads of the losses' if adapter.maps is None else 'linear maps'})")
    own = calibration.num_parameters
    backbone = sum(p.numel() for p in calibration.backbone.parameters()) - sum(p.numel() for p in calibration.parameters())
    lines.append(f"{own:,} parameters, {100 * own / backbone:.2f} % of the backbone's {backbone:,}")
    if calibration.num_batches is not None:
        lines.append(f"statistics of {calibration.num_batches} training batches")
    return "\n".join(lines)
