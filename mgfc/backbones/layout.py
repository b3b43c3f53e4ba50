"""How a block's output holds its patch tokens, and how to put refined ones back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mgfc.backbones.grid import Grid, GridTracker

_WINDOWS = "(b y x) (h w) c -> b (y h x w) c"
_RASTER = "b (y h x w) c -> (b y x) (h w) c"


class RasterOrder:
    """Patches stand in raster order between leading and trailing extra tokens: the rule.

    Args:
        leading: learnt tokens before the patches; used only where there is no grid to count the patches by.
        trailing: learnt tokens after the patches.
    """

    def __init__(self, leading: int, trailing: int = 0) -> None:
        self.leading = leading
        self.trailing = trailing

    def view(self, tokens: Tensor, grid: Grid | None) -> PatchView:
        """Splits (B, N, C) into patches and extra tokens."""
        end = tokens.shape[1] - self.trailing
        leading = self.leading if grid is None else end - grid[0] * grid[1]
        return PatchView(tokens[:, leading:end], grid, leading, self.trailing)


class MaskUnitOrder:
    """Hiera: patches are grouped by mask unit; the model's own `reroll` tells where each belongs.

    Args:
        owner: the module that has `reroll`.
        stage: its second argument for this block.
    """

    def __init__(self, owner: nn.Module, stage: int) -> None:
        self.owner: Any = owner
        self.stage = stage

    def view(self, tokens: Tensor, grid: Grid | None) -> PatchView:
        """Brings (B, N, C) into raster order; masked input has no grid and stays as it is."""
        num_tokens = tokens.shape[1]
        size = self._size()
        if size[0] * size[1] != num_tokens:
            return PatchView(tokens, None)
        places = torch.arange(num_tokens, device=tokens.device).view(1, -1, 1)
        order = self.owner.reroll(places, self.stage)
        height, width = order.shape[1:3]
        return PatchView(tokens[:, order.flatten()], (height, width), inverse=order.flatten().argsort())

    def _size(self) -> Grid:
        schedule = getattr(self.owner.reroll, "schedule", None) or self.owner.schedule
        height, width = schedule[self.stage][1]
        return height, width


class WindowOrder:
    """LW-DETR and RF-DETR: each image is split into `side` x `side` windows along the batch axis.

    Args:
        side: windows along each axis of an image.
        leading: extra tokens before the patches of each window.
    """

    def __init__(self, side: int, leading: int) -> None:
        self.side = side
        self.leading = leading

    def view(self, tokens: Tensor, grid: Grid | None) -> PatchView:
        """Joins the windows of each image into one raster: (B*side*side, extra + n, C) -> (B, h*w, C)."""
        if grid is None:
            return PatchView(tokens, None)
        patches = tokens[:, self.leading :]
        patches = rearrange(patches, _WINDOWS, y=self.side, x=self.side, h=grid[0] // self.side)
        return PatchView(patches, grid, self.leading, windows_side=self.side)


Order = RasterOrder | MaskUnitOrder | WindowOrder


@dataclass(frozen=True)
class PatchView:
    """The patch tokens in a block's output.

    Args:
        patches: (B, N, C), in raster order if there is a grid.
        grid: (h, w) with h*w = N, or None.
        leading: extra tokens before the patches.
        trailing: extra tokens after the patches.
        map_shape: True if the block's tensor is a map, (B, h, w, C) or (B, C, h, w).
        channels_first: True for (B, C, h, w).
        inverse: (N,) where each token of the block stands in `patches`, if not at its own place.
        windows_side: windows along each axis, if the block's batch axis holds windows; 0 otherwise.
    """

    patches: Tensor
    grid: Grid | None
    leading: int = 0
    trailing: int = 0
    map_shape: bool = False
    channels_first: bool = False
    inverse: Tensor | None = None
    windows_side: int = 0

    def put_back(self, patches: Tensor, tensor: Tensor) -> Tensor:
        """Gives (B, N, C) the axes and memory format of the block's tensor, among the extra tokens of that."""
        patches = patches.to(tensor.dtype)
        if self.map_shape:
            assert self.grid is not None
            maps = channels_back(rearrange(patches, "b (h w) c -> b h w c", h=self.grid[0]), self.channels_first)
            return maps.contiguous() if tensor.is_contiguous() else maps
        if self.inverse is not None:
            patches = patches[:, self.inverse]
        if self.windows_side:
            assert self.grid is not None
            side, (height, width) = self.windows_side, self.grid
            patches = rearrange(patches, _RASTER, y=side, x=side, h=height // side, w=width // side)
        if self.leading or self.trailing:
            end = tensor.shape[1] - self.trailing
            patches = torch.cat([tensor[:, : self.leading], patches, tensor[:, end:]], dim=1)
        return patches


def channels_last(tensor: Tensor, dim: int) -> tuple[Tensor, bool]:
    """A tensor of a block's with the channels last, and whether that moved them.

    Args:
        tensor: (B, N, C), (B, h, w, C) or (B, C, h, w).
        dim: the expected C.

    Raises:
        ValueError: if the tensor is none of these.
    """
    if tensor.ndim in (3, 4) and tensor.shape[-1] == dim:
        return tensor, False
    if tensor.ndim == 4 and tensor.shape[1] == dim:
        return tensor.permute(0, 2, 3, 1), True
    raise ValueError(f"expected (B, N, {dim}), (B, h, w, {dim}) or (B, {dim}, h, w), found {tuple(tensor.shape)}")


def channels_back(tensor: Tensor, moved: bool) -> Tensor:
    """Undoes `channels_last`."""
    return tensor.permute(0, 3, 1, 2) if moved else tensor


def view_patches(tensor: Tensor, dim: int, order: Order, tracker: GridTracker, output: Any = None) -> PatchView:
    """Finds the patches in a block's output tensor.

    Args:
        tensor: (B, N, C), (B, h, w, C) or (B, C, h, w).
        dim: the expected C.
        order: how sequences of this block are ordered.
        tracker: the tower's grid tracker, which saw the block's call.
        output: the block's result.

    Raises:
        ValueError: if the tensor is none of these.
    """
    tokens, channels_first = channels_last(tensor, dim)
    if tokens.ndim == 4:
        grid = (tokens.shape[1], tokens.shape[2])
        return PatchView(tokens.flatten(1, 2), grid, map_shape=True, channels_first=channels_first)
    return order.view(tokens, _grid(tokens.shape[1], order, tracker, output))


def _grid(num_tokens: int, order: Order, tracker: GridTracker, output: Any = None) -> Grid | None:
    if isinstance(order, WindowOrder):
        num_tokens = (num_tokens - order.leading) * order.side**2
    return tracker.resolve(num_tokens, output)


def pick_tensor(output: Any) -> Tensor | None:
    """The tensor of tokens in a block's output: the output itself, or the first of its items that can be tokens."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((item for item in output if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 2), None)
    return None


def put_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """The output with `new` in place of `old`, in a container of the same type."""
    if isinstance(output, Tensor):
        return new
    items = [new if item is old else item for item in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def padding(args: tuple[Any, ...], kwargs: Mapping[str, Any], num_tokens: int) -> Tensor | None:
    """Which tokens of a padded batch are real, (B, N) bool, read from the attention mask of a block's call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 1 and value.shape[3] == num_tokens:
            allowed = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
            return allowed.any(dim=2).squeeze(1)
    return None
