"""Files and a backbone make an adapter, strictly, or there is a reason why not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgfc import peft
from mgfc.adapter import Adapter
from mgfc.backbones.description import block_widths, describe
from mgfc.backbones.detection import Tower
from mgfc.backbones.stem import in_channels
from mgfc.config import AdapterConfig, MGFCConfig
from mgfc.errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, ConfigError
from mgfc.heads import SegmentationHead
from mgfc.storage.directory import find_file
from mgfc.storage.format import CONFIG, HEAD, MUST_MATCH, WEIGHTS, calibration_of, read_config, read_tensors

_FINGERPRINT_TOLERANCE = 0.01

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Saved:
    """What an adapter's files hold, as plain data.

    Args:
        source: directory or repository, as the user named it.
        config: of the calibrators.
        backbone: description of the backbone that they were made for.
        tensors: parameters and statistics of the calibrators.
        tuner: a PEFT adapter beside them, if there is one.
    """

    source: str
    config: AdapterConfig
    backbone: Mapping[str, Any]
    tensors: dict[str, Tensor]
    tuner: peft.Tuner | None


def locate(source: Source, **hub_options: Any) -> Callable[[str], Path]:
    """How to reach the files of an adapter: in a directory, without any network, or in a Hub repository.

    Args:
        source: a directory or a Hub repository.
        **hub_options: `revision`, `token`, `cache_dir` and `local_files_only`, as in `wrap_backbone`.

    Raises:
        AdapterNotFoundError: if the source is neither, or the repository cannot be reached.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text.removeprefix("local-dir:")))
    if path.is_dir():
        return lambda name: find_file(path, name)
    if path.exists():
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found a file. Give its directory.")
    if text.startswith("local-dir:") or not isinstance(source, str) or path.is_absolute() or text.startswith((".", "~")):
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found none.")
    from mgfc.storage import hub

    return hub.locate(text.removeprefix("hf-hub:"), **hub_options)


def make_adapter(tower: Tower, source: AdapterConfig | Source | None, **hub_options: Any) -> tuple[Adapter, peft.Tuner | None]:
    """A fresh adapter of a configuration (None: the default one), or a saved one, for a backbone that stays untouched.

    A saved one may have a PEFT adapter beside it, which is returned, too.

    Raises:
        ConfigError: if the configuration does not fit the backbone, or `source` is of another type.
        AdapterNotFoundError, AdapterFileError, AdapterMismatchError: as in `read` and `build`.
    """
    if source is None or isinstance(source, AdapterConfig):
        return _adapter(source or MGFCConfig(), tower), None
    if isinstance(source, (str, os.PathLike)):
        saved = read(source, **hub_options)
        return build(saved, tower), saved.tuner
    raise ConfigError(f"adapter: expected an MGFCConfig, a directory or a Hub id, found {type(source).__name__}.")


def read(source: Source, **hub_options: Any) -> Saved:
    """Reads the files of an adapter.

    Raises:
        AdapterNotFoundError: if they cannot be reached.
        AdapterFileError: if one is damaged.
    """
    find = locate(source, **hub_options)
    path = find(CONFIG)
    content = read_config(path)
    config = calibration_of(content, path)
    tensors = read_tensors(find(WEIGHTS))
    tuner = (peft.read_config(find(peft.CONFIG)), read_tensors(find(peft.WEIGHTS))) if content.get("peft") else None
    return Saved(os.fspath(source), config, content["backbone"], tensors, tuner)


def build(saved: Saved, tower: Tower) -> Adapter:
    """The adapter that files hold, for a backbone that stays untouched.

    Raises:
        AdapterMismatchError: if it was made for another backbone, or its tensors are not those of its configuration.

    Warns:
        UserWarning: if the backbone has the same shape and other weights.
    """
    found = describe(tower)
    _compare_backbones(saved, found)
    try:
        with torch.device("meta"):
            adapter = _adapter(saved.config, tower)
    except ConfigError as error:
        raise AdapterMismatchError(f"{saved.source} does not fit this {found['architecture']}. {error}") from None
    _load_strictly(adapter, saved.tensors, saved.source)
    _compare_fingerprints(saved, found["fingerprint"])
    return adapter


def _adapter(config: AdapterConfig, tower: Tower) -> Adapter:
    return Adapter(config, [block_widths(block) for block in tower.modules()], in_channels(tower))


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
    find = locate(source, **hub_options)
    described = read_config(find(CONFIG)).get("head")
    if not isinstance(described, dict):
        raise AdapterNotFoundError(f"{os.fspath(source)}: expected a saved head, found an adapter without one.")
    if head is None:
        if described.get("class") != "SegmentationHead":
            raise AdapterMismatchError(
                f"{os.fspath(source)}: expected a SegmentationHead, found a head of class {described.get('class')}. "
                "Build that module yourself and pass it as `head`."
            )
        try:
            with torch.device("meta"):
                head = SegmentationHead(**described["arguments"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AdapterFileError(f"{os.fspath(source)}: expected the arguments of a SegmentationHead ({error}).") from None
    _load_strictly(head, read_tensors(find(HEAD)), os.fspath(source))
    return head


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    own = module.state_dict()
    problems = [f"{key}: expected none, found one in the file" for key in tensors if key not in own]
    problems += [f"{key}: expected in the file, found none" for key in own if key not in tensors]
    problems += [
        f"{key}: expected shape {tuple(own[key].shape)}, found {tuple(tensors[key].shape)}"
        for key in own
        if key in tensors and own[key].shape != tensors[key].shape
    ]
    problems += [
        f"{key}: expected a tensor like {own[key].dtype}, found {tensors[key].dtype}"
        for key in own
        if key in tensors and own[key].is_floating_point() != tensors[key].is_floating_point()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise AdapterMismatchError(f"{source}: tensors and configuration disagree. {problems[0]}{more}.")
    # A module of the user's keeps its parameters, with their device and dtype: an optimizer may hold them already.
    assign = any(value.is_meta for value in own.values())
    # Tensors lie in a file as they come; a copy is aligned, as a fresh parameter is, so that the same kernels run.
    module.load_state_dict({key: value.clone() for key, value in tensors.items()} if assign else tensors, assign=assign)
    for part in module.modules():
        for name, value in part.named_buffers(recurse=False):
            if value.is_meta:  # state of a run that no file holds
                setattr(part, name, torch.zeros_like(value, device="cpu"))


def _compare_backbones(saved: Saved, found: Mapping[str, Any]) -> None:
    expected = saved.backbone
    differ = [key for key in MUST_MATCH if None not in (expected.get(key), found[key]) and expected.get(key) != found[key]]
    if differ:
        fields = "; ".join(f"{key}: expected {expected[key]}, found {found[key]}" for key in differ)
        raise AdapterMismatchError(
            f"{saved.source} was made for {expected.get('architecture')} "
            f"({expected.get('base_model') or 'weights of unknown name'}) and does not fit this {found['architecture']}. "
            f"{fields}. Load the backbone that it was made for."
        )


def _compare_fingerprints(saved: Saved, found: list[float]) -> None:
    expected = saved.backbone.get("fingerprint")
    if not isinstance(expected, list) or len(expected) != len(found) or not all(isinstance(x, (int, float)) for x in expected):
        return
    apart = [abs(a - b) > _FINGERPRINT_TOLERANCE * max(abs(a), 1e-12) for a, b in zip(expected, found, strict=True)]
    if any(apart):
        warnings.warn(
            f"{saved.source} was trained on a backbone of the same shape but other weights: {sum(apart)} of {len(apart)} "
            "blocks differ. Its calibrators will probably do harm; load the weights that its config.json names.",
            stacklevel=5,
        )
