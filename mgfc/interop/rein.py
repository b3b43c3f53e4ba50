"""Published Rein checkpoints as adapters of this library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgfc.adapter import Adapter
from mgfc.backbones.description import BlockWidths
from mgfc.config import ReinConfig
from mgfc.errors import AdapterFileError, AdapterNotFoundError
from mgfc.storage.directory import write
from mgfc.storage.format import describe_adapter

_REINS = re.compile(r"^(?:.*\.)?reins\.")
_HEAD = "decode_head."
_SHARED = {
    "mlp_token2feat.weight": "maps.token_to_feature.weight",
    "mlp_token2feat.bias": "maps.token_to_feature.bias",
    "mlp_delta_f.weight": "maps.delta.weight",
    "mlp_delta_f.bias": "maps.delta.bias",
    "scale": "maps.scale",
}
_TOKENS = ("learnable_tokens", "learnable_tokens_a", "learnable_tokens_b")
# The link from tokens to a head's queries is the head's business.
_LINK = ("transform.", "merge.")


class _Inert:
    """Stands for whatever else a checkpoint pickles: takes any arguments and state, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, *values: object) -> None:
        pass

    extend = append


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a PyTorch or mmengine checkpoint; no code that it names is imported or run.

    Raises:
        AdapterNotFoundError: if there is no such file.
        AdapterFileError: if it is damaged, or holds no dict of tensors.
    """
    if not path.is_file():
        raise AdapterNotFoundError(f"{path}: expected a checkpoint, found no such file.")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise AdapterFileError(
            f"{path}: expected a checkpoint that torch.load can read with weights_only=True, found otherwise "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise AdapterFileError(f"{path}: expected a dict of tensors, found {type(content).__name__}.")
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def convert_rein(checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Adapter:
    """Turns a Rein checkpoint into an adapter's directory, for the same backbone in timm or Transformers, at any resolution.

    The adapter computes Rein's function, block by block. Tensors of the checkpoint's head are kept as they are, in
    `head.safetensors`. Rein's link to the queries of its head is no part of the backbone, and is kept with the head.

    Args:
        checkpoint: with keys `backbone.reins.*`, of the full or the low-rank form.
        directory: made if missing.

    Returns:
        The adapter that was written.

    Raises:
        AdapterNotFoundError: if there is no such file.
        AdapterFileError: if it is damaged, or holds no Rein adapter.
    """
    path = Path(checkpoint)
    state = read_state(path)
    reins = {_REINS.sub("", key): value for key, value in state.items() if _REINS.match(key)}
    link = {f"reins.{key}": reins.pop(key) for key in list(reins) if key.startswith(_LINK)}
    head = {key.removeprefix(_HEAD): value for key, value in state.items() if key.startswith(_HEAD)} | link
    adapter = _build(reins, path)
    depth, dim = len(adapter.layers), adapter.maps.delta.in_features if adapter.maps else 0
    backbone = {
        "library": None,
        "architecture": "vision transformer of a Rein checkpoint",
        "base_model": None,
        "depth": depth,
        "embed_dim": dim,
        "patch_size": None,
        "num_prefix_tokens": 1,
        "fingerprint": None,
    }
    described = {"class": "decode_head of a Rein checkpoint", "arguments": None} if head else None
    training = {"converted from": path.name}
    content = describe_adapter(adapter.config, backbone, head=described, training=training, license="other")
    write(Path(directory), adapter, content, head or None)
    return adapter


def _build(reins: Mapping[str, Tensor], path: Path) -> Adapter:
    """The adapter that the keys after `reins.` describe."""
    expected = "expected the keys of a Rein adapter (backbone.reins.learnable_tokens or ..._a and ..._b, scale, mlp_*)"
    low_rank = "learnable_tokens_a" in reins
    tokens = reins.get("learnable_tokens_a" if low_rank else "learnable_tokens")
    basis = reins.get("learnable_tokens_b")
    missing = [key for key in _SHARED if key not in reins]
    unknown = [key for key in reins if key not in _SHARED and key not in _TOKENS]
    if tokens is None or tokens.ndim != 3 or (low_rank and basis is None) or missing or unknown:
        found = (
            f"unknown {unknown[0]!r}" if unknown else f"{len(reins)} such keys" + (f", no {missing[0]!r}" if missing else "")
        )
        raise AdapterFileError(f"{path}: {expected}, found {found}.")
    depth, num_tokens, width = tokens.shape
    dim = reins["mlp_delta_f.weight"].shape[-1]
    adapter = Adapter(ReinConfig(num_tokens, width if low_rank else None), [BlockWidths(dim, dim, 4 * dim)] * depth)
    state = {ours: reins[theirs] for theirs, ours in _SHARED.items()}
    try:
        for index in range(depth):
            state[f"layers.{index}.tokens"] = tokens[index]
            if low_rank and basis is not None:
                state[f"layers.{index}.basis"] = basis[index]
        adapter.load_state_dict(state)
    except (RuntimeError, IndexError) as error:
        raise AdapterFileError(f"{path}: {expected} of shapes that fit, found otherwise ({error}).") from None
    return adapter
