"""What several test files need: trained-looking calibrators, flattened outputs, snapshots of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgfc import Calibration, CoarseCalib, MediumCalib
from mgfc.calibrators.running import RunningMean

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
"""Of a tiny timm ViT."""


def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Makes every parameter and every running statistic non-trivial, as training would."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
        for part in module.modules():
            if isinstance(part, CoarseCalib):
                mean = torch.randn_like(part.source.value[0]) * std
                part.source.set(torch.stack([mean, mean.square() + (std / 3) ** 2]), 3)
            elif isinstance(part, MediumCalib):
                share = torch.randn(part.num_prototypes, 1).softmax(dim=0)
                centroids = torch.randn(part.num_prototypes, part.source.value.shape[1] // 2)
                moments = torch.ones_like(share), centroids, centroids.square() + std**2
                part.source.set(share * torch.cat(moments, dim=1), 3)


def settle(module: nn.Module) -> None:
    """Makes running statistics stay as they are, so that calls in training mode can be compared."""
    for part in module.modules():
        if isinstance(part, RunningMean):
            part.count.fill_(torch.inf)
            part.window = torch.inf


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output, in a fixed order."""

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            for key in value:
                yield from walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    return list(walk(output))


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are bit-for-bit equal."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return len(pairs) > 0 and all(a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that wrapping could leave behind."""
    return {
        "modules": [name for name, _ in model.named_modules()],
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][key], before["state"][key]) for key in before["state"])
    assert {k: v for k, v in after.items() if k != "state"} == {k: v for k, v in before.items() if k != "state"}


def only_layer(calibration: Calibration, index: int) -> None:
    """Makes one block's calibrator the only one with an effect."""
    for key, layer in calibration.layers.items():
        if int(key) == index:
            randomise(layer)
            nn.init.normal_(layer.low_rank.up)
            continue
        forget(layer)
        nn.init.zeros_(layer.low_rank.up)
        if layer.fine is not None:
            nn.init.zeros_(layer.fine.gate)
    if calibration.adapter.coarse is not None:
        forget(calibration.adapter.coarse)


def forget(module: nn.Module) -> None:
    """Empties running statistics."""
    for part in module.modules():
        if isinstance(part, RunningMean):
            for buffer in part.buffers():
                buffer.zero_()
