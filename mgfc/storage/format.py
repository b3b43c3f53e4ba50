"""`config.json` of an adapter: what it holds, written, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgfc._version import __version__
from mgfc.config import AdapterConfig, MGFCConfig, ReinConfig, expect
from mgfc.errors import AdapterFileError, ConfigError
from mgfc.storage.legacy import upgrade_calibration
from mgfc.storage.parsing import MAX_JSON_BYTES, parse_json, read_json, shorten

FORMAT_VERSION = 2
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
# What an adapter and the backbone that it is loaded for must have in common.
MUST_MATCH = ("depth", "embed_dim", "patch_size", "num_prefix_tokens")
METHODS: dict[str, type[MGFCConfig] | type[ReinConfig]] = {"mgfc": MGFCConfig, "rein": ReinConfig}
_MAX_SIZE = 1 << 20  # of anything about a backbone
_CHECKSUM = re.compile("[0-9a-f]{64}")


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
        "method": _method_of(config),
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
        data = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"training, head.arguments: expected what JSON can hold, found otherwise ({error}).") from None
    if len(data) > MAX_JSON_BYTES:
        raise ConfigError(f"training: expected a config.json of at most {MAX_JSON_BYTES} bytes, found {len(data)}. Shorten it.")
    try:
        parse_json(data, CONFIG)
    except AdapterFileError as error:
        raise ConfigError(f"training, head.arguments, license: expected what can be read back. {error}") from None
    return data


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks an adapter's `config.json`.

    Raises:
        AdapterNotFoundError: if it cannot be read.
        AdapterFileError: if it is damaged, oversized or of a format from the future.
    """
    content: dict[str, Any] = read_json(path)
    if not is_adapter(content):
        raise AdapterFileError(
            f'{path}: expected the configuration of an mgfc adapter ("library_name": "mgfc"), found another.'
        )
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: expected format version {FORMAT_VERSION} or older, found {shorten(repr(version))}, written by mgfc "
            f"{shorten(str(content.get('mgfc_version')))}. Upgrade mgfc."
        )
    _require_entries(path, content, ("calibration", "backbone"), dict, "")
    _require_entries(path, content["backbone"], MUST_MATCH, object, " of the backbone")
    for where, checks in (("", _CHECKS), ("backbone.", _BACKBONE_CHECKS)):
        values = content["backbone"] if where else content
        for name, (expected, is_valid) in checks.items():
            value = values.get(name)
            if value is not None and not is_valid(value):
                found = shorten(repr(value))
                raise AdapterFileError(f"{path}: expected {where}{name} to be {expected} or null, found {found}.")
    return content


def is_adapter(content: object) -> bool:
    """Whether parsed JSON is the configuration of an adapter of this library."""
    return isinstance(content, dict) and content.get("library_name") == "mgfc"


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_SIZE and all(map(_is_size, value))


def _are_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) and _CHECKSUM.fullmatch(v) for v in value.values())


def _of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "training": ("a dict", _of(dict)),
    "head": ("a dict", _of(dict)),
    "peft": ("true or false", _of(bool)),
    "license": ("a text", _of(str)),
    "mgfc_version": ("a text", _of(str)),
    "checksums": ("a dict of SHA-256 by file name", _are_checksums),
}
_BACKBONE_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "depth": ("a size", _is_size),
    "embed_dim": ("a size, or one for each block", lambda value: _is_size(value) or _are_sizes(value)),
    "patch_size": ("a list", _are_sizes),
    "num_prefix_tokens": ("a size", _is_size),
    "library": ("a text", _of(str)),
    "architecture": ("a text", _of(str)),
    "base_model": ("a text", _of(str)),
}


def _require_entries(path: Path, values: Mapping[str, Any], keys: tuple[str, ...], kind: type, where: str) -> None:
    missing = [key for key in keys if key not in values or not isinstance(values[key], kind)]
    if missing:
        raise AdapterFileError(f"{path}: expected an entry {missing[0]!r}{where}, found none. Fetch or save it again.")


def calibration_of(content: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The configuration of the calibrators that a `config.json` describes.

    Raises:
        AdapterFileError: if it is none.
    """
    method, values = content.get("method", "mgfc"), content["calibration"]
    if content["format_version"] == 1 and method == "mgfc":
        values = upgrade_calibration(values)
    try:
        return _read_calibration(method, values)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None


def _read_calibration(method: object, values: Mapping[str, Any]) -> AdapterConfig:
    """The configuration that a file holds: the name of its method, and the dict form.

    Raises:
        ConfigError: if there is no such method, or the dict is not one of its configurations.
    """
    expect(isinstance(method, str) and method in METHODS, "method", f"one of {', '.join(METHODS)}", method)
    return METHODS[str(method)].from_dict(values)


def _method_of(config: AdapterConfig) -> str:
    """The name of a configuration's method."""
    return next(name for name, kind in METHODS.items() if isinstance(config, kind))
