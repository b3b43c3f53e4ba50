"""Scores a trained model on the targets of an experiment, and adds a record for each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from data import find
from data.classes import CITYSCAPES
from domain_generalization.metrics import Confusion
from domain_generalization.report import append, read
from streets import StreetScenes, normalise
from torch.nn import functional as F
from tqdm import tqdm

from street_benchmark.experiments import EXPERIMENTS, SIZES, Size, fitted
from street_benchmark.model import Segmenter
from street_benchmark.processes import rank, sum_over_processes, world
from street_benchmark.settings import Settings
from street_benchmark.training import Running
from street_benchmark.windows import slide


@torch.inference_mode()
def score(model: Segmenter, scenes: StreetScenes, into: Size | None, window: int, title: str = "") -> dict[str, float]:
    """IoU in percent of each class at the labels' own resolution, over all processes' scenes, as mmsegmentation counts it:
    a class that is found and that the labels do not hold has 0.

    Args:
        model: what to score.
        scenes: shared out among the processes.
        into: (width, height) that images are scaled into; None for their own.
        window: height and width of windows.
        title: of the progress bar.
    """
    model.eval()
    device = next(model.parameters()).device
    confusion = Confusion(device, CITYSCAPES)
    for index in tqdm(range(rank(), len(scenes), world()), desc=title, mininterval=5, disable=rank() > 0):
        image, label = (np.asarray(part) for part in scenes[index])
        size = fitted((image.shape[1], image.shape[0]), into)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        scores = slide(model, normalise(image).unsqueeze(0).to(device), window)
        scores = F.interpolate(scores, label.shape, mode="bilinear", align_corners=False)
        confusion.add(scores.max(dim=1).indices, torch.from_numpy(label.copy()).unsqueeze(0).to(device))
    sum_over_processes(confusion.counts)
    return confusion.iou(found=True)


def score_all(model: Segmenter, settings: Settings, running: Running, sizes: str, results: Path) -> None:
    """Scores the targets that have no record yet."""
    done = {(record["target"], record["sizes"]) for record in read(results) if record["settings"] == asdict(settings)}
    for name, place in EXPERIMENTS[settings.experiment].targets.items():
        if (name, sizes) in done:
            continue
        data, split = place.split(":")
        scenes = StreetScenes(find(data, running.data), split)
        iou = score(model, scenes, SIZES[sizes].get(data), settings.crop, name)
        if rank() == 0:
            record = record_of(iou, settings, name, sizes, len(scenes))
            append(results, record)
            print(f"{settings.experiment} {settings.method} | {name}: mIoU {record['miou']:.2f}", flush=True)


def record_of(iou: dict[str, float], settings: Settings, target: str, sizes: str, images: int) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "target": target,
        "sizes": sizes,
        "images": images,
        "miou": sum(iou.values()) / len(iou),
        "iou": iou,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processes": world(),
        "torch": torch.__version__,
    }
