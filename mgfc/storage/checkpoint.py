"""Checkpoints of PyTorch, Lightning and mmengine: their tensors, without running their code or believing their sizes."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgfc.errors import AdapterFileError, AdapterNotFoundError
from mgfc.storage.parsing import named_in_our_words, shorten

_MAX_PICKLE_BYTES = 32 << 20


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


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a PyTorch, Lightning or mmengine checkpoint; no code that it names is imported or run.

    Raises:
        AdapterNotFoundError: if there is no such file, or it cannot be read.
        AdapterFileError: if it is damaged, or holds no dict of tensors.
    """
    with named_in_our_words(path):
        if not path.is_file():
            raise AdapterNotFoundError(f"{path}: expected a checkpoint, found no such file.")
        with path.open("rb"):
            pass
    try:
        _check_container(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterFileError(
            f"{path}: expected a checkpoint that torch.load can read with weights_only=True, found otherwise "
            f"({shorten(reason)})."
        ) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise AdapterFileError(f"{path}: expected a dict of tensors, found {type(content).__name__}.")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        problem = _find_problem(value)
        if problem:
            raise AdapterFileError(f"{path}: {shorten(name)}: expected a dense tensor of real numbers, found {problem}.")
    return {name: value.detach() for name, value in tensors.items()}


def _check_container(path: Path) -> None:
    """Raises `ValueError` for a file that would become larger in memory than it is, or names what allocates at will."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("its parts are compressed, or overlap")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"it has not one table of contents of at most {_MAX_PICKLE_BYTES} bytes")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and argument == "builtins bytearray":
                raise ValueError("it asks for memory of a size that it names")


def _find_problem(value: Tensor) -> str | None:
    if type(value) not in (Tensor, torch.nn.Parameter):
        return type(value).__name__
    if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        return f"one that is sparse, quantized, complex or without values ({value.dtype}, {value.layout}, {value.device})"
    if value.is_floating_point() and value.dtype.itemsize < 2:
        return f"one of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"one of shape {tuple(value.shape)} with {value.untyped_storage().nbytes()} bytes"
    return None
