"""Whose directory or repository it is: a save never replaces somebody else's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from mgfc.errors import AdapterFileError, AdapterNotFoundError
from mgfc.storage.format import is_adapter
from mgfc.storage.parsing import read_json, shorten

# What models and trainers leave. Checkpoints with names of their own (*.pt, *.ckpt) are in nobody's way.
_OF_MODELS = ("*config.json", "*.safetensors", "*.bin", "*.index.json", "*.h5", "*.msgpack", "*_state.json", "checkpoint-*")


def refuse_foreign(where: str, names: Iterable[str], config: Callable[[], Path]) -> None:
    """Checks that an adapter may be written somewhere.

    Args:
        where: directory or repository, for errors.
        names: of all that lies there.
        config: finds the `config.json` there.

    Raises:
        AdapterFileError: if a model lies there that is no adapter of this library.
    """
    here = {name.partition("/")[0] for name in names}
    found = sorted(name for name in here if any(fnmatch(name, pattern) for pattern in _OF_MODELS))
    if not found or _is_ours(config):
        return
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise AdapterFileError(
        f"{where}: expected an mgfc adapter, or a place without a model, found {shorten(shown)} of another library. Nothing "
        "was written. Give another directory or repository, or a new one inside it."
    )


def _is_ours(config: Callable[[], Path]) -> bool:
    try:
        return is_adapter(read_json(config()))
    except (AdapterFileError, AdapterNotFoundError):
        return False
