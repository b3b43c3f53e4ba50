"""Files and a backbone make an adapter, strictly, or there is a reason why not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mgfc import peft
from mgfc.adapter import Adapter
from mgfc.backbones.description import describe
from mgfc.backbones.detection import Tower
from mgfc.config import AdapterConfig, MGFCConfig
from mgfc.errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, ConfigError
from mgfc.heads import SegmentationHead
from mgfc.placement import off_meta
from mgfc.storage.format import CONFIG, HEAD, MUST_MATCH, WEIGHTS, calibration_of, read_config
from mgfc.storage.legacy import is_new_since, upgrade_names, upgrade_tensors, warn_of_format
from mgfc.storage.matching import adapter_for, compare_head, compare_sizes, compare_state, fill, require_finite
from mgfc.storage.parsing import local_path, named_in_our_words, read_json, shorten
from mgfc.storage.snapshot import DirectoryFiles, Files, consistently
from mgfc.storage.tensors import read_header, read_tensors
from mgfc.storage.trainer import find_checkpoint, read_calibrators
from mgfc.storage.tuner import make_config

_FINGERPRINT_TOLERANCE = 0.01

Source = str | os.PathLike[str]


def locate(source: Source, **hub_options: Any) -> Files:
    """How to reach the files of an adapter: in a directory, without any network, or in a Hub repository.

    Args:
        source: a directory or a Hub repository.
        **hub_options: `revision`, `token`, `cache_dir` and `local_files_only`, as in `wrap_backbone`.

    Raises:
        AdapterNotFoundError: if the source is neither, or the repository cannot be reached.
    """
    text = os.fspath(source)
    path = local_path(source)
    with named_in_our_words(path):
        if os.path.isdir(path):
            return DirectoryFiles(path)
        is_file = path.exists()
    if is_file:
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found a file. Give its directory.")
    if text.startswith("local-dir:") or not isinstance(source, str) or path.is_absolute() or text.startswith((".", "~")):
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found none.")
    from mgfc.storage.hub import HubFiles

    return HubFiles(text.removeprefix("hf-hub:"), **hub_options)


def make_adapter(tower: Tower, source: AdapterConfig | Source | None, **hub_options: Any) -> tuple[Adapter, peft.Tuner | None]:
    """A fresh adapter of a configuration (None: the default one), or a saved one, for a backbone that stays untouched.

    A saved one may have a PEFT adapter beside it, which is returned, too. A path may also be that of a checkpoint of a
    whole wrapped model (see `mgfc.storage.trainer`).

    Raises:
        ConfigError: if the configuration does not fit the backbone, or `source` is of another type.
        AdapterNotFoundError, AdapterFileError, AdapterMismatchError: as in `read` and `build`.
    """
    with off_meta():
        if source is None or isinstance(source, AdapterConfig):
            return adapter_for(tower, source or MGFCConfig()), None
        if isinstance(source, (str, os.PathLike)):
            checkpoint = find_checkpoint(source)
            if checkpoint is not None:
                return read_calibrators(checkpoint, tower), None
            return consistently(locate(source, **hub_options), lambda files: read(os.fspath(source), files, tower))
    raise ConfigError(f"adapter: expected an MGFCConfig, a directory or a Hub id, found {type(source).__name__}.")


def read(source: str, files: Files, tower: Tower) -> tuple[Adapter, peft.Tuner | None]:
    """The adapter that files hold, and a PEFT adapter beside it, for a backbone that stays untouched.

    What the files say about shapes is compared before anything of such a shape is made.

    Raises:
        AdapterNotFoundError: if the files cannot be reached.
        AdapterFileError: if one is damaged.
        AdapterMismatchError: if it was made for another backbone, or its tensors are not those of its configuration.

    Warns:
        UserWarning: if the backbone has the same shape and other weights, or the files are of an old format.
    """
    path = files(CONFIG)
    content = read_config(path)
    config = calibration_of(content, path)
    found = describe(tower)
    _compare_backbones(source, content["backbone"], found)
    is_old = content["format_version"] == 1 and isinstance(config, MGFCConfig)
    weights = files(WEIGHTS)
    header = upgrade_names(read_header(weights)) if is_old else read_header(weights)
    compare_sizes(config, header, source)
    try:
        with torch.device("meta"):
            adapter = adapter_for(tower, config)
    except ConfigError as error:
        raise AdapterMismatchError(f"{source} does not fit this {found['architecture']}. {error}") from None
    optional = {name for name in adapter.state_dict() if is_old and is_new_since(name)}
    compare_state(adapter, header, source, optional)
    sums = content.get("checksums") or {}
    tensors = read_tensors(weights, sums.get(WEIGHTS))
    fill(adapter, upgrade_tensors(tensors) if is_old else tensors, source)
    beside = _read_tuner(files, sums) if content.get("peft") else None
    _compare_fingerprints(source, content["backbone"], found["fingerprint"])
    if is_old:
        warn_of_format(source, stacklevel=7)
    return adapter, beside


def _read_tuner(files: Files, sums: Mapping[str, str]) -> peft.Tuner:
    path = files(peft.CONFIG)
    values = read_json(path)
    weights = files(peft.WEIGHTS)
    tensors = read_tensors(weights, sums.get(peft.WEIGHTS))
    require_finite(tensors, str(weights))
    return make_config(values, path), tensors


def load_head(source: str | os.PathLike[str], head: nn.Module | None = None, **hub_options: Any) -> nn.Module:
    """Loads the segmentation head that was saved beside an adapter.

    Args:
        source: a directory or a Hub repository.
        head: a module of your own to load it into; None for a saved `SegmentationHead`.
        **hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as in `wrap_backbone`.

    Raises:
        AdapterNotFoundError: if it cannot be reached or there is no head.
        AdapterFileError: if a file is damaged.
        AdapterMismatchError: if `head` has other parameters.
    """
    return consistently(locate(source, **hub_options), lambda files: _read_head(os.fspath(source), files, head))


def _read_head(source: str, files: Files, head: nn.Module | None) -> nn.Module:
    content = read_config(files(CONFIG))
    described = content.get("head")
    if described is None:
        raise AdapterNotFoundError(f"{source}: expected a saved head, found an adapter without one.")
    if head is None and described.get("class") != "SegmentationHead":
        raise AdapterMismatchError(
            f"{source}: expected a SegmentationHead, found a head of class {shorten(str(described.get('class')))}. "
            "Build that module yourself and pass it as `head`."
        )
    path = files(HEAD)
    header = read_header(path)
    if head is None:
        arguments = described.get("arguments")
        compare_head(arguments, header, source)
        try:
            with torch.device("meta"):
                head = SegmentationHead(**arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterFileError(f"{source}: expected the arguments of a SegmentationHead ({error}).") from None
    compare_state(head, header, source)
    fill(head, read_tensors(path, (content.get("checksums") or {}).get(HEAD)), source, masks=True)
    return head


def _compare_backbones(source: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differ = [key for key in MUST_MATCH if None not in (expected.get(key), found[key]) and expected.get(key) != found[key]]
    if differ:
        fields = "; ".join(f"{key}: expected {expected[key]}, found {found[key]}" for key in differ)
        raise AdapterMismatchError(
            f"{source} was made for {expected.get('architecture')} "
            f"({expected.get('base_model') or 'weights of unknown name'}) and does not fit this {found['architecture']}. "
            f"{fields}. Load the backbone that it was made for."
        )


def _compare_fingerprints(source: str, backbone: Mapping[str, Any], found: list[float] | None) -> None:
    expected = backbone.get("fingerprint")
    if (
        found is None
        or not isinstance(expected, list)
        or len(expected) != len(found)
        or not all(isinstance(x, (int, float)) for x in expected)
    ):
        return
    apart = [abs(a - b) > _FINGERPRINT_TOLERANCE * max(abs(a), 1e-12) for a, b in zip(expected, found, strict=True)]
    if any(apart):
        warnings.warn(
            f"{source} was trained on a backbone of the same shape but other weights: {sum(apart)} of {len(apart)} "
            "blocks differ. Its calibrators will probably do harm; load the weights that its config.json names.",
            stacklevel=7,
        )
