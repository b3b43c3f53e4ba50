"""The files of an adapter in a directory: all of one save or none."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from mgfc import peft
from mgfc.adapter import Adapter
from mgfc.backbones.description import describe
from mgfc.backbones.detection import Tower
from mgfc.distributed import gathered, process, whole
from mgfc.errors import AdapterNotFoundError
from mgfc.storage.card import is_edited_card, model_card
from mgfc.storage.format import CARD, CONFIG, HEAD, WEIGHTS, check_notes, describe_adapter, encode_config

_INCOMING, _STAGING = ".incoming", ".saving-"

Content: TypeAlias = "bytes | nn.Module | Mapping[str, Tensor] | None"


def save(
    directory: str | os.PathLike[str],
    tower: Tower,
    adapter: Adapter,
    *,
    head: nn.Module | None = None,
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str = "apache-2.0",
    with_peft: bool = False,
) -> None:
    """Writes an adapter into a directory.

    Under `torch.distributed` the first process writes, and all have to call this where parameters are sharded (FSDP,
    ZeRO-3).

    The save is atomic: whatever interrupts it, a reader finds the files of before or those of now. Other files in the
    directory stay; so does a model card that was edited (one without the mark that generated cards carry).

    Args:
        directory: made if missing.
        tower: the backbone that it was made for.
        adapter: whose parameters and statistics are written.
        head: a segmentation head to keep beside the adapter.
        training: JSON-ready notes on how it was trained; "metrics" (a dict of figures) and "datasets" (a list of names)
            also go into the model card.
        base_model: Hub id of the backbone; None to read it from the backbone.
        license: of the adapter, as a Hub identifier.
        with_peft: also write the PEFT adapter that is in the backbone.

    Raises:
        ConfigError: if `training` or the head's `arguments` cannot be written as JSON.

    Warns:
        UserWarning: if the calibrators were trained, but in eval mode, so that their statistics are empty.
    """
    described = None if head is None else {"class": type(head).__name__, "arguments": getattr(head, "arguments", None)}
    notes: dict[str, Any] = {"head": described, "training": training, "license": license, "has_peft": with_peft}
    check_notes(training or {})
    with gathered(tower.root, head):
        if adapter.num_batches == 0 and any(whole(p).any() for n, p in adapter.named_parameters() if n.endswith(".up.weight")):
            warnings.warn(
                "The calibrators were trained, but their statistics have seen no batch: the backbone was in eval mode, and the "
                "coarse and medium stages have no effect. Train with backbone.train(); frozen parameters stay frozen.",
                stacklevel=3,
            )
        backbone = describe(tower) | ({} if base_model is None else {"base_model": base_model})
        tuner = peft.files(tower.root) if with_peft else peft.NO_FILES
        write(Path(directory), adapter, describe_adapter(adapter.config, backbone, **notes), head, tuner)


def write(
    directory: Path,
    adapter: Adapter,
    content: Mapping[str, Any],
    head: Content = None,
    tuner: Mapping[str, Content] = peft.NO_FILES,
) -> None:
    """Writes an adapter's files, all or none.

    Args:
        directory: made if missing.
        adapter: whose parameters and statistics are written.
        content: of `config.json`, as `describe_adapter` returns it.
        head: a module or its tensors; None removes those of an earlier save.
        tuner: files of a PEFT adapter by name; None removes one of an earlier save.

    Raises:
        ConfigError: if the content cannot be written as JSON.
    """
    files: dict[str, Content] = {CONFIG: encode_config(content), WEIGHTS: adapter, HEAD: head, **tuner}
    card = directory / CARD
    if not (card.is_file() and is_edited_card(card)):
        files[CARD] = model_card(content, adapter.num_parameters).encode()
    _write_together(directory, files)


def find_file(directory: Path, name: str) -> Path:
    """One file of an adapter, also where a save was interrupted while it moved its files to their places.

    Raises:
        AdapterNotFoundError: if there is none.
    """
    for path in (directory / _INCOMING / name, directory / name):
        if path.is_file():
            return path
    raise AdapterNotFoundError(
        f"{directory}: expected a file {name}, found none. An adapter's directory is what save_pretrained writes."
    )


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
