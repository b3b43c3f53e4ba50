"""What a run goes on from, and what it leaves: whole files, the same from one process and from many."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from streets import save_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from street_benchmark.processes import rank, wait
from street_benchmark.settings import Settings

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def save(path: Path, settings: Settings, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the state after so many steps. All processes call it; the first one writes."""
    trained, optimized = get_state_dict(model, optimizer, options=OPTIONS)
    if rank() == 0:
        state = {"settings": asdict(settings), "step": step, "trained": trained, "optimizer": optimized}
        save_checkpoint(state, path)
    wait()


def resume(path: Path, settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads what `save` wrote, if there is a file, and returns its number of steps; else 0."""
    if not path.exists():
        return 0
    saved = read(path, settings)
    set_state_dict(model, optimizer, model_state_dict=saved["trained"], optim_state_dict=saved["optimizer"], options=OPTIONS)
    return int(saved["step"])


def read(path: Path, settings: Settings) -> dict[str, Any]:
    """A checkpoint.

    Raises:
        SystemExit: if it belongs to a run with other settings.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    require(saved["settings"], settings, path)
    return saved


def require(found: dict[str, Any], settings: Settings, path: Path) -> None:
    """Raises SystemExit if a file is of a run with other settings."""
    expected = asdict(settings)
    if different := [name for name in expected if found.get(name) != expected[name]]:
        told = ", ".join(f"{name} {found.get(name)!r}, now {expected[name]!r}" for name in different)
        raise SystemExit(f"{path} is of a run with other settings: {told}. Name another folder with --out, or delete this one.")


def write_weights(path: Path, settings: Settings, model: nn.Module) -> None:
    """Writes what was trained, parameters and statistics, without the frozen backbone."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items() if name not in frozen}
    part = path.with_suffix(".part")
    save_file(state, part, {"settings": json.dumps(asdict(settings))})
    os.replace(part, path)


def read_weights(path: Path, settings: Settings) -> dict[str, Tensor]:
    """What `write_weights` wrote; SystemExit if it is of a run with other settings."""
    with safe_open(path, "pt") as file:
        require(json.loads(file.metadata()["settings"]), settings, path)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def put(state: dict[str, Tensor], model: nn.Module) -> None:
    """Puts what was trained into a fresh model.

    Raises:
        ValueError: if it does not hold everything that the model trains, or something that the model has not.
    """
    found = model.load_state_dict(state, strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found.unexpected_keys or trained & set(found.missing_keys):
        wrong = [*found.unexpected_keys, *sorted(trained & set(found.missing_keys))]
        raise ValueError(f"Expected all that the model trains and nothing else, found otherwise for: {', '.join(wrong[:3])}.")
