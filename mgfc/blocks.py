"""What happens to the tokens of one block when a host calls it: hooks that run the layer of the active adapter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mgfc.active import Active
from mgfc.backbones.entry import adapted_layers
from mgfc.backbones.grid import Grid, GridTracker, first_tensor, tag
from mgfc.backbones.layout import (
    Order,
    PatchView,
    channels_back,
    channels_last,
    padding,
    pick_tensor,
    put_tensor,
    view_patches,
)
from mgfc.calibrators import CalibLayer, ReinCalib
from mgfc.calibrators.running import as_one_batch, is_recomputing
from mgfc.errors import CalibrationError
from mgfc.inplace import may_write
from mgfc.tree import owner_of, remove_hook

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


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


class BlockHooks:
    """The hooks of one block.

    Args:
        name: of the block in the backbone.
        index: of the block among all.
        order: how sequences of the block are ordered.
        tracker: of the backbone's grids.
        active: what to run, shared by the hooks of all blocks.

    Attributes:
        watched: whether forwards leave the next two.
        report: on the last forward.
        adapted: whether the low-rank adapter changed anything in it; None if it was not run.
    """

    def __init__(self, name: str, index: int, order: Order, tracker: GridTracker, active: Active) -> None:
        self.name = name
        self.index = index
        self.order = order
        self.tracker = tracker
        self.active = active
        self.watched = False
        self.report: BlockReport | None = None
        self.adapted: bool | None = None
        self._owner = ""

    def _layer(self, module: nn.Module) -> CalibLayer | ReinCalib | None:
        """What the active adapter has for the block that a module is in."""
        layers, key = self.active.of(module).layers, str(self.index)
        return cast("CalibLayer | ReinCalib", layers[key]) if self.active.enabled and key in layers else None

    def attach(self, root: nn.Module) -> None:
        """Registers the hooks in a backbone."""
        self._owner = type(root).__name__
        block = root.get_submodule(self.name)
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        # Transformers captures feature maps by hooks of its own: ours has to run before them.
        block.register_forward_hook(self._leave, prepend=True, with_kwargs=True)
        self._attach_adapter(block)
        path = self.name.split(".")
        for end in range(len(path) + 1):  # Transformers checkpoints a block, or a stage of them
            module = root.get_submodule(".".join(path[:end]))
            if hasattr(type(module), "gradient_checkpointing"):
                module.register_forward_pre_hook(self._want_gradients, with_kwargs=True)

    def follow(self, root: nn.Module) -> None:
        """Moves the hooks of the low-rank adapter to where the first linear layers are now, if the block is still there."""
        block = dict(root.named_modules()).get(self.name)
        if block is None or not any(owner_of(hook) is self for hook in block._forward_hooks.values()):
            return
        for module in block.modules():
            for key, hook in list(module._forward_hooks.items()):
                # Copies of a layer, as PEFT's modules_to_save makes them, have copies of the hook.
                if isinstance(owner_of(hook), BlockHooks) and isinstance(hook, functools.partial):
                    remove_hook(module, module._forward_hooks, key)
        self._attach_adapter(block)

    def _attach_adapter(self, block: nn.Module) -> None:
        for module, channels in adapted_layers(block):
            module.register_forward_hook(functools.partial(self._adapt, channels), prepend=True, with_kwargs=True)

    def watch(self, watched: bool) -> None:
        """Starts or stops leaving reports."""
        self.watched, self.report, self.adapted = watched, None, None

    def _enter(self, block: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        """Before the block."""
        if self.index == 0 and not is_recomputing():
            self.tracker.begin()
        self.tracker.enter(args, kwargs)
        self.active.of(block).start_record(self.index)

    def _want_gradients(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        """Before what Transformers checkpoints.

        PyTorch's reentrant form gives gradients to nothing in there unless an input asks for some, and those of a frozen
        backbone do not.
        """
        entry, checkpointing = first_tensor(args, kwargs), module.training and module.gradient_checkpointing
        if entry is not None and checkpointing and torch.is_grad_enabled() and self._layer(module) is not None:
            entry.requires_grad_()

    def _adapt(self, channels: slice, module: nn.Module, args: Arguments, *more: Any) -> Tensor | None:
        """After a linear layer that the feed-forward network begins with, whose output is these channels of H.

        `more` are the keywords, which PyTorch's own quantisation forgets when it hands hooks on, and the output.
        """
        kwargs, output = more if len(more) == 2 else ({}, *more)
        layer, tensor = self._layer(module), first_tensor(args, kwargs)
        if not isinstance(layer, CalibLayer) or layer.low_rank is None or tensor is None:
            return None
        self.active.note_adapted()
        if self.active.fused:
            if layer.training and torch.is_grad_enabled():
                raise CalibrationError("The low-rank adapters are fused into the weights. Call calibration.unfuse() to train.")
            self.adapted = True
            return None
        try:
            tokens, moved = channels_last(tensor, layer.low_rank.down.shape[1])
        except ValueError as error:
            raise self._error(f"feed-forward network: {error}") from None
        record = self.active.of(module).record(self.index)
        inside = output.permute(0, 2, 3, 1) if moved else output
        inplace = not self.watched and may_write(output, module, self, layer.low_rank)
        adapted = channels_back(layer.low_rank(tokens, inside, channels, record, inplace), moved)
        if moved and output.is_contiguous():
            adapted = adapted.contiguous()  # in another memory format, what follows runs other kernels
        if self.watched:
            self.adapted = not torch.equal(adapted, output)
        return adapted

    def _leave(self, block: nn.Module, args: Arguments, kwargs: Keywords, output: Any) -> Any:
        """After the block."""
        layer = self._layer(block)
        if layer is None:
            return None
        self.active.note_left()
        tensor = pick_tensor(output)
        if tensor is None:
            raise self._error(f"expected tokens from the block, found {type(output).__name__}")
        if isinstance(output, list) and len(output) > 1:
            raise self._error(f"expected images of one size, found a list of {len(output)} tensors. Call once for each size")
        try:
            view = view_patches(tensor, layer.dim, self.order, self.tracker, output)
        except ValueError as error:
            raise self._error(str(error)) from None
        mask = padding(args, kwargs, tensor.shape[1]) if view.grid is None and tensor.ndim == 3 else None
        patches = view.patches if layer.dtype is None else view.patches.to(layer.dtype)
        record = self.active.of(block).record(self.index)
        if record is not None:
            record |= {"grid": view.grid, "batch": len(patches)}
        calibrated = _calibrate(layer, patches, view, mask, record)
        refined = tensor if calibrated is patches else view.put_back(calibrated, tensor)
        tag(view.grid, first_tensor(args, kwargs), refined)
        if self.watched:
            changed = bool(self.adapted) or not torch.equal(tensor, refined)
            places = view.grid, view.patches.shape[1], view.leading, view.trailing
            self.report = BlockReport(self.name, tuple(tensor.shape), *places, changed)
        return None if refined is tensor else put_tensor(output, tensor, refined)

    def _error(self, problem: str) -> CalibrationError:
        return CalibrationError(
            f"Block {self.name!r} of {self._owner}: {problem}. "
            "Leave the block out with MGFCConfig(layers=...) or name other blocks with wrap_backbone(..., blocks=...)."
        )


def _calibrate(
    layer: CalibLayer | ReinCalib, patches: Tensor, view: PatchView, mask: Tensor | None, record: Keywords | None
) -> Tensor:
    """The patches that leave a block, as the layer makes them; `mask` tells real tokens from padding."""
    if mask is None:
        calibrated: Tensor = layer(patches, view.grid, record)
        return calibrated
    if record is not None:
        record.pop("scene", None)  # it has padding in it
    return _calibrate_real(layer, patches, mask[:, view.leading :])


def _calibrate_real(layer: CalibLayer | ReinCalib, patches: Tensor, valid: Tensor) -> Tensor:
    """Each image's real patches as the layer makes them of these alone; padding stays as it is."""
    calibrated = patches.clone()
    with as_one_batch(layer):
        for index in range(len(patches)):
            calibrated[index, valid[index]] = layer(patches[index : index + 1, valid[index]], None)[0].to(patches.dtype)
    return calibrated
