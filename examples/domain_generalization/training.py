"""One run: train a method on a source domain, select nothing, score it on the source and on what it never saw."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from backbone import load_dinov2_small
from streets import CLASSES, IGNORE, TrainingCrops, evaluate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from train_minimal import build_optimizer

from domain_generalization.domains import SOURCES, Resized, Target, open_split, targets
from domain_generalization.methods import METHODS
from mgfc import FeatureMaps, SegmentationHead

HEAD_LR = 1e-3


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
        size: (height, width) that images are brought to, before augmentation and for testing.
        split: "development" or "test" frames of the unseen domains, or "val" for none but the source's validation.
        count: images in each clean set of an evaluation; None for all.
        options: further arguments of the method.
        average: decay of a running average of the trained weights, which is scored in their place; 0 for none.
    """

    method: str
    source: str
    seed: int
    lr: float
    steps: int = 200
    batch_size: int = 4
    crop: tuple[int, int] = (112, 154)
    size: tuple[int, int] = (168, 224)
    split: str = "test"
    count: int | None = 48
    options: dict[str, Any] = field(default_factory=dict)
    average: float = 0.0


def build(settings: Settings, backbone: Path | None) -> nn.Sequential:
    """Backbone with the method on it, and head: the same head for the same seed, whatever the method."""
    vit = load_dinov2_small(backbone)
    torch.manual_seed(settings.seed)
    head = SegmentationHead([vit.config.hidden_size] * 4, len(CLASSES))
    METHODS[settings.method](vit, **settings.options)
    return nn.Sequential(FeatureMaps(vit, out_indices=(2, 5, 8, 11)), head)


def train(model: nn.Sequential, settings: Settings, data: Path, checkpoint: Path, save_every: float) -> dict[str, float]:
    """Trains in place; goes on from the checkpoint of an interrupted run."""
    device = next(model.parameters()).device
    optimizer, schedule = build_optimizer(model, settings.lr, HEAD_LR, settings.steps)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
    scenes = Resized(open_split(data, SOURCES[settings.source].train), settings.size)
    items = (step * settings.batch_size, settings.steps * settings.batch_size)
    batches = DataLoader(TrainingCrops(scenes, settings.crop, settings.seed, *items), settings.batch_size)
    calibration = getattr(model[0].backbone, "calibration", None)
    model.train()
    last = start = time.perf_counter()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
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
        if time.perf_counter() - last > save_every:
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
    return {"seconds_per_step": seconds / max(1, settings.steps), "peak_memory_mib": peak_memory(device)}


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU's memory; on a CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def score(model: nn.Sequential, settings: Settings, data: Path) -> dict[str, dict[str, float]]:
    """IoU in percent of each class, for the source's validation, its in-domain test and each unseen target."""
    source = SOURCES[settings.source]
    sets = {"val": Target((open_split(data, source.val),), settings.count)}
    if source.in_domain != source.val and settings.split == "test":
        sets["in-domain"] = Target((open_split(data, source.in_domain),), settings.count)
    if settings.split != "val":
        sets |= targets(data, source, settings.split, settings.count)
    return {name: evaluate(model, images, settings.size, title=name).iou for name, images in sets.items()}


def run(settings: Settings, data: Path, backbone: Path | None, device: str, checkpoint: Path) -> dict[str, Any]:
    """Trains, scores and returns what belongs into the file of results."""
    model = build(settings, backbone).to(device)
    parameters = sum(p.numel() for p in model[0].parameters() if p.requires_grad)
    cost = train(model, settings, data, checkpoint, save_every=60)
    iou = score(model, settings, data)
    checkpoint.unlink(missing_ok=True)
    calibration = getattr(model[0].backbone, "calibration", None)
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return {
        "settings": asdict(settings),
        "calibration": None if calibration is None else calibration.config.to_dict(),
        "parameters": parameters,
        **{name: round(value, 4) for name, value in cost.items()},
        "machine": machine,
        "torch": torch.__version__,
        "miou": {name: round(sum(values.values()) / len(values), 3) for name, values in iou.items()},
        "iou": {name: {key: round(value, 2) for key, value in values.items()} for name, values in iou.items()},
    }
