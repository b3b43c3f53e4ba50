"""What is scored of one trained model, without training again."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image
from streets import jitter
from torch import nn

from domain_generalization.alignment import align_classes, align_statistics
from domain_generalization.domains import SOURCES, targets
from domain_generalization.inputs import CONTROLS, SOURCE_IMAGES, control
from domain_generalization.scenes import Scenes, read, read_training
from domain_generalization.scoring import normalise, score
from domain_generalization.training import Places, Settings, Trained, build, restored
from mgfc import Calibration, get_calibration

AS_TRAINED = "as trained"
ALIGNMENTS = ("feature statistics aligned", "classes aligned")
AFTERWARDS = "calibrated after training"
# mgfc's ablations that evaluation decides: what is changed in its configuration.
WITHOUT: dict[str, dict[str, Any]] = {
    "without coarse": {"coarse": None},
    "without medium": {"medium": None},
    "without coarse and medium": {"coarse": None, "medium": None},
}
OBSERVED = 240  # images of the source


def variants(method: str) -> tuple[str, ...]:
    """All that is scored of a method."""
    ours = tuple(WITHOUT) if method.startswith("mgfc") else ()
    after = (AFTERWARDS,) if hasattr(Calibration, "observing") else ()
    return (AS_TRAINED, *CONTROLS, *ALIGNMENTS, *after, *ours)


def model_of(variant: str, settings: Settings, trained: Trained, places: Places) -> nn.Sequential:
    """The model of a variant, ready to be scored."""
    if variant in WITHOUT:
        settings = replace(settings, options=settings.options | WITHOUT[variant])
    if variant == AFTERWARDS:
        model = restored(build(settings, places, calibrated=True), trained, statistics=False)
        return calibrate(model.eval(), settings, places)
    model = restored(build(settings, places), trained).eval()
    if variant in ALIGNMENTS:
        align = align_statistics if variant == ALIGNMENTS[0] else align_classes
        source = read_training(places.packed, SOURCES[settings.source].train, settings.size).some(SOURCE_IMAGES)
        return align(model, source)
    return model


def calibrate(model: nn.Sequential, settings: Settings, places: Places) -> nn.Sequential:
    """Fills the statistics of the calibration from whole images of the source, in the lights and colours of training."""
    source = read_training(places.packed, SOURCES[settings.source].train, settings.size).some(OBSERVED)
    images = photographed_anew(source, settings.seed)
    with get_calibration(model).observing():
        for first in range(0, len(images.images), settings.batch_size):
            batch = torch.from_numpy(images.images[first : first + settings.batch_size])
            model(normalise(batch.to(places.device)))
    return model


def photographed_anew(scenes: Scenes, seed: int) -> Scenes:
    """The same scenes with brightness, contrast and colour changed as in training."""
    images = scenes.images.copy()
    for index, image in enumerate(images):
        images[index] = jitter(Image.fromarray(image), random.Random(f"{seed} observed {index}"))
    return Scenes(images, scenes.labels)


def score_variant(variant: str, settings: Settings, trained: Trained, places: Places) -> dict[str, Any]:
    """What belongs into the file of results."""
    model = model_of(variant, settings, trained, places)
    source = SOURCES[settings.source]
    before = control(variant, places.packed, source.train, settings.size[0]) if variant in CONTROLS else None
    scores = {
        name: score(model, read(places.packed, target, settings.size[0]), before)
        for name, target in targets(source, settings.split).items()
    }
    calibration = getattr(model[0].backbone, "calibration", None)

    def mean(name: str) -> float:
        return round(sum(getattr(found, name) for found in scores.values()) / len(scores), 5)

    return {
        "settings": asdict(settings),
        "variant": variant,
        "calibration": None if calibration is None else calibration.config.to_dict(),
        **trained.cost,
        "seconds_per_image": mean("seconds"),
        "control_seconds_per_image": mean("control_seconds"),
        "miou": {name: round(sum(found.iou.values()) / len(found.iou), 3) for name, found in scores.items()},
        "boundary": {name: round(found.boundary, 3) for name, found in scores.items()},
        "scatter": {name: round(found.scatter, 4) for name, found in scores.items()},
        "iou": {name: {key: round(value, 2) for key, value in found.iou.items()} for name, found in scores.items()},
    }
