"""One training: a method on a source domain, selecting nothing; what it trained goes into a file."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from streets import CLASSES, IGNORE
from torch import Tensor, nn
from torch.nn import functional as F
from train_minimal import build_optimizer

from domain_generalization.crops import Stream, batches
from domain_generalization.methods import METHODS
from domain_generalization.scenes import load_backbone
from mgfc import FeatureMaps, MGFCConfig, SegmentationHead, wrap_backbone

HEAD_LR = 1e-3
SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on.

    Args:
        method: a name in `METHODS`.
        source: a name in `SOURCES`.
        seed: of the head, of what the method adds, of the order and the augmentation of the images.
        lr: learning rate of what the method trains; the head's is `HEAD_LR`.
        steps: optimiser steps.
        batch_size: crops in a step.
        crop: (height, width) of a crop.
        size: (height, width) that images are brought to, before augmentation and for testing; images of another shape
            keep it, at this height.
        split: "development" or "test" frames of the unseen domains, or "val" for none but the source's validation.
        count: images in each clean set of an evaluation.
        options: further arguments of the method.
        average: decay of a running average of the trained weights, which is scored in their place; 0 for none.
    """

    method: str
    source: str
    seed: int
    lr: float
    steps: int
    batch_size: int
    crop: tuple[int, int]
    size: tuple[int, int]
    split: str
    count: int
    options: dict[str, Any] = field(default_factory=dict)
    average: float = 0.0

    @property
    def stream(self) -> Stream:
        """What it trains on."""
        return Stream(self.source, self.seed, self.steps, self.batch_size, self.crop, self.size)

    @property
    def training(self) -> str:
        """A name for all that training depends on, which the frames of the evaluation are no part of."""
        made = {name: value for name, value in asdict(self).items() if name not in ("split", "count")}
        return f"{self.method}-{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Places:
    """Where runs find and leave things.

    Args:
        packed: the folder that `pack` wrote.
        weights: what was trained, a file a training.
        crops: streams of crops.
        device: what runs them.
    """

    packed: Path
    weights: Path
    crops: Path
    device: torch.device


@dataclass(frozen=True)
class Trained:
    """What a training leaves: parameters and statistics by name, and what it cost."""

    state: dict[str, Tensor]
    cost: dict[str, Any]


def build(settings: Settings, places: Places, *, calibrated: bool = False) -> nn.Sequential:
    """The feature maps of an adapted backbone, then a head.

    Args:
        settings: of the run.
        places: the folder that holds the backbone.
        calibrated: with mgfc's calibration, and nothing learnt of it, on a method that has none; an option of this name,
            a configuration of it, trains it so. It is put on first, so that it sees the tokens as the method's own hooks
            leave them.
    """
    vit = load_backbone(places.packed)
    torch.manual_seed(settings.seed)
    head = SegmentationHead([vit.config.hidden_size] * 4, len(CLASSES))
    options = dict(settings.options)
    calibration = options.pop("calibrated", {} if calibrated else None)
    if calibration is not None and not settings.method.startswith("mgfc"):
        wrap_backbone(vit, MGFCConfig.from_dict({"rank": None} | calibration))
    METHODS[settings.method](vit, **options)
    return nn.Sequential(FeatureMaps(vit, out_indices=(2, 5, 8, 11)), head).to(places.device)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def restored(model: nn.Sequential, trained: Trained, *, statistics: bool = True) -> nn.Sequential:
    """Puts into a fresh model what was trained, as far as the model has it.

    Args:
        model: as `build` makes it.
        trained: what to put into it.
        statistics: whether to take running statistics along, too.

    Raises:
        ValueError: if something that the model trains was not trained.
    """
    needed = trained_parameters(model)
    if missing := needed.keys() - trained.state.keys():
        raise ValueError(f"Not trained: {', '.join(sorted(missing)[:3])}.")
    wanted = model.state_dict().keys() if statistics else needed.keys()
    model.load_state_dict({name: value for name, value in trained.state.items() if name in wanted}, strict=False)
    return model


def trained_or_train(settings: Settings, places: Places) -> Trained:
    """Reads what was trained; trains, and writes it, if there is none. An interrupted training goes on."""
    path = places.weights / f"{settings.training}.safetensors"
    if not path.exists():
        places.weights.mkdir(parents=True, exist_ok=True)
        checkpoint = path.with_suffix(".checkpoint")
        model = build(settings, places)
        cost = train(model, settings, places, checkpoint)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items() if name not in frozen}
        part = path.with_suffix(".part")
        save_file(state, part, {"cost": json.dumps(cost)})
        os.replace(part, path)
        checkpoint.unlink(missing_ok=True)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return Trained(state, json.loads(file.metadata()["cost"]))


def train(model: nn.Sequential, settings: Settings, places: Places, checkpoint: Path) -> dict[str, Any]:
    """Trains in place; goes on from the checkpoint of an interrupted run. Returns what it cost."""
    device = places.device
    optimizer, schedule = build_optimizer(model, settings.lr, HEAD_LR, settings.steps)
    trained = trained_parameters(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    step, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        step, seconds, average = saved["step"], saved["seconds"], saved["average"]
        model.load_state_dict(saved["trained"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"].cpu())
    calibration = getattr(model[0].backbone, "calibration", None)
    model.train()
    last = start = time.perf_counter()
    for images, labels in batches(settings.stream, places.crops, places.packed, step, device):
        logits = F.interpolate(model(images), size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        if calibration is not None:
            loss = loss + calibration.loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        if settings.average:
            decay = min(settings.average, step / (step + 10))
            for name, parameter in trained.items():
                average[name].lerp_(parameter.detach(), 1 - decay)
        if time.perf_counter() - last > SAVE_EVERY:
            last = time.perf_counter()
            state = {"step": step, "seconds": seconds + last - start, "average": average, "rng": torch.get_rng_state()}
            state |= {"trained": {name: value for name, value in model.state_dict().items() if name not in frozen}}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds += time.perf_counter() - start
    if settings.average:
        model.load_state_dict(average, strict=False)
    threads = torch.get_num_threads()
    return {
        "parameters": sum(p.numel() for p in model[0].parameters() if p.requires_grad),
        "seconds_per_step": round(seconds / max(1, settings.steps), 4),
        "peak_memory_mib": round(peak_memory(device), 1),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}",
        "torch": torch.__version__,
    }


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU's memory; on a CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
