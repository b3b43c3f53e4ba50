"""Several adapters on one backbone: added, switched, merged, deleted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomise, same
from torch import Tensor, nn

from mgfc import AdapterNotFoundError, CalibrationError, ConfigError, MGFCConfig, unwrap_backbone, wrap_backbone

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def bare() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    ).eval()


@pytest.fixture
def vit() -> nn.Module:
    """With the adapters "default" and "fog", both random."""
    model = wrap_backbone(bare(), MGFCConfig(rank=8))
    randomise(model.calibration)
    model.calibration.add_adapter("fog", MGFCConfig(rank=8))
    with model.calibration.using("fog"):
        randomise(model.calibration)
    return model.eval()


def outputs(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in model.calibration.adapters:
        with model.calibration.using(name):
            found[name] = model(IMAGES)
    return found


def test_the_first_stays_active_until_another_is_set(vit: nn.Module) -> None:
    calibration = vit.calibration
    assert list(calibration.adapters) == ["default", "fog"]
    assert calibration.active_adapter == "default"
    found = outputs(vit)
    assert same(vit(IMAGES), found["default"])
    assert not same(found["default"], found["fog"])
    calibration.set_adapter("fog")
    assert same(vit(IMAGES), found["fog"])
    with calibration.disabled():
        assert same(vit(IMAGES), bare()(IMAGES))


def test_only_the_active_one_is_trained(vit: nn.Module) -> None:
    calibration = vit.calibration
    for name in ("fog", "default"):
        calibration.set_adapter(name)
        trained = {n for n, p in vit.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in vit.named_parameters() if f"calibration.adapter_{name}." in n}
        assert len(trained) == len(list(calibration.adapter.parameters()))


def test_only_the_active_one_takes_statistics(vit: nn.Module) -> None:
    calibration = vit.calibration
    before = {name: calibration.adapters[name].num_batches for name in calibration.adapters}
    with calibration.using("fog"):
        vit.train()(IMAGES)
    assert {name: calibration.adapters[name].num_batches for name in before} == before | {"fog": before["fog"] + 1}


def test_adapters_may_differ_in_rank_and_blocks(vit: nn.Module) -> None:
    vit.calibration.add_adapter("small", MGFCConfig(rank=4, layers=(1,)))
    with vit.calibration.using("small"):
        assert same(vit(IMAGES), bare()(IMAGES))
        randomise(vit.calibration)
        assert not same(vit(IMAGES), bare()(IMAGES))
        assert [report.name for report in vit.calibration.check(IMAGES)] == ["blocks.1"]
        assert "blocks.0" not in vit.calibration.summary()


def test_each_is_saved_and_loaded_by_itself(vit: nn.Module, tmp_path: Path) -> None:
    found = outputs(vit)
    vit.calibration.set_adapter("fog")
    vit.calibration.save_pretrained(tmp_path)
    twin = wrap_backbone(bare(), tmp_path)
    assert same(twin(IMAGES), found["fog"])
    vit.calibration.set_adapter("default")
    vit.calibration.delete_adapter("fog")
    vit.calibration.add_adapter("again", tmp_path)
    assert same(outputs(vit)["again"], found["fog"])


def test_state_dicts_and_copies_hold_all(vit: nn.Module) -> None:
    found = outputs(vit)
    twin = copy.deepcopy(vit)
    other = wrap_backbone(bare(), MGFCConfig(rank=8))
    other.calibration.add_adapter("fog", MGFCConfig(rank=8))
    other.load_state_dict(vit.state_dict())
    nn.init.zeros_(vit.calibration.layers["0"].low_rank.up)
    for model in (twin, other):
        assert all(same(out, found[name]) for name, out in outputs(model).items())


def test_a_merge_is_the_weighted_mean(vit: nn.Module) -> None:
    calibration = vit.calibration
    calibration.merge_adapters(["default", "fog"], [3, 1], name="both")
    states = {name: calibration.adapters[name].state_dict() for name in calibration.adapters}
    for key, value in states["both"].items():
        torch.testing.assert_close(value, 0.75 * states["default"][key] + 0.25 * states["fog"][key])
    calibration.merge_adapters(["fog", "fog"])
    assert same(outputs(vit)["merged"], outputs(vit)["fog"])
    assert calibration.active_adapter == "default"
    assert not any(p.requires_grad for p in calibration.adapters["both"].parameters())


def test_unwrapping_takes_all_away(vit: nn.Module) -> None:
    assert same(unwrap_backbone(vit)(IMAGES), bare()(IMAGES))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_switching_under_compile(backend: str, vit: nn.Module) -> None:
    torch._dynamo.reset()
    vit.calibration.add_adapter("last", MGFCConfig(rank=8, layers=(2,)))
    with vit.calibration.using("last"):
        randomise(vit.calibration)
    found = outputs(vit)
    compiled = torch.compile(vit, backend=backend, fullgraph=True)
    for name in ("default", "fog", "last", "default"):
        with torch.no_grad(), vit.calibration.using(name):
            output = compiled(IMAGES)
        tolerance = 0 if backend == "eager" else 1e-4
        torch.testing.assert_close(output, found[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.add_adapter("fog"), "expected a new one without dots beside default, fog, found 'fog'"),
        (lambda c: c.add_adapter("a.b"), "without dots"),
        (lambda c: c.add_adapter(""), "without dots"),
        (lambda c: c.add_adapter("new", MGFCConfig(rank=64)), "expected at most 32"),
        (lambda c: c.add_adapter("new", 3), "expected an MGFCConfig, a directory or a Hub id, found int"),
        (lambda c: c.set_adapter("snow"), "Adapter 'snow': expected one of default, fog"),
        (lambda c: c.using("snow").__enter__(), "expected one of default, fog"),
        (lambda c: c.delete_adapter("snow"), "expected one of default, fog"),
        (lambda c: c.delete_adapter("default"), "'default' is active. Activate another"),
        (lambda c: c.merge_adapters(["default", "snow"]), "expected one of default, fog"),
        (lambda c: c.merge_adapters(["default", "fog"], name="fog"), "expected a new one"),
        (lambda c: c.merge_adapters(["default", "fog"], [1.0]), "weights: expected 2 numbers"),
        (lambda c: c.merge_adapters(["default", "fog"], [0, 0]), "whose sum is above 0"),
        (lambda c: c.merge_adapters([]), "expected names of adapters"),
        (
            lambda c: (c.add_adapter("small", MGFCConfig(rank=4)), c.merge_adapters(["default", "small"])),
            "Adapters of different configurations cannot be averaged",
        ),
    ],
)
def test_bad_calls_change_nothing(vit: nn.Module, call: object, message: str) -> None:
    found = outputs(vit)
    with pytest.raises(ConfigError, match=message):
        call(vit.calibration)
    assert vit.calibration.active_adapter == "default"
    assert all(same(out, outputs(vit)[name]) for name, out in found.items())


def test_an_adapter_that_is_not_there(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        vit.calibration.add_adapter("new", tmp_path / "nothing")
    assert list(vit.calibration.adapters) == ["default", "fog"]


def test_using_gives_back_the_flags_as_they_were() -> None:
    vit = wrap_backbone(bare(), MGFCConfig(rank=4))
    vit.calibration.add_adapter("other", MGFCConfig(rank=8))
    vit.calibration.adapter.requires_grad_(False)
    vit.calibration.layers["1"].requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    with vit.calibration.using("other"):
        assert all(parameter.requires_grad for parameter in vit.calibration.adapter.parameters())
    assert {name: parameter.requires_grad for name, parameter in vit.named_parameters()} == before
    assert any(before.values())


def test_the_outer_adapter_may_go_inside_using(vit: nn.Module) -> None:
    with vit.calibration.using("fog"):
        vit.calibration.delete_adapter("default")
    assert vit.calibration.active_adapter == "fog" and list(vit.calibration.adapters) == ["fog"]


def test_a_check_of_disabled_calibrators_says_so(vit: nn.Module) -> None:
    with vit.calibration.disabled(), pytest.raises(CalibrationError, match="found them disabled"):
        vit.calibration.check(IMAGES)


def test_a_merge_with_empty_statistics_has_some(vit: nn.Module) -> None:
    for mean in vit.calibration.adapters["fog"].statistics:
        mean.set(mean.value, count=1)
    for mean in vit.calibration.adapters["default"].statistics:
        for buffer in mean.buffers():
            buffer.zero_()
    vit.calibration.merge_adapters(["default", "fog"], name="both")
    assert vit.calibration.adapters["both"].num_batches == 1
