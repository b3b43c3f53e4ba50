"""mgfc as a method of the `peft` library. Importing this module makes PEFT know it.

    from mgfc.interop.peft_method import MGFCPeftConfig
    model = peft.get_peft_model(vit, MGFCPeftConfig())

Calibrators stay hooks on the blocks, as everywhere in mgfc, so the captured feature maps of Transformers are refined, too.
A method of PEFT's own kind would wrap the blocks, and these feature maps would silently lose what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn

from mgfc.adapter import Adapter
from mgfc.calibration import Calibration
from mgfc.config import MGFCConfig
from mgfc.errors import CalibrationError
from mgfc.wrapping import attach_adapter, get_calibration, unwrap_backbone

METHOD = "MGFC"


@dataclass
class MGFCPeftConfig(peft.PeftConfig):
    """Calibrators as an adapter of PEFT's, for `get_peft_model`.

    Args:
        calibration: the dict form of an `MGFCConfig`; None for the default one.
        blocks: as in `wrap_backbone`.
        modules_to_save: names of modules beside the adapter to train and save, such as a head.

    Raises:
        ConfigError: if `calibration` is not the dict form of an `MGFCConfig`.
    """

    calibration: dict[str, Any] | None = field(default=None, metadata={"help": "The dict form of an MGFCConfig."})
    blocks: str | None = field(default=None, metadata={"help": "Names of the blocks, where detection fails."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save beside it."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = METHOD
        self.calibration = MGFCConfig.from_dict(self.calibration or {}).to_dict()


class MGFCTuner(BaseTuner):
    """What PEFT calls to put calibrators onto a model, switch, save and remove them."""

    prefix = "adapter_"
    tuner_layer_cls: Any = Adapter
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT's own form)

    @property
    def _calibration(self) -> Calibration:
        return get_calibration(self.model)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Puts calibrators onto a model, or others beside those that it has."""
        config: Any = self.peft_config[adapter_name]
        attach_adapter(model, adapter_name, MGFCConfig.from_dict(config.calibration), config.blocks)
        if config.inference_mode:
            self._calibration.adapters[adapter_name].requires_grad_(False)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Calibrators are hooks; no module is replaced.")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) != 1:
            raise CalibrationError(f"mgfc: expected one active adapter, found {names}. Merge them with merge_adapters.")
        self._calibration.set_adapter(names[0])
        if inference_mode:
            self._calibration.adapter.requires_grad_(False)
        self.active_adapter = names[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was the active one, another becomes it."""
        others = [name for name in self.peft_config if name != adapter_name]
        if adapter_name == self._calibration.active_adapter and others:
            self.set_adapter(others[0])
        self._calibration.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._calibration.enabled = enabled

    def _check_merge_allowed(self) -> None:
        raise CalibrationError("mgfc: what calibrators add depends on the image, so it cannot be merged into weights.")

    def unload(self) -> nn.Module:
        """Removes all calibrators and returns the model, with the modules that were saved beside them as they are now."""
        unwrap_backbone(self.model)
        model: nn.Module = super().unload()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: peft.PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {key: value for key, value in state_dict.items() if f".{cls.prefix}{adapter_name}." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.prefix}{adapter_name}.", ".")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: peft.PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), [])
        names = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
        return {names.get(key, key): value for key, value in state_dict.items()}


# PEFT's mappings are keyed by an enum of strings, which a string equals; there is no other way to add a method.
_method: Any = METHOD
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_method] = MGFCTuner.prefix
peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_method] = MGFCPeftConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[_method] = MGFCTuner
