"""A model by its name: one of timm's, or a directory or Hub repository of Transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError
from torch import nn

from mgfc.errors import AdapterNotFoundError, CalibrationError, MGFCError, UnsupportedBackboneError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Named(NamedTuple):
    """A model, and the images that it is made for.

    Args:
        model: the model.
        size: (height, width) in pixels.
        channels: of an image.
        mean: of each channel, that images are normalised by.
        std: of each channel.
    """

    model: nn.Module
    size: tuple[int, int]
    channels: int
    mean: Sequence[float]
    std: Sequence[float]


def build(name: str, *, pretrained: bool = False) -> Named:
    """Builds a model.

    Args:
        name: a timm model, with or without `timm/` before it; else a directory or Hub repository of a Transformers model.
        pretrained: with its weights, and for images of any size where timm offers that; else random ones, which
            downloads a configuration at most.

    Raises:
        AdapterNotFoundError: if there is no such model, or its weights cannot be reached.
        UnsupportedBackboneError: if Transformers is not installed, or cannot build it. Code that comes with a model is
            never run.
    """
    import timm

    in_timm = name.removeprefix("timm/")
    if timm.is_model(in_timm.partition(".")[0]) and not Path(name).exists():
        return _of_timm(in_timm, pretrained)
    return _of_transformers(name, pretrained)


def _of_timm(name: str, pretrained: bool) -> Named:
    import timm

    try:
        try:
            options: dict[str, Any] = {"dynamic_img_size": True} if pretrained else {}
            model: Any = timm.create_model(name, pretrained=pretrained, **options)
        except TypeError:  # a class without that option
            model = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _no_weights(name, error) from None
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    return Named(model, (height, width), channels, *_normalisation(cfg.get("mean"), cfg.get("std"), channels))


def _of_transformers(name: str, pretrained: bool) -> Named:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise UnsupportedBackboneError(
            f"{name}: expected the name of a timm model; for Transformers models, pip install transformers."
        ) from None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a stranger's configuration makes Transformers raise errors of any kind
        raise AdapterNotFoundError(
            f"{name}: expected the name of a timm model, or a directory or Hub repository of a Transformers model, found "
            f"neither ({_reason(error)})."
        ) from None
    try:
        if pretrained:
            model: Any = AutoModel.from_pretrained(name, dtype="float32", trust_remote_code=False)
        else:
            model = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise _no_weights(name, error) from None
    except Exception as error:  # as above
        raise UnsupportedBackboneError(
            f"{name}: expected a model that Transformers can build, found that it cannot ({_reason(error)})."
        ) from None
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    channels = getattr(vision, "num_channels", None) or 3
    mean, std = _processor(name) if pretrained else (None, None)
    return Named(model, (size, size) if isinstance(size, int) else tuple(size), channels, *_normalisation(mean, std, channels))


def _processor(name: str) -> tuple[object, object]:
    """Mean and standard deviation of the image processor that was saved with a model, if there is one."""
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception:  # there is none, or none that can be read
        return None, None
    return getattr(processor, "image_mean", None), getattr(processor, "image_std", None)


def _normalisation(mean: object, std: object, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """As given; ImageNet's where nothing fits, whose mean over the channels serves for other numbers of them."""
    if _are_numbers(mean, channels) and _are_numbers(std, channels) and min(std) > 0:
        return mean, std
    if channels == 3:
        return IMAGENET
    return tuple((sum(values) / 3,) * channels for values in IMAGENET)  # type: ignore[return-value]


def _are_numbers(values: object, count: int) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(values, (list, tuple)) and len(values) == count and all(isinstance(value, (int, float)) for value in values)
    )


def _reason(error: Exception) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _no_weights(name: str, error: Exception) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"{name}: expected the weights of this model, found that they cannot be read ({_reason(error)}). Name a directory that "
        "holds the model, or connect to the Hub."
    )


@contextmanager
def told_of_size(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Within it, what a model raises over an image of a size is raised as an error in our words.

    Raises:
        CalibrationError: instead of the model's own error.
    """
    try:
        yield
    except (AssertionError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, MGFCError):
            raise
        raise CalibrationError(
            f"{name}: expected a forward of an image of {size[0]} x {size[1]} pixels, found that it fails ({error}). "
            "Choose another size with --size."
        ) from None
