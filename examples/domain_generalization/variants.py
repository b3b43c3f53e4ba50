"""What is scored of one trained model, without training again."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import streets
from PIL import Image
from torch import nn

from domain_generalization.alignment import aligned_classes, aligned_statistics, batches
from domain_generalization.domains import SOURCES, targets
from domain_generalization.inputs import CONTROLS, control
from domain_generalization.scenes import Scenes, read, read_training
from domain_generalization.scoring import score
from domain_generalization.training import Places, Settings, Trained, build, restored
from mgfc import get_calibration

AS_TRAINED = "as trained"
ALIGNMENTS = ("feature statistics aligned", "classes aligned")
AFTERWARDS = "calibrated after training"
# mgfc's ablations that evaluation decides: what is changed in its configuration.
WITHOUT: dict[str, dict[str, Any]] = {
    "without coarse": {"coarse": None},
    "without medium": {"medium": None},
    "without coarse and medium": {"coarse": None, "medium": None},
}
# Images of the source that statistics are from.
ALIGNED = 50
OBSERVED = 240


def variants(method: str) -> tuple[str, ...]:
    """All that is scored of a method."""
    ours = tuple(WITHOUT) if method.startswith("mgfc") else ()
    return (AS_TRAINED, *CONTROLS, *ALIGNMENTS, AFTERWARDS, *ours)


def plain_model(settings: Settings, trained: Trained, places: Places) -> nn.Sequential:
    """The model as it was trained, ready to be scored."""
    return restored(build(settings, places), trained).eval()


@contextmanager
def model_of(
    variant: str, plain: nn.Sequential, settings: Settings, trained: Trained, places: Places
) -> Iterator[nn.Sequential]:
    """The model of a variant: the plain one, which is as it was afterwards, or one that is built anew."""
    source = partial(read_training, places.packed, SOURCES[settings.source].train, settings.size)
    match variant:
        case "feature statistics aligned":
            with aligned_statistics(plain, source().some(ALIGNED)) as model:
                yield model
        case "classes aligned":
            yield aligned_classes(plain, source().some(ALIGNED))
        case "calibrated after training":
            yield calibrated(settings, trained, places, source().some(OBSERVED))
        case _ if variant in WITHOUT:
            changed = replace(settings, options=settings.options | WITHOUT[variant])
            yield calibrated(changed, trained, places, source().some(OBSERVED))
        case _:
            yield plain


def calibrated(settings: Settings, trained: Trained, places: Places, source: Scenes) -> nn.Sequential:
    """The model as it was trained, with statistics of mgfc's calibration that were gathered afterwards."""
    model = restored(build(settings, places, calibrated=True), trained, statistics=False).eval()
    calibrate(model, photographed_anew(source, settings.seed))
    return model


def calibrate(model: nn.Sequential, source: Scenes) -> None:
    """Fills the statistics of the model's calibration from whole images of the source."""
    device = next(model.parameters()).device
    with get_calibration(model).observing():
        for images, _ in batches(source, device):
            model(images)


def photographed_anew(scenes: Scenes, seed: int) -> Scenes:
    """The same scenes with brightness, contrast and colour changed as in training."""
    images = scenes.images.copy()
    for index, image in enumerate(images):
        images[index] = np.asarray(streets.photographed_anew(Image.fromarray(image), seed, index))
    return Scenes(images, scenes.labels)


def score_variant(variant: str, plain: nn.Sequential, settings: Settings, trained: Trained, places: Places) -> dict[str, Any]:
    """What belongs into the file of results."""
    source, height = SOURCES[settings.source], settings.size[0]
    before = control(variant, places.packed, source.train, height) if variant in CONTROLS else None
    with model_of(variant, plain, settings, trained, places) as model:
        scores = {
            name: score(model, read(places.packed, target, height), before)
            for name, target in targets(source, settings.split).items()
        }
    calibration = getattr(model[0].backbone, "calibration", None)

    def mean(name: str) -> float:
        return round(statistics.fmean(getattr(found, name) for found in scores.values()), 5)

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
