"""Adapters of the `peft` library (LoRA and others) on the same backbone: put in, taken out, kept beside the calibrators."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from mgfc.backbones.tuners import tuner_layers
from mgfc.errors import AdapterFileError, AdapterMismatchError, ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

# A configuration, and saved parameters; None for fresh ones.
Tuner: TypeAlias = "tuple[PeftConfig, dict[str, Tensor] | None]"
# PEFT's own names of files; its adapter has this name in the backbone.
_PREFIX = "base_model.model."
CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "default"


def guard() -> nn.Module | None:
    """A module that keeps PEFT from freezing the calibrators beside it; None while PEFT is not imported.

    The first adapter that PEFT puts into a model freezes all parameters of the model; later ones leave the flags of what is
    there as they are. PEFT tells the two apart by looking for its own layers, so this is one that adapts nothing. (Flags of
    parameters whose names hold the name of PEFT's adapter between dots are not kept, which is why the calibrators of an
    adapter "default" are named `calibration.adapter_default`, not `calibration.default`.)
    """
    return _make_guard() if "peft" in sys.modules else None


def _make_guard() -> nn.Module:
    return _guard_class()()


@functools.cache
def _guard_class() -> type[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    class PeftGuard(nn.Module, BaseTunerLayer):
        weight = bias = None  # type: ignore[assignment]  # of the layer that a tuner layer wraps; here there is none

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Nothing to merge."""

        def unmerge(self) -> None:
            """Nothing to take back."""

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return _make_guard, ()

    return PeftGuard


def froze(parameters: Iterable[nn.Parameter], backbone: nn.Module) -> bool:
    """Whether an adapter of PEFT's, put into a backbone after the calibrators, froze these parameters."""
    flags = [p.requires_grad for p in parameters]
    return bool(flags) and not any(flags) and next(tuner_layers(backbone), None) is not None


def inject(backbone: nn.Module, config: PeftConfig, state: dict[str, Tensor] | None = None) -> None:
    """Puts an adapter of PEFT's into a backbone, in place. The `requires_grad` flags of its own parameters stay.

    Args:
        backbone: without adapters of PEFT's.
        config: of the adapter, e.g. a `peft.LoraConfig` with `target_modules`.
        state: saved parameters, as PEFT's files have them; None for fresh ones.

    Raises:
        ConfigError: if PEFT refuses the configuration; the backbone is as it was.
        AdapterMismatchError: if the saved parameters do not fit; the backbone is as it was.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    if not isinstance(config, PeftConfig):
        raise ConfigError(
            f"peft_config: expected a configuration of PEFT's, such as LoraConfig, found {type(config).__name__}."
        )
    if next(tuner_layers(backbone), None) is not None:
        raise ConfigError(
            f"peft_config: expected a backbone without adapters of PEFT's, found some in this {type(backbone).__name__}. "
            "Leave peft_config out to keep them, or load the backbone anew."
        )
    flags = [(p, p.requires_grad) for p in backbone.parameters()]
    try:
        inject_adapter_in_model(copy.deepcopy(config), backbone, NAME)  # PEFT writes into what it is given
        if state is not None:
            state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
            outcome: Any = set_peft_model_state_dict(backbone, state, NAME)
            missing = [key for key in outcome.missing_keys if f".{NAME}." in key]
            if outcome.unexpected_keys or missing:
                raise AdapterMismatchError(
                    f"{WEIGHTS}: expected the parameters of the adapter that {CONFIG} describes, found "
                    f"{len(missing)} missing and {len(outcome.unexpected_keys)} unknown ones."
                )
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        eject(backbone)
        _restore(flags)
        if isinstance(error, AdapterMismatchError):
            raise
        kind = ConfigError if state is None else AdapterMismatchError
        raise kind(f"peft_config: PEFT refused it for this {type(backbone).__name__}: {error}") from error
    _restore(flags)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def eject(backbone: nn.Module) -> None:
    """Removes PEFT's adapters, leaving what they wrap."""
    for name, _, wrapped in list(tuner_layers(backbone)):
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, wrapped)
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config


NO_FILES: Mapping[str, None] = {CONFIG: None, WEIGHTS: None}


def files(backbone: nn.Module) -> dict[str, bytes | dict[str, Tensor]]:
    """What PEFT would write of its adapter, by file name: the configuration, and the parameters."""
    from peft import get_peft_model_state_dict

    config: Any = backbone.peft_config[NAME]  # type: ignore[index]
    values = config.to_dict() | {"inference_mode": True}
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    state = get_peft_model_state_dict(backbone, adapter_name=NAME)
    # LoRA's bias="all" would take the calibrators' along.
    state = {_PREFIX + key: value for key, value in state.items() if not key.startswith("calibration.")}
    return {CONFIG: (json.dumps(values, indent=2) + "\n").encode(), WEIGHTS: state}


def read_config(path: Path) -> PeftConfig:
    """Reads PEFT's configuration of an adapter.

    Raises:
        AdapterFileError: if it is damaged.
    """
    from peft import PeftConfig

    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(path.parent))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterFileError(f"{path}: expected a configuration of PEFT's, found a damaged file ({error}).") from None
    config.inference_mode = False  # saved as True by PEFT's habit, which would freeze it
    return config
