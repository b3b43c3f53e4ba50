"""The files of an adapter in a directory: all of one save or none."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from mgfc.adapter import Adapter
from mgfc.backbones.description import describe
from mgfc.backbones.detection import Tower
from mgfc.calibrators.running import statistics_in_words
from mgfc.distributed import gathered, process
from mgfc.storage.card import is_edited_card, model_card
from mgfc.storage.format import CARD, CONFIG, HEAD, WEIGHTS, check_notes, describe_adapter, encode_config
from mgfc.storage.locking import locked
from mgfc.storage.ownership import refuse_foreign
from mgfc.storage.parsing import named_in_our_words
from mgfc.storage.snapshot import INCOMING, DirectoryFiles
from mgfc.storage.tensors import checksum_of, encode_tensors
from mgfc.storage.tuner import NO_FILES
from mgfc.storage.tuner import files as files_of_peft

_STAGING = ".saving-"

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

    The save is atomic: whatever interrupts it, a reader finds the files of before or those of now, also while another
    process saves. Other files in the directory stay; so does a model card that was edited (one without the mark that
    generated cards carry).

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
        ConfigError: if `training` or the head's `arguments` cannot be written as JSON, or a tensor is not finite.
        AdapterFileError: if a model that is no adapter of this library lies there; it stays as it is.
        AdapterNotFoundError: if the directory cannot be written; an adapter of before stays whole.

    Warns:
        UserWarning: if the calibrators learnt nothing, or their statistics are empty.
    """
    described = None if head is None else {"class": type(head).__name__, "arguments": getattr(head, "arguments", None)}
    notes: dict[str, Any] = {"head": described, "training": training, "license": license, "has_peft": with_peft}
    check_notes(training or {})
    with gathered(tower.root, head):
        problem = adapter.problem
        if problem is not None:
            warnings.warn(f"{problem} It is saved as it is.", stacklevel=3)
        backbone = describe(tower) | ({} if base_model is None else {"base_model": base_model})
        peft_files = files_of_peft(tower.root) if with_peft else NO_FILES
        write(Path(directory), adapter, describe_adapter(adapter.config, backbone, **notes), head, peft_files)


def write(
    directory: Path,
    adapter: Adapter,
    content: Mapping[str, Any],
    head: Content = None,
    tuner: Mapping[str, Content] = NO_FILES,
) -> None:
    """Writes an adapter's files, all or none.

    Args:
        directory: made if missing.
        adapter: whose parameters and statistics are written.
        content: of `config.json`, as `describe_adapter` returns it.
        head: a module or its tensors; None removes those of an earlier save.
        tuner: files of a PEFT adapter by name; None removes one of an earlier save.

    Raises:
        ConfigError, AdapterFileError, AdapterNotFoundError: as in `save`.
    """
    names = {WEIGHTS: adapter, HEAD: head, **tuner}
    files = {name: _encode(value, name) for name, value in names.items()}
    sums = {name: checksum_of(data) for name, data in files.items() if data is not None}
    files[CONFIG] = encode_config(dict(content) | {"checksums": sums})
    statistics = statistics_in_words(adapter.num_batches, adapter.is_observed)
    files[CARD] = model_card(content, adapter.num_parameters, statistics).encode("utf-8", "backslashreplace")
    if process()[0] == 0:
        with named_in_our_words(directory, "written"):
            _write_together(directory, files)


def _encode(content: Content, name: str) -> bytes | None:
    """What a file holds: modules and dicts of tensors in safetensors format."""
    return encode_tensors(content, name, masks=name == HEAD) if isinstance(content, (nn.Module, Mapping)) else content


def _write_together(directory: Path, files: dict[str, bytes | None]) -> None:
    """Makes files the current generation, as `mgfc.storage.snapshot` says; one that is None is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory) as alone:
        names = [path.name for path in directory.iterdir()]
        refuse_foreign(str(directory), names, lambda: DirectoryFiles(directory)(CONFIG))
        _finish(directory)
        if alone:
            for left_by_a_crash in directory.glob(f"{_STAGING}*"):
                shutil.rmtree(left_by_a_crash, ignore_errors=True)
        card = directory / CARD
        if card.is_file() and is_edited_card(card):
            files.pop(CARD)
        staging = directory / f"{_STAGING}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            staging.mkdir()  # with the mode that the umask gives, so that others can read what a crash leaves
            for name, data in files.items():
                if data is not None:
                    _write(staging / name, data)
            sync_directory(staging)
            os.replace(staging, directory / INCOMING)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sync_directory(directory)
        _finish(directory)
        for name, data in files.items():
            if data is None and (directory / name).exists():
                (directory / name).unlink()


def _write(path: Path, data: bytes) -> None:
    """Writes a file, down to the disk."""
    path.write_bytes(data)
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def _finish(directory: Path) -> None:
    """Moves the files of the current generation to their places, also those of a save that was interrupted there."""
    incoming = directory / INCOMING
    if incoming.is_dir():
        for path in incoming.iterdir():
            os.replace(path, directory / path.name)
        incoming.rmdir()


def sync_directory(directory: Path) -> None:
    """Brings the names in a directory down to the disk, where the system can: Windows opens no directories."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
