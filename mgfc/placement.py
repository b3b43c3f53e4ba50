"""Where calibrators lie: on the device on which their block computes, also where its weights come later or lie elsewhere.

Transformers builds a model on the meta device, reads a file into it, and draws what the file does not have. accelerate
keeps weights on another device or a disk and brings them for each call. Calibrators follow neither: what no file had
keeps the values that it was made with, and all of them stay where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mgfc.adapter import Adapter
from mgfc.backbones.detection import Tower
from mgfc.backbones.stem import image_entry
from mgfc.errors import CalibrationError, ConfigError, UnsupportedBackboneError

# Transformers' mark on tensors that a file had, and on modules that it has initialised.
_MARK = "_is_hf_initialized"


def off_meta() -> AbstractContextManager[object]:
    """Within it, what is made has values, also where Transformers makes models without."""
    return torch.device("cpu") if torch.empty(0).is_meta else nullcontext()


def place(adapter: Adapter, tower: Tower) -> dict[str, Tensor]:
    """Moves calibrators to the devices of their blocks, in float32 where these are of half precision.

    Returns:
        The values of those whose blocks have none yet, by name.

    Raises:
        ConfigError: if blocks on several devices would share layers.
        UnsupportedBackboneError: if the calibrators were made without values.
    """
    if any(parameter.is_meta for parameter in adapter.parameters()):
        raise UnsupportedBackboneError(
            "Expected calibrators with values, found that what is around wrap_backbone takes them, as accelerate's "
            "init_empty_weights does. Wrap the model afterwards, or build it under torch.device('meta')."
        )
    like = next((p for p in tower.root.parameters() if p.is_floating_point()), None)
    if like is None:
        return {}
    homes = list(_homes(adapter, tower))
    if adapter.maps is not None and len({device for _, _, device in homes}) > 1:
        raise ConfigError("ReinConfig: expected blocks on one device, since they share linear layers, found several.")
    values: dict[str, Tensor] = {}
    dtype = torch.promote_types(like.dtype, torch.float32)
    for prefix, module, device in homes:
        if device.type == "meta":
            values |= {prefix + name: value.clone() for name, value in module.state_dict().items()}
        else:
            _mark(module)
        if any((tensor.device, tensor.dtype) != (device, dtype) for tensor in (*module.parameters(), *module.buffers())):
            module.to(device, dtype)
    return values


def settle(adapter: Adapter, tower: Tower, values: dict[str, Tensor], spare: dict[str, Tensor]) -> bool:
    """Gives calibrators the values that they lack, once their blocks have theirs, and takes them back from accelerate.

    Args:
        adapter: of the tower.
        tower: the backbone.
        values: from `place`. They move to `spare`, used or not, since a file had others.
        spare: for tensors that Transformers then hands to a disk that does not have them.

    Returns:
        Whether all have them now, and some did not before.

    Raises:
        CalibrationError: if values are lost.
    """
    had_none = bool(values)
    if not had_none and not lacks_values(adapter):
        return False
    for prefix, module, device in _homes(adapter, tower):
        if device.type == "meta":
            continue
        for path, part in module.named_modules():
            _settle(part, f"{prefix}{path}." if path else prefix, device, values, spare)
        if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
            module.to(device)
    return had_none and not values


def lacks_values(adapter: Adapter) -> bool:
    """Whether tensors of it are on the meta device."""
    return any(tensor.is_meta for tensor in adapter.tensors())


@torch.no_grad()
def fill(adapter: Adapter, values: dict[str, Tensor]) -> None:
    """Copies values into tensors that just left the meta device, which cannot have brought any."""
    for name, tensor in adapter.state_dict().items():
        if name in values and not tensor.is_meta:
            tensor.copy_(values.pop(name))


def _homes(adapter: Adapter, tower: Tower) -> Iterator[tuple[str, nn.Module, torch.device]]:
    """The parts of an adapter, each with the prefix of its names and the device where it is needed."""
    entry = image_entry(tower)
    home = _device_of(tower.root if entry is None else entry) or _device_of(tower.root) or torch.device("cpu")
    for name, child in adapter.named_children():
        if child is not adapter.layers:
            yield f"{name}.", child, home
    for key, layer in adapter.layers.items():
        block = tower.root.get_submodule(tower.blocks[int(key)])
        yield f"layers.{key}.", layer, _device_of(block) or home


def _device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes; its weights may be elsewhere, if accelerate brings them. None for one without any."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for aligning in getattr(hook, "hooks", [hook]):
            device = getattr(aligning, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def _settle(part: nn.Module, prefix: str, device: torch.device, values: dict[str, Tensor], spare: dict[str, Tensor]) -> None:
    # Transformers marks a module once it drew what no file had. It knows nothing of this one: such tensors have no values.
    is_drawn, hook = hasattr(part, _MARK), getattr(part, "_hf_hook", None)
    elsewhere = getattr(hook, "weights_map", None) or {}
    for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
        key = prefix + name
        initial = values.pop(key, None)
        if initial is not None:
            spare[key] = initial
        if tensor.is_meta:
            value = elsewhere[name] if name in elsewhere else spare.get(key)
            if value is None:
                raise CalibrationError(
                    f"{key}: expected calibrators with values, found them on the meta device. Load the adapter after the "
                    "model's weights are in their places."
                )
            _set(part, name, value.to(device))
        elif initial is not None and is_drawn and not hasattr(tensor, _MARK):
            tensor.data.copy_(initial)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(part)
    setattr(part, _MARK, True)


def _set(part: nn.Module, name: str, value: Tensor) -> None:
    if name in part._parameters:
        before = part._parameters[name]
        part._parameters[name] = nn.Parameter(value, requires_grad=before is None or before.requires_grad)
    else:
        part._buffers[name] = value


def _mark(module: nn.Module) -> None:
    """Tells Transformers to leave a module's values alone."""
    for part in module.modules():
        setattr(part, _MARK, True)
