"""Without gradients the low-rank adapter writes into what its layer computed, where nobody else can hold that."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import randomise, same, tensors
from tiny import calibrated, tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from zoo import Case, cases

from mgfc import MGFCConfig, get_calibration, wrap_backbone


def written(model: Callable[[Tensor], Any], images: Tensor) -> tuple[int, Any]:
    """How often the low-rank adapters wrote into what a layer computed, and the output: nothing else in these models does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = model(images)
    return sum(event.name == "aten::addmm_" for event in profile.events()), output


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
def test_every_layout_computes_the_same(case: Case) -> None:
    model, images = case.build(), case.images()
    calibration = get_calibration(wrap_backbone(model, MGFCConfig(rank=4)))
    randomise(calibration)
    count, output = written(lambda images: case.call(model, images), images)
    with hook_of_all_modules("forward", lambda module, args, output: None):
        others, expected = written(lambda images: case.call(model, images), images)
    assert count > others
    for found, plain in zip(tensors(output), tensors(expected), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


@contextmanager
def hook_of_all_modules(kind: str, hook: Callable[..., None]) -> Iterator[None]:
    """Registers it for the time; one of kind "forward" sees what each layer computed, before the low-rank adapters do."""
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(hook)
    try:
        yield
    finally:
        handle.remove()


class OwnLinear(nn.Linear):
    """A layer that keeps what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def by_a_hook_before(layer: nn.Linear, kept: list[Tensor]) -> None:
    layer.register_forward_hook(lambda module, args, output: kept.append(output), prepend=True)


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


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@torch.no_grad()
def test_what_global_hooks_keep_stays(kind: str) -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    kept: list[Tensor] = []
    with hook_of_all_modules(kind, lambda module, *tensors: kept.extend(tensors[0])):
        count, _ = written(model, images)
    assert count == 0
    assert kept


@torch.no_grad()
def test_what_hooks_of_the_adapter_keep_stays() -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    changes: list[Tensor] = []
    low_rank = model.calibration.layers["1"].low_rank
    low_rank.register_forward_hook(lambda module, args, output: changes.append(output - args[1]))
    count, _ = written(model, images)
    assert count == 2
    assert changes[0].abs().max() > 0


class Recorder(TorchDispatchMode):
    """Keeps what linear layers compute, and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.kept.append((output, output.clone()))
        return output


@torch.no_grad()
def test_what_a_mode_keeps_stays() -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    with Recorder() as recorder:
        model(images)
    assert len(recorder.kept) > 9
    assert all(torch.equal(output, copied) for output, copied in recorder.kept)


def test_selective_checkpointing_around_a_backbone_without_gradients() -> None:
    model, head, images = tiny_vit(), nn.Linear(32, 5), torch.randn(1, 3, 32, 48)
    calibrated(model)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            features = model(images)
        return head(features)

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(run, images, use_reentrant=False, context_fn=contexts).sum().backward()
    assert head.weight.grad.any()


@torch.no_grad()
def test_what_a_forward_of_the_class_keeps_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit(), torch.randn(1, 3, 32, 48)
    calibrated(model)
    forward, kept = nn.Linear.forward, []

    def remember(self: nn.Linear, x: Tensor) -> Tensor:
        output = forward(self, x)
        kept.append((output, output.clone()))
        return output

    monkeypatch.setattr(nn.Linear, "forward", remember)
    count, _ = written(model, images)
    assert count == 0
    assert all(torch.equal(output, copied) for output, copied in kept)


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
