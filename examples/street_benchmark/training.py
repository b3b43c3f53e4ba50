"""One training: the published schedule, checkpoints, and the statistics of whole source images at the end."""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from street_benchmark import checkpoint
from street_benchmark.backbones import blocks_of, checkpoint_activations
from street_benchmark.crops import Crops, batches, observed, sources
from street_benchmark.model import Segmenter
from street_benchmark.optimizer import build_optimizer, set_rates
from street_benchmark.processes import rank, spread, wait, world
from street_benchmark.settings import Settings

LOG_EVERY = 50


@dataclass(frozen=True)
class Running:
    """How a run is done, which does not decide its result but for rounding.

    Args:
        out: the run's folder.
        data: a folder of data sets, looked into before the one of MGFC_DATA; or None.
        device: of this process.
        engine: "ddp" or "fsdp", with several processes.
        checkpointing: whether activations of blocks are computed twice instead of kept.
        workers: processes that read images, for each process.
        save_every: steps between checkpoints.
        stop_at: step to stop at, as an interrupted run does; None for the end.
    """

    out: Path
    data: Path | None
    device: torch.device
    engine: str = "ddp"
    checkpointing: bool = False
    workers: int = 4
    save_every: int = 1000
    stop_at: int | None = None

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        return self.out / "weights.safetensors"


def trained(settings: Settings, running: Running) -> Segmenter | None:
    """The trained model, unsharded, in every process: read, or trained from where an interrupted run stopped.

    Returns:
        None if the run stopped before its end, as it was asked to.
    """
    if not running.weights.exists():
        wait()  # no process may write it before all have looked
        running.out.mkdir(parents=True, exist_ok=True)
        if train(settings, running) < settings.steps:
            return None
        gc.collect()  # a model spread over processes goes before a whole one comes
        model = Segmenter(settings).to(running.device)
        checkpoint.put(checkpoint.read(running.checkpoint, settings)["trained"], model)
        wait()  # no process may delete it before all have read it
        observe(model, settings, running)
        if rank() == 0:
            leave(model, settings, running)
        wait()
        return model
    model = Segmenter(settings).to(running.device)
    checkpoint.put(checkpoint.read_weights(running.weights, settings), model)
    return model


def train(settings: Settings, running: Running) -> int:
    """Trains, with checkpoints, and returns the number of steps that are done."""
    if settings.batch_size % world():
        raise SystemExit(f"Expected a batch that {world()} processes share, found {settings.batch_size} crops.")
    if settings.crop % settings.patch:
        raise SystemExit(f"Expected a crop of whole patches of {settings.patch} pixels, found one of {settings.crop}.")
    whole = Segmenter(settings).to(running.device)
    vit = whole.maps.backbone
    if running.checkpointing:
        checkpoint_activations(vit)
    model = spread(whole, blocks_of(vit), running.engine, running.device)
    optimizer = build_optimizer(whole, settings)
    step = checkpoint.resume(running.checkpoint, settings, model, optimizer)
    crops = Crops(settings, sources(settings, running.data), running.out.parent / "class_counts")
    end = min(settings.steps, running.stop_at or settings.steps)
    model.train()
    progress = tqdm(desc=running.out.name, initial=step, total=settings.steps, mininterval=5, disable=rank() > 0)
    with (running.out / "log.jsonl").open("a") as log:
        for images, labels in batches(crops, step, running.workers):
            if step >= end:
                break
            loss = one_step(model, optimizer, images.to(running.device), labels.to(running.device), step, settings)
            step += 1
            progress.update()
            if step % LOG_EVERY == 0 or step == end:
                value = loss.item()
                if not math.isfinite(value):
                    raise SystemExit(f"The loss is {value} after {step} steps; the last checkpoint is {running.checkpoint}.")
                if rank() == 0:
                    log.write(json.dumps({"step": step, "loss": value, "time": round(time.time())}) + "\n")
                    log.flush()
            if step % running.save_every == 0 or step == end:
                checkpoint.save(running.checkpoint, settings, step, model, optimizer)
    return step


def one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    step: int,
    settings: Settings,
) -> torch.Tensor:
    """One step. What is drawn in it depends on the seed, the step and the process, so that runs can resume anywhere."""
    torch.manual_seed((settings.seed * settings.steps + step) * world() + rank())
    set_rates(optimizer, step, settings.steps)
    loss: torch.Tensor = model(images, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def observe(model: Segmenter, settings: Settings, running: Running) -> None:
    """Gathers the statistics of the source from whole images, by the model as it is now, if its method has any."""
    calibration = model.calibration
    if calibration is None or not calibration.adapter.statistics:
        return
    model.eval()
    images = observed(settings, sources(settings, running.data))
    with calibration.observing():
        for image in tqdm(images, desc="observing", total=settings.observe // world(), disable=rank() > 0):
            model.features(image.to(running.device))


def leave(model: Segmenter, settings: Settings, running: Running) -> None:
    """Writes what was trained, and an adapter that the library loads, and deletes the checkpoint."""
    if model.calibration is not None:
        training = {"benchmark": settings.experiment, "steps": settings.steps, "seed": settings.seed, "head": settings.head}
        model.calibration.save_pretrained(running.out / "adapter", training=training)
    checkpoint.write_weights(running.weights, settings, model)
    running.checkpoint.unlink()
