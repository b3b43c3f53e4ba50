"""Adapters of the `peft` library (LoRA and others) on the same backbone: put in, taken out."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from mgfc.backbones.tuners import tuner_layers
from mgfc.errors import AdapterMismatchError, ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

# A configuration, and saved parameters; None for fresh ones.
Tuner: TypeAlias = "tuple[PeftConfig, dict[str, Tensor] | None]"
# PEFT's own names of files; its adapter has this name in the backbone.
PREFIX = "base_model.model."
CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "default"
_WEIGHTS_BEFORE = "_weights_before_mgfc"


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


def _guard_where_peft_is() -> nn.Module:
    """As a file of a model needs it, which may be read where PEFT is not installed."""
    return _make_guard() if importlib.util.find_spec("peft") else nn.Module()


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
            return _guard_where_peft_is, ()

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
    from peft import PeftConfig

    if not isinstance(config, PeftConfig):
        raise ConfigError(
            f"peft_config: expected a configuration of PEFT's, such as LoraConfig, found {type(config).__name__}."
        )
    if next(tuner_layers(backbone), None) is not None:
        raise ConfigError(
            f"peft_config: expected a backbone without adapters of PEFT's, found some in this {type(backbone).__name__}. "
            "Leave peft_config out to keep them, or load the backbone anew."
        )
    kind = ConfigError if state is None else AdapterMismatchError
    state = None if state is None else {key.removeprefix(PREFIX): value for key, value in state.items()}
    before = _Before(backbone)
    try:
        if state is not None:
            _rehearse(backbone, config, state)
        _inject(backbone, config, state, before)
    except Exception as error:  # PEFT raises whatever its parts raise
        before.restore(backbone)
        if isinstance(error, AdapterMismatchError):
            raise
        raise kind(
            f"peft_config: PEFT refused it for this {type(backbone).__name__}: {type(error).__name__}: {error}"
        ) from error
    before.restore_flags()


def _inject(backbone: nn.Module, config: PeftConfig, state: Mapping[str, Tensor] | None, before: _Before | None = None) -> None:
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if before is not None and _changes_weights(config):
        before.keep_weights(backbone)
    with torch.random.fork_rng(enabled=_changes_weights(config)):
        if _changes_weights(config):
            torch.manual_seed(0)  # what is left of the weights has to be the same when it is loaded
        inject_adapter_in_model(copy.deepcopy(config), backbone, NAME)  # PEFT writes into what it is given
    if before is not None:
        before.hand_over(backbone)
    if state is None:
        return
    expected = {key: value.shape for key, value in state_of(backbone).items()}
    found = {key: value.shape for key, value in state.items()}
    differing = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    if expected.keys() != found.keys() or differing:
        raise AdapterMismatchError(
            f"{WEIGHTS}: expected the parameters of the adapter that {CONFIG} describes, found "
            f"{len(expected.keys() - found.keys())} missing and {len(found.keys() - expected.keys())} unknown ones, and "
            f"{len(differing)} of another shape."
        )
    if before is not None:
        set_peft_model_state_dict(backbone, dict(state), NAME)


def state_of(backbone: nn.Module) -> dict[str, Tensor]:
    """The parameters of PEFT's adapter, under the names of its files."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(backbone, adapter_name=NAME)
    # LoRA's bias="all" would take the calibrators' along.
    return {key: value for key, value in state.items() if not key.startswith("calibration.")}


def _rehearse(backbone: nn.Module, config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """Injects into a copy without values, which takes no memory: what fails there never reaches the backbone."""
    try:
        skeleton = _without_values(backbone)
        with torch.device("meta"):
            _inject(skeleton, _drawn_without_values(config), state)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        # A method that looks at values: it is tried on the backbone, if its size is sensible.
        widest = max(size for parameter in backbone.parameters() for size in parameter.shape)
        if not 0 < getattr(config, "r", 1) <= widest:
            raise


def _without_values(backbone: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in backbone.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(backbone, memo)


def _drawn_without_values(config: PeftConfig) -> PeftConfig:
    """The same adapter without an initialisation that reads the backbone's weights."""
    drawn: Any = copy.deepcopy(config)
    if _changes_weights(config):
        drawn.init_lora_weights = True
    return cast("PeftConfig", drawn)


def _changes_weights(config: PeftConfig) -> bool:
    """Whether PEFT starts this adapter from the backbone's weights and leaves the rest of them there, as PiSSA does."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start != "gaussian"


class _Before:
    """A backbone as it was before PEFT's adapter: modules, flags, modes, and weights where the adapter changes them."""

    def __init__(self, backbone: nn.Module) -> None:
        self._modules = [(module, dict(module._modules), module.training) for module in backbone.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
        self._had_config = hasattr(backbone, "peft_config")
        self._weights: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def keep_weights(self, backbone: nn.Module) -> None:
        self._weights = {id(p): (p, p.detach().clone()) for p in backbone.parameters()}

    def hand_over(self, backbone: nn.Module) -> None:
        """Leaves the weights that changed with the layers around them, for `eject`; forgets the others."""
        kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for _, layer, wrapped in tuner_layers(backbone):
            for name, parameter in wrapped.named_parameters():
                value = self._weights.get(id(parameter), (parameter, parameter))[1]
                if value is not parameter and not torch.equal(value, parameter):
                    layer.__dict__.setdefault(_WEIGHTS_BEFORE, {})[name] = value
                    kept[id(parameter)] = parameter, value
        self._weights = kept

    def restore_flags(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def restore(self, backbone: nn.Module) -> None:
        for module, children, mode in self._modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = mode
        for parameter, value in self._weights.values():
            parameter.data = value
        self.restore_flags()
        if not self._had_config and hasattr(backbone, "peft_config"):
            del backbone.peft_config


def eject(backbone: nn.Module) -> None:
    """Removes PEFT's adapters, leaving what they wrap, with the weights that it had before them."""
    for name, layer, wrapped in list(tuner_layers(backbone)):
        parent, _, child = name.rpartition(".")
        with torch.no_grad():
            for key, value in layer.__dict__.get(_WEIGHTS_BEFORE, {}).items():
                wrapped.get_parameter(key).copy_(value)
        setattr(backbone.get_submodule(parent), child, wrapped)
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
