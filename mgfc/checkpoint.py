"""Adapters as files: what is written, what must match, and how a save survives a crash.

A directory holds `config.json`, `model.safetensors`, optionally `head.safetensors`, and `README.md`. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mgfc
from mgfc import peft
from mgfc.adapter import Adapter
from mgfc.backbones.description import BlockWidths, block_widths, describe
from mgfc.backbones.detection import Tower
from mgfc.config import AdapterConfig, MGFCConfig, method_of
from mgfc.config import read_config as read_calibration
from mgfc.distributed import gathered, process, whole
from mgfc.errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, ConfigError
from mgfc.heads import SegmentationHead

if TYPE_CHECKING:
    from mgfc.calibration import Calibration

FORMAT_VERSION = 1
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
_INCOMING, _STAGING = ".incoming", ".saving-"
_MAX_CONFIG_BYTES = 1 << 20
_MUST_MATCH = ("depth", "embed_dim", "patch_size", "num_prefix_tokens")
_FINGERPRINT_TOLERANCE = 0.01

Locate = Callable[[str], Path]
Content = bytes | nn.Module | Mapping[str, Tensor] | None


def save_pretrained(
    calibration: Calibration,
    directory: str | os.PathLike[str],
    *,
    head: nn.Module | None = None,
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str = "apache-2.0",
) -> None:
    """Writes the active adapter into a directory.

    Under `torch.distributed` the first process writes, and all have to call this where parameters are sharded (FSDP,
    ZeRO-3).

    The save is atomic: whatever interrupts it, a reader finds the files of before or those of now. Other files in the
    directory stay; so does a model card that was edited (one without the mark that generated cards carry).

    Args:
        calibration: of a wrapped backbone.
        directory: made if missing.
        head: a segmentation head to keep beside the adapter.
        training: JSON-ready notes on how it was trained; "metrics" (a dict of figures) and "datasets" (a list of names)
            also go into the model card.
        base_model: Hub id of the backbone; None to read it from the backbone.
        license: of the adapter, as a Hub identifier.

    Raises:
        ConfigError: if `training` or the head's `arguments` cannot be written as JSON.

    Warns:
        UserWarning: if the calibrators were trained, but in eval mode, so that their statistics are empty.
    """
    adapter = calibration.adapter
    _check_notes(training or {})
    described = None if head is None else {"class": type(head).__name__, "arguments": getattr(head, "arguments", None)}
    content = {"head": described, "training": dict(training or {}), "license": license}
    with gathered(calibration.backbone, head):
        if adapter.num_batches == 0 and any(whole(p).any() for n, p in adapter.named_parameters() if n.endswith(".up.weight")):
            warnings.warn(
                "The calibrators were trained, but their statistics have seen no batch: the backbone was in eval mode, and the "
                "coarse and medium stages have no effect. Train with backbone.train(); frozen parameters stay frozen.",
                stacklevel=3,
            )
        content["backbone"] = describe(calibration.tower) | ({} if base_model is None else {"base_model": base_model})
        tuner = peft.files(calibration.backbone) if calibration.has_peft else None
        write(Path(directory), adapter, content, head, tuner)


def write(
    directory: Path, adapter: Adapter, content: Mapping[str, Any], head: Content = None, tuner: Sequence[Content] | None = None
) -> None:
    """Writes the files of an adapter, all or none.

    Args:
        directory: made if missing.
        adapter: whose parameters and configuration are written.
        content: the rest of `config.json`: "backbone", "head", "training", "license".
        head: a module or its tensors.
        tuner: what `mgfc.peft.files` returns.

    Raises:
        ConfigError: if the content cannot be written as JSON.
    """
    from mgfc.hub import is_edited_card, model_card

    content = {
        "library_name": "mgfc",
        "format_version": FORMAT_VERSION,
        "mgfc_version": mgfc.__version__,
        "method": method_of(adapter.config),
        "calibration": adapter.config.to_dict(),
        "peft": tuner is not None,
        **content,
    }
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training, head.arguments: expected what JSON can hold, found otherwise ({error}).") from None
    files: dict[str, Content] = {CONFIG: text.encode(), WEIGHTS: adapter, HEAD: head}
    files[peft.CONFIG], files[peft.WEIGHTS] = tuner or (None, None)
    card = directory / CARD
    if not (card.is_file() and is_edited_card(card)):
        files[CARD] = model_card(content, adapter.num_parameters).encode()
    _write_together(directory, files)


def _check_notes(training: Mapping[str, Any]) -> None:
    metrics, datasets = training.get("metrics") or {}, training.get("datasets") or []
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"training: expected metrics to be a dict of figures, found {metrics!r}.")
    if not isinstance(datasets, (list, tuple)) or not all(isinstance(name, str) for name in datasets):
        raise ConfigError(f"training: expected datasets to be a list of names, found {datasets!r}.")


def _write_together(directory: Path, files: Mapping[str, Content]) -> None:
    """Writes files beside their places, commits all of them by one rename, then moves them to their places.

    From the rename on a reader looks into `.incoming` first; a file that is None is removed.
    """
    encoded = {name: _encode(content) for name, content in files.items()}
    if process()[0] != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    _finish(directory)
    for left_by_a_crash in directory.glob(f"{_STAGING}*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    try:
        for name, content in encoded.items():
            if content is not None:
                path = staging / name
                path.write_bytes(content)
                _sync(path)
        os.replace(staging, directory / _INCOMING)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(directory)
    _finish(directory)
    for name, content in encoded.items():
        if content is None and (directory / name).exists():
            (directory / name).unlink()


def _encode(content: Content) -> bytes | None:
    """What a file holds: modules and dicts of tensors in safetensors format."""
    from safetensors.torch import save

    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        return content
    # Clones, since safetensors refuses tensors that share memory, as tied weights of a head do.
    tensors = {key: whole(value.detach()).clone().contiguous() for key, value in content.items()}
    # Not save_file, whose files nobody but their owner may read.
    return save(tensors, metadata={"format": "pt"})


def _finish(directory: Path) -> None:
    """Moves committed files to their places, also those of a save that was interrupted there."""
    incoming = directory / _INCOMING
    if incoming.is_dir():
        for path in incoming.iterdir():
            os.replace(path, directory / path.name)
        incoming.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Locate:
    """How to reach the files of an adapter: in a directory, without any network, or in a Hub repository.

    Raises:
        AdapterNotFoundError: if the source is neither, or the repository cannot be reached.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text.removeprefix("local-dir:")))
    if path.is_dir():
        return lambda name: _local_file(path, name)
    if path.exists():
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found a file. Give its directory.")
    if text.startswith("local-dir:") or not isinstance(source, str) or path.is_absolute() or text.startswith((".", "~")):
        raise AdapterNotFoundError(f"{text}: expected the directory of an adapter, found none.")
    from mgfc.hub import locate as locate_on_hub

    return locate_on_hub(
        text.removeprefix("hf-hub:"),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _local_file(directory: Path, name: str) -> Path:
    for path in (directory / _INCOMING / name, directory / name):
        if path.is_file():
            return path
    raise AdapterNotFoundError(
        f"{directory}: expected a file {name}, found none. An adapter's directory is what save_pretrained writes."
    )


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
    missing = [key for key in ("calibration", "backbone") if not isinstance(content.get(key), dict)]
    if missing:
        raise AdapterFileError(f"{path}: expected an entry {missing[0]!r}, found none. Fetch or save it again.")
    missing = [key for key in _MUST_MATCH if key not in content["backbone"]]
    if missing:
        raise AdapterFileError(f"{path}: expected an entry {missing[0]!r} of the backbone, found none. Fetch or save it again.")
    size, training = content["backbone"]["patch_size"], content.get("training")
    for name, value, kind in (("patch_size", size, list), ("training", training, dict)):
        if not isinstance(value, kind | None):
            raise AdapterFileError(f"{path}: expected {name} to be a {kind.__name__} or null, found {value!r}.")
    return content


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


def build(
    tower: Tower, adapter: AdapterConfig | str | os.PathLike[str] | None, **hub_options: Any
) -> tuple[Adapter, peft.Tuner | None]:
    """A fresh adapter of a configuration (None: the default one), or a saved one, for a backbone that stays untouched.

    A saved one may have an adapter of PEFT's beside it, which is returned, too.

    Raises:
        ConfigError: if the configuration does not fit the backbone, or `adapter` is of another type.
        AdapterNotFoundError, AdapterFileError, AdapterMismatchError: as in `load`.
    """
    if adapter is None or isinstance(adapter, AdapterConfig):
        return Adapter(adapter or MGFCConfig(), _widths(tower)), None
    if isinstance(adapter, (str, os.PathLike)):
        return load(tower, adapter, **hub_options)
    raise ConfigError(f"adapter: expected an MGFCConfig, a directory or a Hub id, found {type(adapter).__name__}.")


def _widths(tower: Tower) -> list[BlockWidths]:
    return [block_widths(block) for block in tower.modules()]


def load(tower: Tower, source: str | os.PathLike[str], **hub_options: Any) -> tuple[Adapter, peft.Tuner | None]:
    """Reads a saved adapter for a backbone that stays untouched.

    Args:
        tower: the backbone.
        source: a directory or a Hub repository.
        **hub_options: as in `locate`.

    Raises:
        AdapterNotFoundError: if the adapter cannot be reached.
        AdapterFileError: if a file is damaged.
        AdapterMismatchError: if it was made for another backbone.
    """
    find = locate(source, **hub_options)
    config_path = find(CONFIG)
    content = read_config(config_path)
    found = describe(tower)
    _compare_backbones(content["backbone"], found, os.fspath(source))
    try:
        config = read_calibration(content.get("method", "mgfc"), content["calibration"])
    except ConfigError as error:
        raise AdapterFileError(f"{config_path}: {error}") from None
    tensors = read_tensors(find(WEIGHTS))
    try:
        with torch.device("meta"):
            adapter = Adapter(config, _widths(tower))
    except ConfigError as error:
        raise AdapterMismatchError(f"{os.fspath(source)} does not fit this {found['architecture']}. {error}") from None
    _load_strictly(adapter, tensors, os.fspath(source))
    _compare_fingerprints(content["backbone"].get("fingerprint"), found["fingerprint"], os.fspath(source))
    tuner = None
    if content.get("peft"):
        tuner = peft.read_config(find(peft.CONFIG)), read_tensors(find(peft.WEIGHTS))
    return adapter, tuner


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


def _compare_backbones(expected: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
    differ = [key for key in _MUST_MATCH if None not in (expected.get(key), found[key]) and expected.get(key) != found[key]]
    if differ:
        fields = "; ".join(f"{key}: expected {expected[key]}, found {found[key]}" for key in differ)
        raise AdapterMismatchError(
            f"{source} was made for {expected.get('architecture')} ({expected.get('base_model') or 'weights of unknown name'}) "
            f"and does not fit this {found['architecture']}. {fields}. Load the backbone that it was made for."
        )


def _compare_fingerprints(expected: object, found: list[float], source: str) -> None:
    if not isinstance(expected, list) or len(expected) != len(found) or not all(isinstance(x, (int, float)) for x in expected):
        return
    apart = [abs(a - b) > _FINGERPRINT_TOLERANCE * max(abs(a), 1e-12) for a, b in zip(expected, found, strict=True)]
    if any(apart):
        warnings.warn(
            f"{source} was trained on a backbone of the same shape but other weights: {sum(apart)} of {len(apart)} blocks "
            "differ. Its calibrators will probably do harm; load the weights that its config.json names.",
            stacklevel=5,
        )
