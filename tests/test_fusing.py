"""Low-rank adapters in the backbone's weights: the same outputs, the same files, and back again to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from helpers import randomise, same, tensors
from tiny import tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, Case, cases

from mgfc import CalibrationError, FineConfig, MGFCConfig, get_calibration, unwrap_backbone, wrap_backbone

IMAGES = 2 * torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) + 1
CONFIG = MGFCConfig(rank=8, fine=FineConfig())


def zoo(name: str) -> nn.Module:
    return next(case for case in CASES if case.name == name).build()


def gated_vit() -> nn.Module:
    """Its feed-forward network begins with two linear layers."""
    return tiny_vit(mlp_layer=timm.layers.SwiGLU)


def packed_vit() -> nn.Module:
    """Its feed-forward network begins with one linear layer, of which half is a gate."""
    return tiny_vit(mlp_layer=timm.layers.GluMlp)


def levit() -> nn.Module:
    """Its feed-forward networks are 1 x 1 convolutions."""
    return zoo("timm-LevitDistilled-conv")


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "timm ViT": (tiny_vit, (64, 96)),
    "timm ViT, gated": (gated_vit, (64, 96)),
    "timm ViT, gated in one": (packed_vit, (64, 96)),
    "timm, convolutions": (levit, next(c.image_size for c in CASES if c.name == "timm-LevitDistilled-conv")),
    "Transformers DINOv2": (tiny_dinov2, (56, 84)),
    "Transformers DINOv2, gated": (lambda: tiny_dinov2(use_swiglu_ffn=True), (56, 84)),
}


def trained(backbone: nn.Module, config: MGFCConfig = CONFIG) -> nn.Module:
    model = wrap_backbone(backbone, config)
    randomise(get_calibration(model))
    return model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("calibration.")}


def apart(one: Any, other: Any) -> float:
    """The largest difference between outputs, relative to their largest values."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if a.is_floating_point())


@contextmanager
def nothing_fused(model: nn.Module) -> Iterator[None]:
    before = weights(model)
    yield
    assert not get_calibration(model).active.fused and same(weights(model), before)


@pytest.mark.parametrize(("make", "size"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_outputs_stay_and_weights_come_back_to_the_bit(make: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model, images = trained(make()), torch.randn(8, 3, *size) + 1  # one image alone may be of those that magnify rounding
    calibration, before = model.calibration, weights(model)
    expected, state = model(images), copy.deepcopy(calibration.adapter.state_dict())
    with calibration.disabled():
        bare = model(images)
    calibration.fuse()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert len(changed) >= len(calibration.layers) and all(name.endswith("weight") for name in changed)
    assert apart(model(images), expected) < 1e-6 < 1e-2 < apart(bare, expected)
    assert same(calibration.adapter.state_dict(), state)
    calibration.unfuse()
    assert same(weights(model), before) and same(model(images), expected)
    exact = copy.deepcopy(model).double()
    expected = exact(images.double())
    exact.calibration.fuse()
    assert apart(exact(images.double()), expected) < 1e-14


@pytest.mark.parametrize("case", [c for c in cases() if c.tier in (1, 2)], ids=lambda case: case.name)
@torch.no_grad()
def test_every_class(case: Case) -> None:
    model = wrap_backbone(case.build(), MGFCConfig(rank=4, medium=None))
    calibration, images = get_calibration(model), case.images()
    randomise(calibration, std=0.1)
    before = weights(model)
    expected = case.call(model, images)
    with calibration.fused():
        found = case.call(model, images)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.nan_to_num().abs().max()), equal_nan=True)
    assert same(weights(model), before)


@torch.no_grad()
def test_calling_either_twice_changes_nothing() -> None:
    model = trained(tiny_vit())
    before, expected = weights(model), model(IMAGES)
    model.calibration.unfuse()
    assert same(weights(model), before)
    for _ in range(2):
        model.calibration.fuse()
        assert apart(model(IMAGES), expected) < 1e-6
    for _ in range(2):
        model.calibration.unfuse()
        assert same(weights(model), before)


@torch.no_grad()
def test_it_costs_nothing() -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(IMAGES)
        return counter.get_total_flops()

    model = trained(tiny_vit(), MGFCConfig(rank=8, medium=None))
    assert flops(model) > flops(tiny_vit())
    with model.calibration.fused():
        assert flops(model) == flops(tiny_vit())


@torch.no_grad()
def test_blocks_without_an_adapter_keep_their_weights() -> None:
    model = trained(tiny_vit(), MGFCConfig(rank=8, layers=(1,)))
    before = weights(model)
    with model.calibration.fused():
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"blocks.1.mlp.fc1.weight"}


def test_files_are_those_of_before(tmp_path: Path) -> None:
    model = trained(tiny_vit())
    model.calibration.save_pretrained(tmp_path / "before")
    model.calibration.fuse()
    model.calibration.save_pretrained(tmp_path / "fused")
    before, fused = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "fused"))
    assert before == fused


def test_the_context_manager_ends_with_an_exception() -> None:
    model = trained(tiny_vit())
    with nothing_fused(model), pytest.raises(KeyError), model.calibration.fused():
        raise KeyError
    with nothing_fused(model), model.calibration.fused():
        assert model.calibration.active.fused


@torch.no_grad()
def test_check_and_scene_work_fused() -> None:
    model = trained(tiny_vit())
    with model.calibration.fused():
        assert [report.changed for report in model.calibration.check(IMAGES)] == [True] * 3
        with model.calibration.scene(IMAGES):
            model(IMAGES[..., :48])


@torch.no_grad()
def test_half_precision_weights_stay_in_it() -> None:
    model = trained(tiny_vit().to(torch.bfloat16))
    images, before = IMAGES.to(torch.bfloat16), weights(model)
    expected = model(images)
    with model.calibration.fused():
        assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16}
        assert apart(model(images).float(), expected.float()) < 0.05
    assert same(weights(model), before)


# What has to wait


def test_training_has_to_wait() -> None:
    model = trained(tiny_vit())
    before = weights(model)
    with model.calibration.fused():
        model.train()
        with pytest.raises(CalibrationError, match=r"fused into the weights\. Call calibration\.unfuse\(\) to train"):
            model(IMAGES)
        with torch.no_grad():
            model(IMAGES)
        model.eval()(IMAGES)
    assert same(weights(model), before)
    model.train()(IMAGES).square().mean().backward()
    assert model.calibration.layers["0"].low_rank.up.grad.any()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda c: c.set_adapter("other"), "switching adapters"),
        (lambda c: c.using("other").__enter__(), "switching adapters"),
        (lambda c: c.disabled().__enter__(), "disabling them"),
    ],
    ids=["set_adapter", "using", "disabled"],
)
@torch.no_grad()
def test_switching_and_disabling_have_to_wait(call: Any, what: str) -> None:
    model = trained(tiny_vit())
    model.calibration.add_adapter("other", CONFIG)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(IMAGES)
    model.calibration.fuse()
    with pytest.raises(CalibrationError, match=rf"fused into the weights\. Call unfuse\(\) before {what}"):
        call(model.calibration)
    assert model.calibration.active_adapter == "default" and model.calibration.enabled
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert apart(model(IMAGES), expected) < 1e-6
    model.calibration.unfuse()
    call(model.calibration)


def test_a_disabled_adapter_is_not_fused() -> None:
    model = trained(tiny_vit())
    with nothing_fused(model), model.calibration.disabled():
        with pytest.raises(CalibrationError, match="disabled"):
            model.calibration.fuse()
        assert same(model(IMAGES), tiny_vit()(IMAGES))


# What cannot be fused


def test_quantised_weights_are_refused() -> None:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = trained(tiny_vit())
    expected = weights(model)
    torchao.quantization.quantize_(model.blocks[2], Int8WeightOnlyConfig())
    before = model(IMAGES)
    with pytest.raises(CalibrationError, match=r"Block 'blocks\.2': expected a plain weight.*quantised or sharded"):
        model.calibration.fuse()
    assert not model.calibration.active.fused and same(model(IMAGES), before)
    assert all(torch.equal(model.get_parameter(name), expected[name]) for name in expected if "blocks.1.mlp" in name)


@pytest.mark.parametrize("wrapped_first", [True, False])
@torch.no_grad()
def test_layers_under_pefts_are_refused(wrapped_first: bool) -> None:
    config = peft.LoraConfig(target_modules=r"blocks\.2\.mlp\.fc1", r=2, init_lora_weights=False)
    vit = tiny_vit()
    if not wrapped_first:
        peft.inject_adapter_in_model(config, vit)
    model = trained(vit)
    if wrapped_first:
        peft.inject_adapter_in_model(config, vit)
    expected = model(IMAGES)
    with nothing_fused(model), pytest.raises(CalibrationError, match=r"Block 'blocks\.2': .*PEFT's sits on it.*Merge"):
        model.calibration.fuse()
    assert same(model(IMAGES), expected)


@torch.no_grad()
def test_pefts_adapters_elsewhere_do_not_matter() -> None:
    model = tiny_vit()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False), model)
    trained(model)
    expected = model(IMAGES)
    with model.calibration.fused():
        assert apart(model(IMAGES), expected) < 1e-6


# Copies and the end


@torch.no_grad()
def test_a_copy_of_a_fused_model_is_fused_and_its_own() -> None:
    model = trained(tiny_vit())
    before, expected = weights(model), model(IMAGES)
    model.calibration.fuse()
    fused, found = weights(model), model(IMAGES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert twin.calibration.active.fused and same(twin(IMAGES), found)
        twin.calibration.unfuse()
        assert same(weights(twin), before) and same(twin(IMAGES), expected)
        assert same(weights(model), fused) and model.calibration.active.fused
    alone = copy.deepcopy(model.calibration)
    alone.unfuse()
    assert same(weights(model), fused)


@torch.no_grad()
def test_unwrapping_unfuses() -> None:
    model = trained(tiny_vit())
    model.calibration.fuse()
    assert same(weights(unwrap_backbone(model)), tiny_vit().state_dict())
    assert same(model(IMAGES), tiny_vit()(IMAGES))


def test_what_would_be_wrong_while_fused_is_refused() -> None:
    vit = wrap_backbone(tiny_vit(), CONFIG)
    randomise(vit.calibration)
    state = vit.state_dict()
    vit.calibration.fuse()
    with pytest.raises(CalibrationError, match=r"Call unfuse\(\) before disabling"):
        vit.calibration.enabled = False
    with pytest.raises(CalibrationError, match=r"Call unfuse\(\) before a state dict is loaded"):
        vit.load_state_dict(state)
    alone = copy.deepcopy(vit.calibration)
    alone.add_module("adapter_other", copy.deepcopy(alone.adapter))
    alone.set_adapter("other")
