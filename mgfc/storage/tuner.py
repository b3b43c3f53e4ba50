"""An adapter of PEFT's as files: PEFT's own, with what a stranger's may ask for bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mgfc.backbones.tuners import own_name, tuner_layers
from mgfc.errors import AdapterFileError
from mgfc.peft import CONFIG, NAME, PREFIX, WEIGHTS, state_of

if TYPE_CHECKING:
    from peft import PeftConfig

# Of a configuration from a file: what would import modules, copy blocks, or need data; how LoRA may start; what is no pattern.
_REFUSED = ("megatron_config", "layer_replication", "corda_config", "eva_config", "lora_ga_config", "loftq_config")
_STARTS = re.compile(r"gaussian|pissa(_niter_\d{1,2})?|olora|orthogonal|mica", re.IGNORECASE)
_NO_PATTERNS = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "task_type",
    "peft_type",
    "init_lora_weights",
}
_MAX_ENTRIES, _MAX_NUMBER = 500, 1 << 31


NO_FILES: Mapping[str, None] = {CONFIG: None, WEIGHTS: None}


def files(backbone: nn.Module) -> dict[str, bytes | dict[str, Tensor]]:
    """What PEFT would write of its adapter, by file name: the configuration, and the parameters."""
    config: Any = backbone.peft_config[NAME]  # type: ignore[index]
    values = config.to_dict() | {"inference_mode": True}
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    pattern = values.get("target_modules")
    if isinstance(pattern, str) and _is_slow(pattern):
        # A pattern that a reader would refuse; the names say the same.
        values["target_modules"] = [own_name(f"{name}.").removesuffix(".") for name, _, _ in tuner_layers(backbone)]
    state = {PREFIX + key: value for key, value in state_of(backbone).items()}
    return {CONFIG: (json.dumps(values, indent=2) + "\n").encode(), WEIGHTS: state}


def make_config(values: Any, path: Path) -> PeftConfig:
    """PEFT's configuration of an adapter, from what its file holds.

    Raises:
        AdapterFileError: if it is none, or asks for what would take forever, import modules or change the model's depth.
    """
    from peft import PeftConfig

    kind: Any = PeftConfig
    values = dict(values) if isinstance(values, dict) else {}
    problem = _find_problem(values)
    if problem:
        raise AdapterFileError(f"{path}: expected a configuration of PEFT's, found {problem}.")
    try:
        config: PeftConfig = kind.from_peft_type(**kind.check_kwargs(**values))
    except Exception as error:  # PEFT raises whatever its parts raise
        reason = f"{type(error).__name__}: {error}"[:300]
        raise AdapterFileError(f"{path}: expected a configuration of PEFT's, found a damaged file ({reason}).") from None
    config.inference_mode = False  # saved as True by PEFT's habit, which would freeze it
    return config


def _find_problem(values: dict[str, Any]) -> str | None:
    """What keeps a configuration from a stranger from being handed to PEFT."""
    if not isinstance(values.get("peft_type"), str) or values["peft_type"] == "MGFC":
        return "no method of PEFT's" if values else "a damaged file"
    for key in _REFUSED:
        if values.get(key):
            return f"{key}, which is not read from files"
    start = values.get("init_lora_weights")
    if isinstance(start, str) and not _STARTS.fullmatch(start):
        return f"init_lora_weights {start[:50]!r}, which is not read from files"
    level: list[Any] = [value for key, value in values.items() if key not in _NO_PATTERNS]
    while level:
        value = level.pop()
        if isinstance(value, (dict, list)):
            if len(value) > _MAX_ENTRIES:
                return f"{len(value)} entries where at most {_MAX_ENTRIES} are read"
            level += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and _is_slow(value):
            return f"the pattern {value[:50]!r}, which could take forever. Name the modules instead"
        elif isinstance(value, (int, float)) and abs(value) > _MAX_NUMBER:
            return f"a number above {_MAX_NUMBER}"
    return None


def _is_slow(pattern: str) -> bool:
    """Whether a regular expression repeats a group, or more than three things at will."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    return len(pattern) > 1000 or re.search(r"\)[*+{]", bare) is not None or len(re.findall(r"[*+{]", bare)) > 3
