"""Published Rein checkpoints as adapters of this library."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from mgfc.adapter import Adapter
from mgfc.backbones.description import BlockWidths
from mgfc.config import ReinConfig
from mgfc.errors import AdapterFileError, ConfigError
from mgfc.storage.checkpoint import read_checkpoint
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
_MAX_DEPTH = 256


def convert_rein(checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str], *, use_softmax: bool = True) -> Adapter:
    """Turns a Rein checkpoint into an adapter's directory, for the same backbone in timm or Transformers, at any resolution.

    The adapter computes Rein's function, block by block. Tensors of the checkpoint's head are kept as they are, in
    `head.safetensors`. Rein's link to the queries of its head is no part of the backbone, and is kept with the head.

    Args:
        checkpoint: with keys `backbone.reins.*`, of the full or the low-rank form.
        directory: made if missing.
        use_softmax: False for a checkpoint that was trained with Rein's `use_softmax=False`, which its keys do not tell.

    Returns:
        The adapter that was written.

    Raises:
        AdapterNotFoundError: if there is no such file.
        AdapterFileError: if it is damaged, or holds no Rein adapter.
    """
    path = Path(checkpoint)
    state = read_checkpoint(path)
    reins = {_REINS.sub("", key): value for key, value in state.items() if _REINS.match(key)}
    link = {f"reins.{key}": reins.pop(key) for key in list(reins) if key.startswith(_LINK)}
    head = {key.removeprefix(_HEAD): value for key, value in state.items() if key.startswith(_HEAD)} | link
    adapter = _build(reins, path, use_softmax)
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


def _build(reins: dict[str, Tensor], path: Path, use_softmax: bool) -> Adapter:
    """The adapter that the keys after `reins.` describe."""
    expected = "expected the keys of a Rein adapter (backbone.reins.learnable_tokens or ..._a and ..._b, scale, mlp_*)"
    if any(key.startswith("mlp_delta_f.") for key in reins):
        reins.setdefault("scale", torch.tensor(1.0))  # trained with zero_mlp_delta_f=True, which has none
    low_rank = "learnable_tokens_a" in reins
    tokens = reins.get("learnable_tokens_a" if low_rank else "learnable_tokens")
    basis = reins.get("learnable_tokens_b") if low_rank else None
    missing = [key for key in _SHARED if key not in reins]
    unknown = [key for key in reins if key not in _SHARED and key not in _TOKENS]
    if tokens is None or tokens.ndim != 3 or (low_rank and basis is None) or missing or unknown:
        found = (
            f"unknown {unknown[0]!r}" if unknown else f"{len(reins)} such keys" + (f", no {missing[0]!r}" if missing else "")
        )
        raise AdapterFileError(f"{path}: {expected}, found {found}.")
    depth, num_tokens, width = tokens.shape
    dim = width if basis is None else basis.shape[-1] if basis.ndim == 3 else 0
    linear = {"weight": (dim, dim), "bias": (dim,)}
    shapes = {f"{part}.{kind}": shape for part in ("mlp_token2feat", "mlp_delta_f") for kind, shape in linear.items()}
    shapes |= {"scale": ()} | ({"learnable_tokens_b": (depth, width, dim)} if low_rank else {})
    differing = [key for key, shape in shapes.items() if tuple(reins[key].shape) != shape]
    is_real = all(value.is_floating_point() for value in reins.values())
    if differing or not is_real or not 0 < depth <= _MAX_DEPTH or not dim or num_tokens < 2:
        where = f"{differing[0]} of shape {tuple(reins[differing[0]].shape)}" if differing else f"tokens {tuple(tokens.shape)}"
        raise AdapterFileError(f"{path}: {expected} of shapes that fit and at most {_MAX_DEPTH} blocks, found {where}.")
    try:
        with torch.device("meta"):
            config = ReinConfig(num_tokens, width if low_rank else None, use_softmax=use_softmax)
            adapter = Adapter(config, [BlockWidths(dim, dim, 4 * dim)] * depth)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    state = {ours: reins[theirs].float().clone() for theirs, ours in _SHARED.items()}
    for index in range(depth):
        state[f"layers.{index}.tokens"] = tokens[index].float().clone()
        if basis is not None:
            state[f"layers.{index}.basis"] = basis[index].float().clone()
    adapter.load_state_dict(state, assign=True)
    return adapter
