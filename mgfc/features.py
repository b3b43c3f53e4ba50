"""Feature maps of chosen blocks, from any supported backbone, wrapped or bare."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.backbones.description import block_widths, is_hierarchical, max_extra_tokens, token_orders
from mgfc.backbones.detection import find_tower
from mgfc.backbones.grid import GridTracker, stem_hooks
from mgfc.backbones.layout import pick_tensor, view_patches
from mgfc.calibrators.running import is_recomputing
from mgfc.distributed import gathered, is_replica
from mgfc.errors import CalibrationError, ConfigError


class _Forward(threading.local):
    """The maps of the forward that this thread is in, by block; None outside."""

    maps: dict[int, Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Forward], tuple[()]]:
        return _Forward, ()


class FeatureMaps(nn.Module):
    """Runs a backbone and returns what leaves chosen blocks as maps, ready for any segmentation head.

    The backbone may be wrapped before or after; its calibrators' refinement is in the maps. No final norm is applied.
    Threads may run one model at once.

    Args:
        backbone: a timm or Transformers vision transformer, or a host of one.
        out_indices: blocks to return, in order; negative ones count from the end.
        scales: per map a factor for its height and width, e.g. (4, 2, 1, 0.5) for the pyramid that convolutional
            decoders expect; None to leave them as they are. Sizes are multiples of the smallest one's, which is rounded up:
            a 37 x 37 grid gives 152, 76, 38 and 19.
        blocks: as in `wrap_backbone`.

    Attributes:
        channels: channels of each map.

    Raises:
        UnsupportedBackboneError: if there is no vision transformer in `backbone`.
        ConfigError: if an index or the scales do not fit.

    Examples:
        >>> import timm, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
        >>> [tuple(m.shape) for m in FeatureMaps(vit, (5, 11), scales=(2, 1))(torch.randn(1, 3, 96, 64))]
        [(1, 192, 12, 8), (1, 192, 6, 4)]
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_indices: Sequence[int],
        scales: Sequence[float] | None = None,
        *,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        with gathered(backbone):
            tower = find_tower(backbone, blocks)
            widths = [block_widths(block).dim for block in tower.modules()]
            self._orders = token_orders(tower)
            self._tracker = GridTracker(max_extra_tokens(tower), is_hierarchical(tower))
        depth = len(widths)
        if not out_indices or not all(-depth <= index < depth for index in out_indices):
            raise ConfigError(f"out_indices: expected block indices of a backbone of {depth} blocks, found {out_indices!r}.")
        if scales is not None and (len(scales) != len(out_indices) or min(scales) <= 0):
            raise ConfigError(f"scales: expected a number above 0 for each of {len(out_indices)} maps, found {scales!r}.")
        self.backbone = tower.root
        self.out_indices = tuple(index % depth for index in out_indices)
        self.scales = None if scales is None else tuple(scales)
        modules = tower.modules()
        self.channels = [widths[index] for index in self.out_indices]
        self._forward = _Forward()
        self._handles = stem_hooks(tower.root, tower.blocks, self._tracker)
        for index in sorted(set(self.out_indices)):
            capture = functools.partial(self._capture, index)
            self._handles.append(modules[index].register_forward_hook(capture, with_kwargs=True))
        parameters = inspect.signature(tower.root.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def remove(self) -> None:
        """Takes its hooks from the backbone, which is then as it was; this object is of no more use."""
        for handle in self._handles:
            handle.remove()

    def _capture(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = pick_tensor(output)
        if tensor is None:
            return
        dim = self.channels[self.out_indices.index(index)]
        if index == min(self.out_indices) and not is_recomputing():
            self._tracker.begin()
        self._tracker.enter(args, kwargs)
        view = view_patches(tensor, dim, self._orders[index], self._tracker, output)
        # Conditional work would make a checkpoint's recomputation differ from its forward, so only the storing is.
        maps = self._forward.maps
        if maps is not None and view.grid is not None and not is_recomputing():
            maps[index] = rearrange(view.patches, "b (h w) c -> b c h w", h=view.grid[0])

    def forward(self, images: Tensor, **kwargs: Any) -> list[Tensor]:
        """Runs the backbone.

        Args:
            images: (B, C, H, W).
            **kwargs: passed on to the backbone.

        Returns:
            One (B, C, h, w) map for each of `out_indices`.

        Raises:
            CalibrationError: if a block was not called or its patches have no grid.
        """
        found: dict[int, Tensor] = {}
        self._forward.maps = found
        if is_replica(self.backbone) and hasattr(self.backbone, "calibration"):
            self.backbone.calibration.active.enter(self.backbone)  # type: ignore[union-attr, operator]
        try:
            run = getattr(self.backbone, "forward_features", self.backbone)
            run(images, **{**self._options, **kwargs})
        finally:
            self._forward.maps = None
        missing = [index for index in self.out_indices if index not in found]
        if missing:
            raise CalibrationError(
                f"{type(self.backbone).__name__}: expected a map from block {missing[0]}, found that it was not called or "
                "that its patches have no grid (masked or padded input)."
            )
        maps = [found[index] for index in self.out_indices]
        if self.scales is None:
            return maps
        return [_resize(item, scale, min(self.scales)) for item, scale in zip(maps, self.scales, strict=True)]


def _resize(item: Tensor, scale: float, least: float) -> Tensor:
    """A map of a pyramid, whose sizes are multiples of the smallest one's, as decoders that double them need."""
    if scale == least == 1:
        return item
    times = Fraction(scale) / Fraction(least)
    size = [math.ceil(length * least) * times.numerator // times.denominator for length in item.shape[2:]]
    return F.interpolate(item, size=size, mode="bilinear", align_corners=False)
