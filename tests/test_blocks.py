"""What the hooks of a block do to the tensors of others: the low-rank adapter writes where nobody else can look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import randomise, same
from tiny import calibrated, tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import Case, cases

from mgfc import MGFCConfig, get_calibration, wrap_backbone


class Additions(TorchDispatchMode):
    """Counts how often the low-rank adapters wrote into what a layer computed: no other part of these models does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm_.default
        return func(*args, **kwargs or {})


def written(model: Callable[[Tensor], Any], images: Tensor) -> tuple[int, Any]:
    with Additions() as additions:
        output = model(images)
    return additions.count, output


@pytest.mark.parametrize(("make", "size"), [(tiny_vit, 48), (tiny_dinov2, 42)], ids=["timm", "transformers"])
def test_without_gradients_it_writes_into_the_output_of_the_layer(make: Callable[[], nn.Module], size: int) -> None:
    model, images = make(), torch.randn(2, 3, size, size)
    calibrated(model)
    count, expected = written(model, images)
    assert count == 0
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            count, output = written(model, images)
        assert count == 3
        assert same(output, expected)


ONE_OF_EACH = {(case.library, case.layout): case for case in cases() if case.tier in (1, 2)}


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=lambda case: case.name)
@torch.no_grad()
def test_every_layout_computes_the_same_to_the_bit(case: Case) -> None:
    model, images = case.build(), case.images()
    calibration = get_calibration(wrap_backbone(model, MGFCConfig(rank=4)))
    randomise(calibration)
    count, output = written(lambda images: case.call(model, images), images)
    with hook_of_all_modules(lambda module, args, output: None):
        others, expected = written(lambda images: case.call(model, images), images)
    assert count > others
    assert same(output, expected)


@contextmanager
def hook_of_all_modules(hook: Callable[..., None]) -> Iterator[None]:
    """Registers it for the time; it sees what each layer computed, before the low-rank adapters do."""
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def keep(kept: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: kept.append(output)


class OwnLinear(nn.Linear):
    """A layer that keeps what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def by_a_hook_before(layer: nn.Linear, kept: list[Tensor]) -> None:
    layer.register_forward_hook(keep(kept), prepend=True)


def by_a_forward_of_its_own(layer: nn.Linear, kept: list[Tensor]) -> None:
    forward = layer.forward

    def remember(x: Tensor) -> Tensor:
        kept.append(forward(x))
        return kept[-1]

    layer.forward = remember


@pytest.mark.parametrize("register", [by_a_hook_before, by_a_forward_of_its_own])
@torch.no_grad()
def test_what_others_keep_of_the_layer_stays(register: Callable[[nn.Linear, list[Tensor]], None]) -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    expected = model(images)
    layer, kept, entries = model.blocks[1].mlp.fc1, [], []
    layer.register_forward_pre_hook(lambda module, args: entries.append(args[0]))
    register(layer, kept)
    count, output = written(model, images)
    assert same(output, expected)
    assert count == 2  # in the other blocks
    assert torch.equal(kept[0], nn.functional.linear(entries[0], layer.weight, layer.bias))


@torch.no_grad()
def test_what_a_global_hook_keeps_stays() -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    kept: dict[nn.Module, Tensor] = {}
    with hook_of_all_modules(lambda module, args, output: kept.update({module: output})):
        count, _ = written(model, images)
    assert count == 0
    layer = model.blocks[0].mlp.fc1
    assert torch.equal(kept[layer], layer.forward(kept[model.blocks[0].norm2]))


@torch.no_grad()
def test_what_a_layer_of_another_class_keeps_stays() -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    layer = model.blocks[1].mlp.fc1
    layer.__class__ = OwnLinear
    calibrated(model)
    entries: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: entries.append(args[0]))
    count, _ = written(model, images)
    assert count == 2
    assert torch.equal(layer.last, nn.functional.linear(entries[0], layer.weight, layer.bias))


@torch.no_grad()
def test_an_ensemble_of_adapters_by_vmap() -> None:
    images, models = torch.randn(1, 3, 32, 48), [tiny_vit() for _ in range(2)]
    for seed, model in enumerate(models):
        wrap_backbone(model, MGFCConfig(rank=4, coarse=None, medium=None))
        torch.manual_seed(seed)
        randomise(model.calibration)
    expected = torch.stack([model(images) for model in models])
    parameters, _ = stack_module_state([model.calibration for model in models])
    shared = copy.deepcopy(models[0])

    def run(values: dict[str, Tensor]) -> Any:
        return functional_call(shared, {f"calibration.{name}": value for name, value in values.items()}, (images,))

    torch.testing.assert_close(torch.vmap(run)(parameters), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_under_autocast() -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48)
    calibrated(model)
    with torch.autocast("cpu", torch.bfloat16):
        count, output = written(model, images)
        with torch.enable_grad():
            assert same(output, model(images))
    assert count == 3
