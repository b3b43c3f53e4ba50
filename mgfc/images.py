"""What happens to images on their way into a backbone: one hook, before its patch embedding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgfc.active import Active
from mgfc.backbones.detection import Tower
from mgfc.backbones.grid import first_tensor
from mgfc.backbones.stem import image_entry
from mgfc.calibrators import CoarseCalib
from mgfc.calibrators.coarse import image_area
from mgfc.errors import CalibrationError


class _Forward(threading.local):
    """What belongs to the forwards of one thread.

    Attributes:
        scene: statistics of the whole images that this thread's images are parts of; None for the images' own.
        statistics: of the images of the last forward in evaluation, (B, 2, C).
    """

    def __init__(self) -> None:
        self.scene: Tensor | None = None
        self.statistics: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Forward], tuple[()]]:
        return _Forward, ()


class ImageHook:
    """The hook before the patch embedding, which runs the coarse stage of the active adapter.

    Args:
        active: what to run, shared with the hooks of the blocks.

    Attributes:
        called: whether images reached it since it was set to False.
    """

    def __init__(self, active: Active) -> None:
        self.active = active
        self.called = False
        self._forward = _Forward()

    @property
    def coarse(self) -> CoarseCalib | None:
        """The coarse stage of the active adapter."""
        return self.active.adapter.coarse if self.active.enabled else None

    def attach(self, tower: Tower) -> None:
        """Registers the hook in a backbone, where images enter it."""
        entry = image_entry(tower)
        if entry is not None:
            entry.register_forward_pre_hook(self._enter, with_kwargs=True)

    @contextmanager
    def scene(self, images: Tensor) -> Iterator[None]:
        """Within it, images are calibrated by the statistics of these, as `Calibration.scene` says."""
        before, coarse = self._forward.scene, self.coarse
        if coarse is not None:
            _require_images(images, coarse.source.total.shape[-1])
        self._forward.scene = None if coarse is None else coarse.statistics(images)
        try:
            yield
        finally:
            self._forward.scene = before

    def distance(self) -> Tensor:
        """How far the images of the last forward lay from the source, as `Calibration.distance` says."""
        if self.coarse is None or self._forward.statistics is None:
            raise CalibrationError(
                "distance: expected a forward in evaluation with a coarse stage before, found none in this thread. "
                "Call the model in eval mode first, not compiled."
            )
        return self.coarse.distance(self._forward.statistics)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the patch embedding."""
        coarse, images = self.active.of(module).coarse if self.active.enabled else None, first_tensor(args, kwargs)
        self._forward.statistics = None
        if coarse is None or images is None or images.ndim != 4:
            return None
        self.called = True
        calibrated = coarse(images) if coarse.is_gathering else self._calibrate(coarse, images)
        if calibrated is images:
            return None
        new_args = tuple(calibrated if value is images else value for value in args)
        return new_args, {key: calibrated if value is images else value for key, value in kwargs.items()}

    def _calibrate(self, coarse: CoarseCalib, images: Tensor) -> Tensor:
        """By the statistics of the scenes that the images are, or are parts of."""
        area, scene = image_area(images), self._forward.scene
        found = coarse.statistics(images, area) if scene is None else scene
        if len(found) not in (1, len(images)):
            raise CalibrationError(
                f"scene: expected one image, or one for each of the {len(images)} images of a forward, found {len(found)}."
            )
        if not torch.compiler.is_compiling():
            self._forward.statistics = found.detach()
        calibrated: Tensor = coarse(images, found, area)
        return calibrated


def _require_images(images: Tensor, channels: int) -> None:
    shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
        raise CalibrationError(
            f"scene: expected images (B, {channels}, H, W), found {shape}. Give whole images as the backbone gets them."
        )
