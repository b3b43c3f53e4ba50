"""Statistics gathered after training, in one pass over the source that changes nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise, same, snapshot
from tiny import tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

from mgfc import FineConfig, MGFCConfig, get_calibration, wrap_backbone
from mgfc.adapter import Adapter

SOURCE = 2 * torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(7)) + 1
SOURCE += torch.randn(32, 3, 1, 1, generator=torch.Generator().manual_seed(8))
OTHER = 3 * SOURCE[:2] - 4


def trained(**options: Any) -> nn.Module:
    """After training on images of another kind, with parameters that are not zero."""
    vit = wrap_backbone(tiny_vit(**options), MGFCConfig(rank=8, fine=FineConfig()))
    randomise(vit.calibration)
    for _ in range(2):
        vit.train()(OTHER)
    return vit.eval()


def observe(model: nn.Module, batch_size: int = 8, images: Tensor = SOURCE) -> None:
    with get_calibration(model).observing():
        for batch in images.split(batch_size):
            model(batch)


def statistics(adapter: Adapter) -> list[Tensor]:
    return [mean.value for mean in adapter.statistics]


@contextmanager
def only_statistics_change(model: nn.Module) -> Iterator[None]:
    before, grads = snapshot(model), {name: p.grad for name, p in model.named_parameters()}
    grad_mode, random = torch.is_grad_enabled(), torch.get_rng_state()
    yield
    after = snapshot(model)
    own = {name for name in before["state"] if ".source." in name}
    assert own and before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert name in own or torch.equal(value, after["state"][name]), name
    for key in ("modules", "flags", "hooks", "modes", "attributes"):
        assert before[key] == after[key], key
    assert {name: p.grad for name, p in model.named_parameters()} == grads
    assert torch.is_grad_enabled() == grad_mode and torch.equal(torch.get_rng_state(), random)
    assert not any(mean.observing for mean in get_calibration(model).adapter.statistics)


def test_statistics_are_those_of_the_source() -> None:
    vit = trained()
    with only_statistics_change(vit):
        observe(vit)
    coarse = vit.calibration.adapter.coarse
    deviation = (SOURCE.var(dim=(2, 3), correction=0) + 1e-6).sqrt()
    expected = torch.stack([SOURCE.mean(dim=(2, 3)), deviation.log()], dim=1)
    torch.testing.assert_close(coarse.source.value[0], expected.mean(dim=0))
    torch.testing.assert_close(coarse.source.value[1], expected.square().mean(dim=0))
    for layer in vit.calibration.layers.values():
        prototypes = layer.medium.prototypes()
        assert layer.medium.source.ready and prototypes.isfinite().all()
        torch.testing.assert_close(layer.medium.source.value[:, 0].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    """Neither modes, also where they differ by module, nor gradients that are there already, nor random numbers."""
    vit = trained(drop_rate=0.5, proj_drop_rate=0.5)
    vit(SOURCE[:2]).sum().backward()
    vit.train(training)
    vit.blocks[1].train(not training)
    vit.calibration.layers["2"].eval()
    with only_statistics_change(vit):
        observe(vit)


@pytest.mark.parametrize("name", ["timm-Levit", "timm-TinyVit"])
def test_running_statistics_of_batch_norm_stay(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = wrap_backbone(case.build(), MGFCConfig(rank=4), freeze=False).train()
    with only_statistics_change(model), get_calibration(model).observing():
        for seed in range(3):
            case.call(model, case.images(seed=seed))
    assert get_calibration(model).adapter.is_observed


def test_forwards_are_those_of_evaluation_without_calibration_and_without_a_graph() -> None:
    vit = trained(drop_rate=0.5, proj_drop_rate=0.5)
    plain = copy.deepcopy(vit)
    plain.calibration.add_adapter("empty", MGFCConfig(rank=8, fine=FineConfig()))
    state = {name: value for name, value in vit.calibration.adapter.state_dict().items() if ".source." not in f".{name}"}
    plain.calibration.adapters["empty"].load_state_dict(state, strict=False)
    plain.calibration.set_adapter("empty")
    expected = plain(SOURCE[:4])
    vit.train()
    with vit.calibration.observing():
        found = vit(SOURCE[:4])
    assert torch.equal(found, expected) and not found.requires_grad


def test_what_training_gathered_is_forgotten() -> None:
    vit = trained()
    fresh = copy.deepcopy(vit)
    for mean in fresh.calibration.adapter.statistics:
        for buffer in mean.buffers():
            buffer.zero_()
    assert vit.calibration.num_batches and not fresh.calibration.num_batches
    observe(vit)
    observe(fresh)
    for one, other in zip(statistics(vit.calibration.adapter), statistics(fresh.calibration.adapter), strict=True):
        assert torch.equal(one, other)
    assert vit.calibration.num_batches == 4
    before = statistics(vit.calibration.adapter)
    observe(vit)  # and so is what an earlier pass gathered
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(vit.calibration.adapter), strict=True))


def test_steps_do_not_depend_on_the_batches_of_the_pass() -> None:
    found = []
    for batch_size in (4, 8, 16, 32):
        vit = trained()
        observe(vit, batch_size)
        found.append(statistics(vit.calibration.adapter))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_an_exception_gives_modes_and_statistics_back() -> None:
    vit = trained().train()
    vit.blocks[1].eval()
    before = [buffer.clone() for buffer in vit.calibration.buffers()]
    handle = vit.blocks[2].register_forward_pre_hook(lambda module, args: 1 / 0)
    with only_statistics_change(vit), pytest.raises(ZeroDivisionError), vit.calibration.observing():
        vit(SOURCE[:8])
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, vit.calibration.buffers(), strict=True))
    vit.eval()(OTHER)
    assert all(torch.equal(a, b) for a, b in zip(before, vit.calibration.buffers(), strict=True)), "it observes no longer"


def test_switching_adapters_meanwhile_leaves_the_other_one_alone() -> None:
    vit = trained()
    vit.calibration.add_adapter("other", MGFCConfig(rank=8, fine=FineConfig()))
    with vit.calibration.observing():
        vit(SOURCE[:8])
        vit.calibration.set_adapter("other")
    adapters = vit.calibration.adapters
    assert adapters["default"].is_observed and not adapters["other"].is_observed
    vit.calibration.set_adapter("default")
    vit(OTHER)
    assert adapters["default"].num_batches == 1


def test_a_pass_without_images_is_noticed() -> None:
    vit = trained()
    with pytest.warns(UserWarning, match="observing: no image reached the backbone"), vit.calibration.observing():
        pass
    assert vit.calibration.num_batches == 0
    damaged = torch.full((2, 3, 64, 64), torch.nan)
    with pytest.warns(UserWarning, match="no image reached"), vit.calibration.observing():
        vit(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(vit)
        without = wrap_backbone(tiny_vit(), MGFCConfig(rank=8, coarse=None, medium=None))
        with without.calibration.observing():
            pass


def test_where_statistics_come_from_is_told_and_kept(tmp_path: Path) -> None:
    vit = trained()
    assert not vit.calibration.adapter.is_observed
    assert "gathered during training" in vit.calibration.summary()
    observe(vit)
    assert vit.calibration.adapter.is_observed
    assert "statistics of 4 batches, gathered after training" in vit.calibration.summary()
    vit.calibration.save_pretrained(tmp_path)
    twin = wrap_backbone(tiny_vit(), tmp_path)
    assert twin.calibration.adapter.is_observed and "gathered after training" in twin.calibration.summary()
    assert same(twin(OTHER), vit(OTHER))
    vit.train()(OTHER)
    assert not vit.calibration.adapter.is_observed
    with pytest.warns(UserWarning, match="no image"), vit.calibration.observing():
        pass
    assert not vit.calibration.adapter.is_observed


def test_only_the_active_adapter_observes() -> None:
    vit = trained()
    vit.calibration.add_adapter("other", MGFCConfig(rank=8))
    before = statistics(vit.calibration.adapter)
    with vit.calibration.using("other"):
        observe(vit)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(vit.calibration.adapter), strict=True))
    assert vit.calibration.adapters["other"].is_observed and not vit.calibration.adapter.is_observed


def test_observing_calibrates_afterwards() -> None:
    """Images in another light come out closer to what they were, at the end of the backbone."""
    vit = wrap_backbone(tiny_dinov2(), MGFCConfig(rank=None))
    images = SOURCE[..., :56, :56]
    observe(vit, images=images)

    def tokens(images: Tensor) -> Tensor:
        with torch.no_grad():
            return vit(images).last_hidden_state

    dark = 0.3 * images[:8] - 2
    with vit.calibration.disabled():
        usual, lost = tokens(images[:8]), tokens(dark)
    found = tokens(dark)
    assert F.mse_loss(found, usual) < 0.5 * F.mse_loss(lost, usual)


def test_training_goes_on_after_observing() -> None:
    vit = trained()
    observe(vit)
    loss = vit.train()(OTHER).square().mean()
    loss.backward()
    assert vit.calibration.layers["0"].low_rank.up.grad.any()
    assert vit.calibration.num_batches == 5
