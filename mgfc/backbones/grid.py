"""Where the patch grid of each block call comes from."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgfc.backbones.exceptions import MASKED

Grid = tuple[int, int]
_TAG = "_mgfc_grid"
_STEM = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class GridTracker(threading.local):
    """Knows the grid of the tokens that reach a block, for any resolution and any order of calls.

    Each thread has its own, so that two that run one model at once do not see each other's.

    Modules outside the blocks that see the image as a map tell their size as they run. A block call takes the newest of
    these sizes that fits its number of tokens. Tokens that met a block carry their grid as a tag, so that a recomputation
    under activation checkpointing finds the grid of its own forward and not that of a later one.

    Args:
        max_extra: most tokens besides patches (class, register, query tokens) that a sequence can hold.
        halves: whether blocks may halve the grid without telling, as hierarchical towers do. In others, fewer tokens than
            the grid has are masked or merged ones, which have no known places.
    """

    def __init__(self, max_extra: int, halves: bool = True) -> None:
        self.max_extra = max_extra
        self.halves = halves
        self.told = False
        self.recent: tuple[Grid, ...] = ()
        self.entered: tuple[Grid, ...] = ()
        self.tagged: tuple[Grid, ...] = ()

    def __reduce__(self) -> tuple[type[GridTracker], tuple[int, bool]]:
        return GridTracker, (self.max_extra, self.halves)

    def forget(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first module that tells a size: those of an earlier forward have had their time."""
        self.recent = ()

    def observe_image(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a module that has a `patch_size`: covers patch embeddings without a convolution."""
        image = first_tensor(args, kwargs)
        if image is None or image.ndim == 3:
            self.recent = ()
        elif image.ndim == 4:
            height, width = _pair(module.patch_size)
            self.told = True
            self.recent = ((image.shape[2] // height, image.shape[3] // width), *self.recent[:3])

    def observe_map(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a convolution or pooling outside the blocks."""
        if isinstance(output, Tensor) and output.ndim == 4:
            self.told = True
            self.recent = ((output.shape[2], output.shape[3]), *self.recent[:3])

    def observe_dropping(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a module that may drop patches: those that are left have no grid."""
        left = first_tensor(output if isinstance(output, tuple) else (output,), {})
        if left is None or not args or left.shape[1] != args[0].shape[1]:
            self.recent = ()

    def begin(self) -> None:
        """Before the first block of a forward: sizes that no module told since the last one are those of another image."""
        if not self.told:
            self.recent = ()
        self.told = False

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes the arguments of a block's call, before grids in it or of its output are asked for."""
        entry = first_tensor(args, kwargs)
        self.tagged = (getattr(entry, _TAG),) if hasattr(entry, _TAG) else ()
        self.entered = (*_pairs(args), *_pairs(kwargs.values()))

    def resolve(self, num_tokens: int, output: Any = None) -> Grid | None:
        """The grid of `num_tokens` tokens in the block that was entered, or None where there is none.

        Args:
            num_tokens: patches and extra tokens of one image.
            output: of the block, if they are its output tokens.
        """
        for height, width in [*_pairs(output), *self.entered, *self.tagged, *self.recent]:
            if 0 <= num_tokens - height * width <= self.max_extra:
                return height, width
        for height, width in [*self.tagged, *self.recent] if self.halves else []:
            for half in ((height + 1) // 2, (width + 1) // 2), (height // 2, width // 2):
                if 0 <= num_tokens - half[0] * half[1] <= self.max_extra and half[0] * half[1] > 0:
                    self.recent = (half, *self.recent[:3])
                    return half
        return None


def tag(grid: Grid | None, *tensors: Tensor | None) -> None:
    """Leaves the grid on tensors, where a recomputation finds it again."""
    if grid is None or torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not hasattr(tensor, _TAG):
            setattr(tensor, _TAG, grid)


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a call's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def stem_hooks(root: nn.Module, blocks: Iterable[str], tracker: GridTracker) -> list[Any]:
    """Registers the tracker outside the blocks of a tower; returns the removable handles."""
    if type(root).__name__ in MASKED:
        return []
    inside = tuple(name + "." for name in blocks)
    handles: list[Any] = []
    is_first = True
    for name, module in root.named_modules():
        if (name + ".").startswith(inside):
            continue
        if "PatchDropout" in type(module).__name__:
            handles.append(module.register_forward_hook(tracker.observe_dropping))
            continue
        sees_maps, sees_images = isinstance(module, _STEM), is_pair(getattr(module, "patch_size", None))
        if (sees_maps or sees_images) and is_first:
            # Sizes of earlier forwards would otherwise be part of what torch.compile specialises on.
            handles.append(module.register_forward_pre_hook(tracker.forget))
            is_first = False
        if sees_maps:
            handles.append(module.register_forward_hook(tracker.observe_map))
        elif sees_images:
            handles.append(module.register_forward_pre_hook(tracker.observe_image, with_kwargs=True))
    return handles


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_pair(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)))


def _pair(value: Any) -> Grid:
    return (value, value) if _is_number(value) else (value[0], value[1])


def _pairs(values: Any) -> list[Grid]:
    """Sizes among a call's values: (h, w) pairs, and h, w as neighbouring numbers."""
    if values is None or isinstance(values, Tensor):
        return []
    values = list(values)
    pairs = [_pair(value) for value in values if isinstance(value, (tuple, list)) and is_pair(value)]
    numbers = [(a, b) for a, b in itertools.pairwise(values) if _is_number(a) and _is_number(b)]
    return pairs + numbers
