"""Tensors in safetensors files: held against a header before anything is allocated, checked against their checksum."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mgfc.distributed import whole
from mgfc.errors import AdapterFileError, ConfigError
from mgfc.storage.parsing import named_in_our_words, parse_json, shorten

_MAX_HEADER_BYTES = 2 << 20
# What calibrators and heads can compute with; float8 and complex types are left out.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header describes it.

    Args:
        dtype: one of those that this library computes with.
        shape: of the tensor.
        start: of its bytes, counted from the end of the header.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file holds, without their values.

    Raises:
        AdapterNotFoundError: if the file cannot be read.
        AdapterFileError: if it is damaged, truncated, longer than its header says, or of an unknown number format.
    """
    with named_in_our_words(path), path.open("rb") as file:
        return _parse_header(file, path)[1]


def read_tensors(path: Path, checksum: str | None = None, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file. Never holds more than its size, and one tensor of it.

    Args:
        path: of the file.
        checksum: SHA-256 that it has to have, in hexadecimal digits.
        only: which tensors to read, by name; None for all.

    Raises:
        AdapterNotFoundError: if the file cannot be read.
        AdapterFileError: as `read_header`, or if it is not the file of that checksum.
    """
    tensors: dict[str, Tensor] = {}
    with named_in_our_words(path), path.open("rb") as file:
        head, entries = _parse_header(file, path)
        digest = hashlib.sha256(head)
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if only is not None and not only(name):
                file.seek(entry.nbytes, os.SEEK_CUR)
                continue
            data = bytearray(entry.nbytes)
            if file.readinto(data) != len(data):
                raise _damaged(path, "it became shorter while it was read")
            digest.update(data)
            # A copy, which is aligned as a fresh parameter is, so that the same kernels run.
            flat = torch.frombuffer(data, dtype=entry.dtype).clone() if data else torch.empty(0, dtype=entry.dtype)
            tensors[name] = flat.reshape(entry.shape)
    if checksum is not None and digest.hexdigest() != checksum:
        raise AdapterFileError(
            f"{path}: expected the file that was saved with its config.json (SHA-256 {checksum[:12]}...), found another "
            f"({digest.hexdigest()[:12]}...). Fetch or save it again; if you changed it on purpose, remove "
            '"checksums" from config.json.'
        )
    return tensors


def _damaged(path: Path, reason: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: expected {path.name} in safetensors format, found a damaged file of {path.stat().st_size} bytes "
        f"({shorten(reason)}). Fetch or save it again."
    )


def _parse_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Entry]]:
    """The bytes up to the end of the header, and what it says."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise _damaged(path, f"its header has to have 2 to {_MAX_HEADER_BYTES} bytes")
    text = file.read(length)
    header = parse_json(text, f"{path}: header of {path.name}")
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no mapping")
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(name, value, path) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise _damaged(path, f"{name} begins at byte {entry.start} instead of {end}")
        end += entry.nbytes
    if end != size - 8 - length:
        raise _damaged(path, f"its tensors have {end} bytes, and it has {size - 8 - length} for them")
    return start + text, entries


def _parse_entry(name: str, value: Any, path: Path) -> Entry:
    value = value if isinstance(value, dict) else {}
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _damaged(path, f"{name} has no shape or place")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value.get("dtype"), str) else None
    if dtype is None:
        raise AdapterFileError(
            f"{path}: {shorten(name)}: expected one of the number formats {', '.join(_DTYPES)}, found "
            f"{shorten(repr(value.get('dtype')))}. Save it in one of them."
        )
    entry = Entry(dtype, tuple(shape), offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise _damaged(path, f"{name} of shape {entry.shape} has {offsets[1] - offsets[0]} bytes")
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def checksum_of(data: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode_tensors(content: nn.Module | Mapping[str, Tensor], what: str, *, masks: bool = False) -> bytes:
    """Tensors, or the state of a module, in safetensors format.

    Args:
        content: what to write.
        what: they are, for errors.
        masks: whether buffers may hold infinities, as masks of attention do.

    Raises:
        ConfigError: if a tensor holds values that are not finite, or of a format that cannot be read back.
    """
    from safetensors.torch import save

    state = content.state_dict() if isinstance(content, nn.Module) else content
    may_be_infinite = {name for name, _ in content.named_buffers()} if masks and isinstance(content, nn.Module) else set()
    # Clones, since safetensors refuses tensors that share memory, as tied weights of a head do.
    tensors = {key: whole(value.detach()).clone().contiguous() for key, value in state.items()}
    for key, value in tensors.items():
        if value.dtype not in _DTYPES.values():
            raise ConfigError(f"{what}: {key}: expected real numbers of a common format, found {value.dtype}. Convert it.")
        problem = find_non_finite(value, nan_only=key in may_be_infinite)
        if problem:
            raise ConfigError(
                f"{what}: {key}: expected finite numbers, found {problem}. Nothing was written. Go back to the last state "
                "before training diverged."
            )
    # Not save_file, whose files nobody but their owner may read.
    return save(tensors, metadata={"format": "pt"})


def find_non_finite(value: Tensor, *, nan_only: bool = False) -> str | None:
    """How many values of a tensor are not finite, in words; None if all are."""
    wrong = value.isnan() if nan_only else ~value.isfinite()
    count = int(wrong.sum())
    return f"{count} of {value.numel()} that are NaN or infinite" if count else None
