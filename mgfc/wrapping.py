"""Attaching calibrators to a backbone, detaching them, and finding them in a host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from mgfc.backbones.detection import Tower, find_tower
from mgfc.calibration import Calibration
from mgfc.config import AdapterConfig
from mgfc.distributed import gathered
from mgfc.errors import CalibrationError, ConfigError, UnsupportedBackboneError
from mgfc.storage.loading import make_adapter

if TYPE_CHECKING:
    from peft import PeftConfig

M = TypeVar("M", bound=nn.Module)


def wrap_backbone(
    backbone: M,
    adapter: AdapterConfig | str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    freeze: bool = True,
    blocks: str | Sequence[str] | None = None,
    peft_config: PeftConfig | None = None,
) -> M:
    """Attaches calibrators to a vision transformer, in place, and returns the same object.

    The backbone's type, attributes, parameter names, forward signature and outputs stay as they are; it gains one child,
    `backbone.calibration`. Fresh calibrators change no output. In a composite or host model the vision tower gets the
    child, and `get_calibration(model)` finds it. New parameters take the backbone's device; they are float32 unless
    the backbone is of a wider type, as adapters to half-precision weights usually are.

    Args:
        backbone: a timm or Transformers vision transformer, or a model that contains one.
        adapter: a configuration for fresh calibrators (None: the default one), or a directory or Hub repository of
            saved ones.
        revision: branch, tag or commit of the Hub repository.
        token: Hub access token; True for the stored one.
        cache_dir: where Hub files are cached.
        local_files_only: never use the network.
        freeze: freeze the backbone's parameters (not those of a PEFT adapter in it) and its BatchNorm statistics.
        blocks: a regular expression or names of the blocks, for what detection cannot find.
        peft_config: of an adapter of the `peft` library to train beside the calibrators, e.g. a `peft.LoraConfig`;
            it is saved and loaded with them.

    Returns:
        `backbone`.

    Raises:
        UnsupportedBackboneError: if it holds no vision transformer that can be calibrated, or is wrapped already.
        ConfigError: if the configuration does not fit the backbone, or PEFT refuses its own.
        AdapterNotFoundError: if the adapter cannot be reached.
        AdapterFileError: if its files are damaged.
        AdapterMismatchError: if it was made for another backbone.

    Whatever is raised, the backbone is as it was.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
        >>> wrap_backbone(vit, MGFCConfig(rank=16)) is vit
        True
    """
    if not isinstance(backbone, nn.Module):
        raise UnsupportedBackboneError(f"Expected a torch.nn.Module, found {type(backbone).__name__}.")
    hub_options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    with gathered(backbone):
        tower = find_tower(backbone, blocks)
        _reject_wrapped(backbone, tower)
        built, tuner = make_adapter(tower, adapter, **hub_options)
        if peft_config is not None:
            if tuner is not None:
                raise ConfigError(f"peft_config: {adapter} has an adapter of PEFT's of its own. Leave peft_config out.")
            tuner = peft_config, None
        if tuner is not None and any(parameter.is_meta for parameter in tower.root.parameters()):
            raise UnsupportedBackboneError(
                "peft_config: an adapter of PEFT's needs a backbone whose weights have values, found them on the meta device, "
                "on which Transformers' from_pretrained builds models and accelerate leaves offloaded ones. Wrap afterwards."
            )
        Calibration(tower, built).attach(tower, tuner, freeze=freeze)
    return backbone


def attach_adapter(model: nn.Module, name: str, config: AdapterConfig, blocks: str | None = None) -> None:
    """As `wrap_backbone`, under another name than "default", or beside the adapters that a wrapped model has.

    Raises:
        UnsupportedBackboneError, ConfigError: as `wrap_backbone` and `Calibration.add_adapter`.
    """
    if any(isinstance(module, Calibration) for module in model.modules()):
        get_calibration(model).add_adapter(name, config)
        return
    tower = find_tower(model, blocks)
    _reject_wrapped(model, tower)
    adapter, _ = make_adapter(tower, config)
    Calibration(tower, adapter, name).attach(tower)


def unwrap_backbone(backbone: M) -> M:
    """Removes the calibrators and hooks, and gives back the `requires_grad` flags as they were before.

    A backbone that `peft` adapted meanwhile stays frozen.

    Args:
        backbone: what `wrap_backbone` was given, or a host of it.

    Returns:
        `backbone`.

    Raises:
        CalibrationError: if there is no calibration in it.
    """
    get_calibration(backbone).detach()
    return backbone


def get_calibration(model: nn.Module) -> Calibration:
    """Finds the calibration anywhere in a host model.

    Raises:
        CalibrationError: if there is none, or more than one.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Calibration)}
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise CalibrationError(
            f"{type(model).__name__}: expected one calibration, found {names}. "
            "Wrap the backbone with wrap_backbone first, or ask for the part of the model that you mean."
        )
    return next(iter(found.values()))


def _reject_wrapped(model: nn.Module, tower: Tower) -> None:
    if any(isinstance(module, Calibration) for module in model.modules()):
        raise UnsupportedBackboneError(
            f"{type(model).__name__} is wrapped already. Call unwrap_backbone first to attach other calibrators."
        )
    if hasattr(tower.root, "calibration"):
        raise UnsupportedBackboneError(
            f"{type(tower.root).__name__} has an attribute `calibration` of its own, where the calibrators would go."
        )
