"""What calibration does to images, measured: three forwards of each one, and what the stages made in the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.adapter import Adapter
from mgfc.backbones.modes import evaluating
from mgfc.calibration import Calibration
from mgfc.calibrators import CalibLayer, CoarseCalib, FineCalib, MediumCalib
from mgfc.calibrators.statistics import SourceCalib
from mgfc.errors import CalibrationError
from mgfc.features import FeatureMaps
from mgfc.viz.pictures import Shades
from mgfc.viz.records import CoarseRecord, FineRecord, MediumRecord, Record
from mgfc.wrapping import get_calibration

Predict = Callable[[Tensor], Tensor]
Seen = dict[nn.Module, tuple[Tensor, Tensor]]


def record(
    model: nn.Module,
    images: Tensor,
    predict: Predict | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[Record]:
    """Measures what calibration does to images, in eval mode and without gradients. The model stays as it is.

    Args:
        model: a wrapped backbone, or a host of one; not compiled, and no other thread may use it meanwhile.
        images: (B, C, H, W) as the backbone is given them, of any number of channels.
        predict: what makes logits (1, K, h, w) of an image (1, C, H, W) by calling the model, or None. Put parts of it that
            are not in `model` into eval mode yourself.
        mean: of each channel, that the images were normalised by, so that they can be shown as they were. Default:
            ImageNet's for three channels; others are shown in shades from the image's least to its greatest value.
        std: of each channel, likewise.

    Returns:
        One record for each image.

    Raises:
        CalibrationError: if the calibrators are disabled, fused or observing, `images` or what `predict` returns has
            another shape, or the patches of a block have no grid.

    Examples:
        >>> import timm, torch
        >>> from mgfc import viz, wrap_backbone
        >>> vit = wrap_backbone(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True))
        >>> [found] = viz.record(vit, torch.randn(1, 3, 64, 96))
        >>> found.features[0].shape
        torch.Size([4, 6, 192])
    """
    calibration = get_calibration(model)
    if images.ndim != 4 or len(images) == 0 or not images.isfinite().all():
        raise CalibrationError(f"record: expected finite images (B, C, H, W), found {tuple(images.shape)}.")
    if not calibration.enabled or calibration.active.fused:
        state = "fused into the weights; call unfuse() first" if calibration.enabled else "disabled"
        raise CalibrationError(f"record: expected calibrators that are in use, found them {state}.")
    if calibration.adapter.is_observing:
        raise CalibrationError("record: expected calibrators that are in use, found them observing. Call it after observing().")
    names = calibration.block_names
    maps = FeatureMaps(calibration.backbone, range(len(names)), blocks=names)
    try:
        with evaluating(model), torch.no_grad():
            return [_measure(calibration, maps, predict, image, Shades(image, mean, std)) for image in torch.split(images, 1)]
    finally:
        maps.remove()


def _measure(calibration: Calibration, maps: FeatureMaps, predict: Predict | None, image: Tensor, shades: Shades) -> Record:
    adapter = calibration.adapter
    calibrates = any(isinstance(module, SourceCalib) for module in adapter.modules())

    def baseline() -> AbstractContextManager[None]:
        return _learnt_alone(adapter) if calibrates else calibration.disabled()

    with calibration.disabled():
        bare = maps(image)
    with baseline():
        before = maps(image)
    with _listening(adapter) as seen:
        after = maps(image)
    stages = _stages(calibration, seen, after, shades)  # before `predict`, which may show the model other images
    prediction, num_classes = None, 0
    if predict is not None:
        with baseline():
            logits = _logits(predict, image)
        prediction, num_classes = (_classes(logits, image), _classes(_logits(predict, image), image)), logits.shape[1]
    return Record(
        picture=shades(image),
        baseline="without calibration" if calibrates else "bare backbone",
        blocks=tuple(calibration.block_names),
        learnt=_changes(bare, before if calibrates else after) if adapter.num_parameters else None,
        calibrated=_changes(before, after) if calibrates else None,
        features=(_channels_last(before[-1]), _channels_last(after[-1])),
        prediction=prediction,
        num_classes=num_classes,
        **stages,
    )


@contextmanager
def _learnt_alone(adapter: Adapter) -> Iterator[None]:
    """Within it, no image and no category is moved towards the source."""
    stages = [module for module in adapter.modules() if isinstance(module, SourceCalib)]
    strengths = [stage.strength for stage in stages]
    for stage in stages:
        stage.strength = 0.0
    try:
        yield
    finally:
        for stage, strength in zip(stages, strengths, strict=True):
            stage.strength = strength


@contextmanager
def _listening(adapter: Adapter) -> Iterator[Seen]:
    """Within it, gathers what each stage of an adapter was given and what it made of that."""
    seen: Seen = {}

    def keep(stage: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[stage] = args[0], output

    stages = [module for module in adapter.modules() if isinstance(module, (SourceCalib, FineCalib))]
    handles = [stage.register_forward_hook(keep) for stage in stages]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _stages(calibration: Calibration, seen: Seen, maps: Sequence[Tensor], shades: Shades) -> dict[str, Any]:
    """The fields of a record that tell of the stages."""
    adapter = calibration.adapter
    found: dict[str, Any] = {"distance": None, "coarse": None, "medium": {}, "fine": {}}
    if adapter.coarse in seen and adapter.coarse is not None and adapter.coarse.source.ready:
        found["distance"] = calibration.distance().item()
        found["coarse"] = _coarse(adapter.coarse, *seen[adapter.coarse], shades)
    for key, layer in adapter.layers.items():
        name, grid = calibration.block_names[int(key)], (maps[int(key)].shape[2], maps[int(key)].shape[3])
        if isinstance(layer, CalibLayer):
            if layer.medium in seen and layer.medium is not None and layer.medium.source.ready:
                found["medium"][name] = _medium(layer.medium, *seen[layer.medium], grid)
            if layer.fine in seen and layer.fine is not None:
                found["fine"][name] = _fine(layer.fine, *seen[layer.fine], grid)
    return found


def _coarse(stage: CoarseCalib, images: Tensor, calibrated: Tensor, shades: Shades) -> CoarseRecord:
    before, after = (stage.deviations(stage.statistics(item))[0].cpu() for item in (images, calibrated))
    return CoarseRecord(shades(calibrated), before, after)


def _medium(stage: MediumCalib, tokens: Tensor, calibrated: Tensor, grid: tuple[int, int]) -> MediumRecord:
    assignment = stage.assign(tokens)
    before, after = (stage.deviations(item, assignment)[0].float().cpu() for item in (tokens, calibrated))
    return MediumRecord(_placed(assignment, grid), before, after, _placed(_moved(tokens, calibrated), grid))


def _fine(stage: FineCalib, tokens: Tensor, refined: Tensor, grid: tuple[int, int]) -> FineRecord:
    inside: dict[str, Tensor] = {}
    stage(tokens, grid, inside)
    return FineRecord(_placed(inside["share"].sigmoid(), grid), _placed(_moved(tokens, refined), grid))


def _placed(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of one image's patches, in their places: (1, h*w, ...) -> (h, w, ...)."""
    return values[0].view(*grid, *values.shape[2:]).float().cpu()


def _moved(tokens: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """How far vectors are apart, in lengths of the first."""
    tokens, other = tokens.float(), other.float()
    lengths = torch.linalg.vector_norm(tokens, dim=dim).clamp_min(1e-12)
    moved: Tensor = torch.linalg.vector_norm(other - tokens, dim=dim) / lengths
    return moved


def _changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, ...]:
    """The mean of `_moved` over the patches that leave each block."""
    return tuple(_moved(a, b, dim=1).mean().item() for a, b in zip(before, after, strict=True))


def _channels_last(features: Tensor) -> Tensor:
    return features[0].permute(1, 2, 0).float().cpu()


def _logits(predict: Predict, image: Tensor) -> Tensor:
    logits = predict(image)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CalibrationError(f"record: expected `predict` to return logits (1, K, h, w), found {found}.")
    return logits


def _classes(logits: Tensor, image: Tensor) -> Tensor:
    """The class of each pixel: (1, K, h, w) -> (H, W)."""
    resized: Tensor = F.interpolate(logits.float(), size=image.shape[2:], mode="bilinear", align_corners=False)
    return resized[0].argmax(dim=0).cpu()
