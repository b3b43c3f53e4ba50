"""A backbone's adapter of a configuration, held against what a file has and filled with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgfc.adapter import Adapter
from mgfc.backbones.description import block_widths
from mgfc.backbones.detection import Tower
from mgfc.backbones.stem import in_channels
from mgfc.config import AdapterConfig, MGFCConfig
from mgfc.errors import AdapterFileError, AdapterMismatchError
from mgfc.storage.parsing import shorten
from mgfc.storage.tensors import Entry, find_non_finite

_MAX_MAPS, _MAX_CHANNELS = 256, 1 << 16


def adapter_for(tower: Tower, config: AdapterConfig) -> Adapter:
    """A fresh adapter for a backbone, which stays untouched.

    Raises:
        ConfigError: if the configuration does not fit the backbone.
    """
    return Adapter(config, [block_widths(block) for block in tower.modules()], in_channels(tower))


def compare_sizes(config: AdapterConfig, header: Mapping[str, Entry], source: str) -> None:
    """Checks every size in a configuration against the shapes in a file, before anything of such a size is made.

    Raises:
        AdapterMismatchError: if one differs.
    """
    for suffix, axis, field, size in _sizes(config):
        for name, entry in header.items():
            if name.endswith(suffix) and (len(entry.shape) <= axis or entry.shape[axis] != size):
                raise AdapterMismatchError(
                    f"{source}: tensors and configuration disagree. {shorten(name)}: expected {field} {size} at axis {axis} "
                    f"of its shape, found {entry.shape}."
                )


def _sizes(config: AdapterConfig) -> list[tuple[str, int, str, int]]:
    """Names of tensors (their ends), an axis, and the size that the configuration names for it."""
    if not isinstance(config, MGFCConfig):
        sizes = [(".tokens", 0, "num_tokens", config.num_tokens)]
        return sizes + ([] if config.token_rank is None else [(".basis", 0, "token_rank", config.token_rank)])
    sizes = []
    if config.rank is not None:
        sizes += [(".low_rank.down", 0, "rank", config.rank), (".low_rank.up", 1, "rank", config.rank)]
    if config.medium is not None:
        sizes.append((".medium.source.total", 0, "num_prototypes", config.medium.num_prototypes))
    if config.fine is not None:
        sizes.append((".fine.kernel", 1, "kernel_size", config.fine.kernel_size))
    if config.num_classes is not None:
        sizes += [(f"{head}.weight", 0, "num_classes", config.num_classes) for head in ("presence", "category")]
    return sizes


def compare_head(arguments: Any, header: Mapping[str, Entry], source: str) -> None:
    """Checks the arguments of a `SegmentationHead` against the shapes in a file, before anything is made of them.

    Raises:
        AdapterFileError: if they are none.
        AdapterMismatchError: if a size differs.
    """
    values = dict(arguments) if isinstance(arguments, dict) else {}
    channels, hidden, classes = values.get("in_channels"), values.get("hidden_dim", 128), values.get("num_classes")
    is_list = isinstance(channels, list) and 0 < len(channels) <= _MAX_MAPS
    sizes = [*channels, hidden, classes] if is_list and isinstance(channels, list) else [None]
    unknown = values.keys() - {"in_channels", "hidden_dim", "num_classes"}
    if unknown or not all(type(size) is int and 0 < size <= _MAX_CHANNELS for size in sizes):
        raise AdapterFileError(
            f"{source}: expected the arguments of a SegmentationHead (in_channels of 1 to {_MAX_MAPS} maps, num_classes and "
            f"hidden_dim, each from 1 to {_MAX_CHANNELS}), found {shorten(repr(arguments))}."
        )
    expected: dict[str, tuple[Any, ...]] = {f"projections.{i}.weight": (hidden, size) for i, size in enumerate(sizes[:-2])}
    expected["classify.weight"] = (classes, hidden, 1, 1)
    for name, shape in expected.items():
        if name in header and header[name].shape != shape:
            raise AdapterMismatchError(
                f"{source}: tensors and configuration disagree. {name}: expected shape {shape}, found {header[name].shape}."
            )
        if name not in header:
            raise AdapterMismatchError(
                f"{source}: tensors and configuration disagree. {name}: expected in the file, found none."
            )


def compare_state(module: nn.Module, header: Mapping[str, Entry], source: str, optional: Collection[str] = ()) -> None:
    """Checks that a file holds the tensors of a module, no more and no less.

    Args:
        module: as it is, or without values (on the meta device).
        header: of the file.
        source: for errors.
        optional: tensors that may be missing.

    Raises:
        AdapterMismatchError: if not.
    """
    own = module.state_dict()
    problems = [f"{shorten(key)}: expected none, found one in the file" for key in header if key not in own]
    problems += [f"{key}: expected in the file, found none" for key in own if key not in header and key not in optional]
    problems += [
        f"{key}: expected shape {tuple(own[key].shape)}, found {header[key].shape}"
        for key in own
        if key in header and tuple(own[key].shape) != header[key].shape
    ]
    problems += [
        f"{key}: expected a tensor like {own[key].dtype}, found {header[key].dtype}"
        for key in own
        if key in header and own[key].is_floating_point() != header[key].dtype.is_floating_point
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise AdapterMismatchError(f"{source}: tensors and configuration disagree. {problems[0]}{more}.")


def fill(module: nn.Module, tensors: dict[str, Tensor], source: str, *, masks: bool = False) -> None:
    """Puts tensors that passed `compare_state` into a module.

    Args:
        module: as it is, or without values (on the meta device).
        tensors: of the file.
        source: for errors.
        masks: whether buffers may hold infinities, as masks of attention do.

    Raises:
        AdapterFileError: if one of them holds values that are not finite; the module is as it was.
    """
    require_finite(tensors, source, {name for name, _ in module.named_buffers()} if masks else ())
    own = module.state_dict()
    # A module of the user's keeps its parameters, with their device and dtype: an optimizer may hold them already.
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(tensors)
        return
    module.load_state_dict(_of_one_dtype(tensors), strict=False, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:  # state of a run that no file holds, or statistics that its format did not know
                setattr(part, name, torch.zeros_like(buffer, device="cpu"))


def require_finite(tensors: Mapping[str, Tensor], source: str, masks: Collection[str] = ()) -> None:
    """Raises `AdapterFileError` if a value is not finite; tensors named in `masks` may hold infinities."""
    for key, value in tensors.items():
        problem = find_non_finite(value, nan_only=key in masks)
        if problem:
            raise AdapterFileError(f"{source}: {key}: expected finite numbers, found {problem}. Fetch or save it again.")


def _of_one_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in the widest of their formats, so that they compute together."""
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    widest = next(iter(dtypes), torch.float32)
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return {key: value.to(widest) if value.is_floating_point() else value for key, value in tensors.items()}
