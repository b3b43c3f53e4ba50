"""`config.json` of an adapter: what it holds, written, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mgfc._version import __version__
from mgfc.config import AdapterConfig, method_of
from mgfc.config import read_config as read_calibration
from mgfc.errors import AdapterFileError, ConfigError

FORMAT_VERSION = 1
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
# What an adapter and the backbone that it is loaded for must have in common.
MUST_MATCH = ("depth", "embed_dim", "patch_size", "num_prefix_tokens")
_MAX_CONFIG_BYTES = 1 << 20


def describe_adapter(
    config: AdapterConfig,
    backbone: Mapping[str, Any],
    *,
    head: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    license: str = "apache-2.0",
    has_peft: bool = False,
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        config: of the calibrators.
        backbone: as `mgfc.backbones.description.describe` returns it.
        head: "class" and "arguments" of a head that is kept beside the adapter.
        training: free-form notes, with "metrics" (a dict of figures) and "datasets" (a list of names) among them.
        license: of the adapter, as a Hub identifier.
        has_peft: whether files of a PEFT adapter belong to it.
    """
    return {
        "library_name": "mgfc",
        "format_version": FORMAT_VERSION,
        "mgfc_version": __version__,
        "method": method_of(config),
        "calibration": config.to_dict(),
        "peft": has_peft,
        "head": head,
        "training": dict(training or {}),
        "license": license,
        "backbone": dict(backbone),
    }


def check_notes(training: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless "metrics" and "datasets" among a user's notes are a dict and a list of names."""
    metrics, datasets = training.get("metrics") or {}, training.get("datasets") or []
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"training: expected metrics to be a dict of figures, found {metrics!r}.")
    if not isinstance(datasets, (list, tuple)) or not all(isinstance(name, str) for name in datasets):
        raise ConfigError(f"training: expected datasets to be a list of names, found {datasets!r}.")


def encode_config(content: Mapping[str, Any]) -> bytes:
    """The bytes of `config.json`.

    Raises:
        ConfigError: if the content cannot be written as JSON.
    """
    try:
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training, head.arguments: expected what JSON can hold, found otherwise ({error}).") from None


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks an adapter's `config.json`.

    Raises:
        AdapterFileError: if it is damaged, oversized or of a format from the future.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterFileError(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, found {path.stat().st_size}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: expected JSON, found a damaged file ({error}). Fetch or save it again.") from None
    if not isinstance(content, dict) or content.get("library_name") != "mgfc":
        raise AdapterFileError(
            f'{path}: expected the configuration of an mgfc adapter ("library_name": "mgfc"), found another.'
        )
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: expected format version {FORMAT_VERSION} or older, found {version!r}, written by mgfc "
            f"{content.get('mgfc_version')}. Upgrade mgfc."
        )
    _require_entries(path, content, ("calibration", "backbone"), dict, "")
    _require_entries(path, content["backbone"], MUST_MATCH, object, " of the backbone")
    size, training = content["backbone"]["patch_size"], content.get("training")
    for name, value, kind in (("patch_size", size, list), ("training", training, dict)):
        if not isinstance(value, kind | None):
            raise AdapterFileError(f"{path}: expected {name} to be a {kind.__name__} or null, found {value!r}.")
    return content


def _require_entries(path: Path, values: Mapping[str, Any], keys: Sequence[str], kind: type, where: str) -> None:
    missing = [key for key in keys if key not in values or not isinstance(values[key], kind)]
    if missing:
        raise AdapterFileError(f"{path}: expected an entry {missing[0]!r}{where}, found none. Fetch or save it again.")


def calibration_of(content: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The configuration of the calibrators that a `config.json` describes.

    Raises:
        AdapterFileError: if it is none.
    """
    try:
        return read_calibration(content.get("method", "mgfc"), content["calibration"])
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        AdapterFileError: if it is damaged, truncated or longer than its header says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: expected {path.name} in safetensors format, found a damaged file of {path.stat().st_size} bytes "
            f"({error}). Fetch or save it again."
        ) from None
