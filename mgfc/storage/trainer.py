"""Calibrators out of a checkpoint of a whole wrapped model, as Transformers, its Trainer, Lightning and plain loops save it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mgfc.adapter import Adapter
from mgfc.backbones.detection import Tower
from mgfc.config import AdapterConfig, CoarseConfig, FineConfig, MediumConfig, MGFCConfig, ReinConfig
from mgfc.errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, ConfigError
from mgfc.storage.checkpoint import read_checkpoint
from mgfc.storage.format import CONFIG, is_adapter
from mgfc.storage.matching import adapter_for, compare_state, fill
from mgfc.storage.parsing import local_path, named_in_our_words, read_json, shorten
from mgfc.storage.snapshot import INCOMING
from mgfc.storage.tensors import Entry, read_header, read_tensors

_INDEX = "model.safetensors.index.json"
_STATES = (_INDEX, "model.safetensors", "pytorch_model.bin")  # as Transformers and its Trainer name them
_ENTRY = re.compile(r"(?P<adapter>(?:.*\.)?calibration\.adapter_(?P<name>[^.]+))\.(?P<key>.+)")
_LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.")  # Transformers renames the layers of some classes, ours with them
_MAX_INDEX_BYTES = 16 << 20


def find_checkpoint(source: str | os.PathLike[str]) -> Path | None:
    """The file of a whole model's state that a path means; None for an adapter's directory, and for a Hub repository."""
    path = local_path(source)
    with named_in_our_words(path):
        if path.is_file():
            return path
        states = [path / name for name in _STATES if (path / name).is_file()] if path.is_dir() else []
        if not states or _is_adapters(path):
            return None
        return states[0] if _has_calibrators(states[0]) else None


def _is_adapters(directory: Path) -> bool:
    """Whether a directory is an adapter's, also while another process saves it for the first time."""
    for path in (directory / CONFIG, directory / INCOMING / CONFIG, directory / CONFIG):
        try:
            return is_adapter(read_json(path, _MAX_INDEX_BYTES))
        except AdapterNotFoundError:
            continue
        except AdapterFileError:
            return True  # whose reader says what is wrong
    return False


def _has_calibrators(state: Path) -> bool:
    if state.name == _INDEX:
        return any(map(_is_entry, _read_index(state)))
    return state.suffix != ".safetensors" or any(map(_is_entry, read_header(state)))


def read_calibrators(path: Path, tower: Tower, config: AdapterConfig | None = None) -> Adapter:
    """The calibrators in a checkpoint of a wrapped model, for a backbone that stays untouched.

    Args:
        path: of a safetensors file, of the index of its shards, or of what `torch.save` wrote, as `.pt` and `.ckpt`.
        tower: the backbone.
        config: of the calibrators; None to tell it from the tensors' shapes.

    Raises:
        AdapterNotFoundError: if there are no calibrators in it.
        AdapterFileError: if it is damaged, or holds more than one set of them.
        AdapterMismatchError: if they are of another backbone or configuration.

    Warns:
        UserWarning: if the configuration was told from shapes, which do not say everything.
    """
    tensors = _read_entries(path)
    header = {name: Entry(value.dtype, tuple(value.shape), 0) for name, value in tensors.items()}
    told = config or _tell_config(header, path)
    try:
        with torch.device("meta"):
            adapter = adapter_for(tower, told)
    except ConfigError as error:
        raise AdapterMismatchError(f"{path} does not fit this {type(tower.root).__name__}. {error}") from None
    compare_state(adapter, header, str(path))
    fill(adapter, tensors, str(path))
    if config is None and isinstance(told, MGFCConfig):
        warnings.warn(
            f"{path}: a checkpoint does not hold strength, temperature, randomise and the weights of losses; the defaults were "
            "taken. If you trained with others, wrap with your MGFCConfig first, then load_state_dict.",
            stacklevel=5,
        )
    return adapter


def _read_entries(path: Path) -> dict[str, Tensor]:
    """The tensors of the calibrators, under the names that an adapter gives them."""
    if path.name.endswith(".index.json"):
        tensors = _read_shards(path)
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path, only=_is_entry)
    else:
        tensors = {name: value for name, value in read_checkpoint(path).items() if _is_entry(name)}
    matches = [match for match in map(_ENTRY.fullmatch, tensors) if match]
    adapters = sorted({match["adapter"] for match in matches})
    if not adapters:
        raise AdapterNotFoundError(
            f"{path}: expected the directory of an adapter, found a file. Give its directory, or a checkpoint of a wrapped "
            "model, whose entries have `calibration.adapter_` in their names; here are none."
        )
    if len(adapters) > 1:
        default = [name for name in adapters if name.endswith("calibration.adapter_default")]
        if len(default) != 1:
            raise AdapterFileError(
                f"{path}: expected one adapter, found {shorten(', '.join(adapters))}. Save the one that you mean with "
                "save_pretrained, or a state dict of it alone."
            )
        adapters = default
    chosen = [match for match in matches if match["adapter"] == adapters[0]]
    return {_LAYER.sub(r"layers.\1.", match["key"], count=1): tensors[match[0]] for match in chosen}


def _is_entry(name: str) -> bool:
    return _ENTRY.fullmatch(name) is not None


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    content = read_json(path, _MAX_INDEX_BYTES)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise AdapterFileError(f"{path}: expected the file of each tensor, found a damaged index. Fetch or save it again.")
    return places


def _read_shards(path: Path) -> dict[str, Tensor]:
    places = _read_index(path)
    tensors: dict[str, Tensor] = {}
    for name in sorted({place for key, place in places.items() if _is_entry(key)}):
        tensors |= read_tensors(path.parent / name, only=_is_entry)
    missing = [key for key in places if _is_entry(key) and key not in tensors]
    if missing:
        raise AdapterFileError(f"{path}: expected {shorten(missing[0])} in {places[missing[0]]}, found none.")
    return tensors


def _tell_config(header: Mapping[str, Entry], path: Path) -> AdapterConfig:
    """What the shapes of its tensors tell of a configuration."""

    def blocks(*ends: str) -> tuple[int, ...]:
        found = (re.fullmatch(r"layers\.(\d{1,5})\.(.+)", name) for name in header)
        return tuple(sorted({int(match[1]) for match in found if match and match[2] in ends}))

    def size(end: str, axis: int) -> int:
        return next((e.shape[axis] for name, e in header.items() if name.endswith(end) and len(e.shape) > axis), 0)

    low_rank, medium, fine = blocks("low_rank.down"), blocks("medium.source.total"), blocks("fine.kernel")
    rein = blocks("tokens")
    classes = {head: size(f"{head}.weight", 0) for head in ("presence", "category") if f"{head}.weight" in header}
    weights = {"coarse": float("presence" in classes), "medium": float("category" in classes)}
    if not (low_rank or medium or fine or rein):
        raise AdapterFileError(f"{path}: expected calibrators of blocks, found {shorten(', '.join(header))}.")
    try:
        if rein:
            return ReinConfig(size(".tokens", 0), size(".basis", 0) or None, rein)
        return MGFCConfig(
            size(".low_rank.down", 0) or None,
            tuple(sorted({*low_rank, *medium, *fine})),
            CoarseConfig(loss_weight=weights["coarse"]) if "coarse.source.total" in header else None,
            MediumConfig(size(".medium.source.total", 0), layers=medium, loss_weight=weights["medium"]) if medium else None,
            FineConfig(size(".fine.kernel", 1), layers=fine) if fine else None,
            next(iter(classes.values()), None),
        )
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None
