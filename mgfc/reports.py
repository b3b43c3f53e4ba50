"""What a calibration is and does, in words: one forward as its blocks saw it, and a table of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mgfc.adapter import STAGES, Adapter
from mgfc.backbones.modes import evaluating
from mgfc.blocks import BlockHooks, BlockReport
from mgfc.calibrators import CalibLayer
from mgfc.calibrators.running import statistics_in_words
from mgfc.errors import CalibrationError
from mgfc.images import ImageHook


@torch.no_grad()
def check(
    blocks: Sequence[BlockHooks],
    images: ImageHook,
    adapter: Adapter,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[BlockReport]:
    """Runs one forward of a model and reports what each calibrated block saw.

    Args:
        blocks: hooks of the backbone's blocks.
        images: the hook before its patch embedding.
        adapter: the active one.
        model: the backbone, or a host that should reach every block.
        args: of the forward.
        kwargs: of the forward.

    Raises:
        CalibrationError: naming the blocks that the forward did not call.

    Warns:
        UserWarning: if no images reached the coarse stage.
    """
    images.called = False
    for hooks in blocks:
        hooks.watch(True)
    try:
        with evaluating(model):
            model(*args, **kwargs)
        reports = {hooks.index: hooks.report for hooks in blocks if hooks.report is not None}
        adapted = {hooks.index for hooks in blocks if hooks.adapted is not None}
    finally:
        for hooks in blocks:
            hooks.watch(False)
    calibrated = {int(key): layer for key, layer in adapter.layers.items()}
    passed_by = calibrated.keys() - reports.keys()
    _require_none(
        model,
        [hooks.name for hooks in blocks if hooks.index in passed_by],
        "every calibrated block to be called",
        "The model runs their parts itself: their low-rank adapters have an effect, but the stages behind a block have none."
        if passed_by & adapted
        else "The model skips them or runs their parts itself, so that their calibrators have no effect.",
    )
    with_low_rank = {i for i, layer in calibrated.items() if isinstance(layer, CalibLayer) and layer.low_rank is not None}
    _require_none(
        model,
        [hooks.name for hooks in blocks if hooks.index in with_low_rank - adapted],
        "the first linear layer of every block's feed-forward network to be called",
        "They use its weight in another way, so that their low-rank adapters have no effect.",
    )
    if adapter.coarse is not None and not images.called:
        warnings.warn("The coarse stage saw no images of shape (B, C, H, W), so that it has no effect.", stacklevel=3)
    return list(reports.values())


def _require_none(model: nn.Module, missing: Sequence[str], expected: str, reason: str) -> None:
    if missing:
        raise CalibrationError(
            f"{type(model).__name__}: expected {expected}, found that these blocks were passed by: {', '.join(missing)}. "
            f"{reason} Leave them out with MGFCConfig(layers=...), or call them."
        )


def summary(block_names: Sequence[str], adapter: Adapter, num_backbone: int) -> str:
    """A table of trainable parameters per block and granularity, their share of the backbone, and batches seen.

    Args:
        block_names: of the backbone.
        adapter: the active one.
        num_backbone: parameters of the backbone.
    """
    rows = [(block_names[index], counts) for index, counts in adapter.count_stages()]
    shared = sum(p.numel() for n, p in adapter.named_parameters() if not n.startswith("layers."))
    width = max([len(name) for name, _ in rows] + [len("shared")])
    lines = ["  ".join([" " * width, *(f"{stage:>10}" for stage in STAGES)])]
    lines += ["  ".join([f"{name:<{width}}", *(f"{counts[stage]:>10,}" for stage in STAGES)]) for name, counts in rows]
    lines.append(f"{'shared':<{width}}  {shared:>10,}  ({'heads of the losses' if adapter.maps is None else 'linear layers'})")
    own = adapter.num_parameters
    lines.append(f"{own:,} parameters, {100 * own / num_backbone:.2f} % of the backbone's {num_backbone:,}")
    statistics = statistics_in_words(adapter.num_batches, adapter.is_observed)
    if statistics is not None:
        lines.append(statistics)
    if not any(parameter.requires_grad for parameter in adapter.parameters()) and adapter.num_parameters:
        lines.append("The parameters are frozen: a training would not change them.")
    return "\n".join(lines)
