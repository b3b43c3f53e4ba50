"""Running means: their equation, what is not finite, and linear mixtures of models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from helpers import forget, randomise
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.utils import ModelEmaV2, ModelEmaV3
from tiny import tiny_vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from mgfc import CoarseCalib, FineConfig, MediumCalib, MGFCConfig, wrap_backbone
from mgfc.calibrators.running import RunningMean, as_one_batch

NAN, INF = float("nan"), float("inf")


# The equation


@pytest.mark.parametrize("batch", [1, 3])
def test_a_running_mean_is_plain_at_first_and_exponential_later(batch: int) -> None:
    mean, values = RunningMean(3, window=12).double(), torch.randn(20, batch, 3, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for index, images in enumerate(values):
        torch.testing.assert_close(mean.value, expected)
        assert mean.ready == min(index, 1) and mean.count == index
        mean.observe(images)
        share = max(1 / (index + 1), batch / 12)
        expected = expected + share * (sum(images) / batch - expected)
    torch.testing.assert_close(mean.value, expected)
    mean.eval().observe(values[0])
    torch.testing.assert_close(mean.value, expected)
    assert mean.count == 20


def test_a_batch_of_a_whole_window_is_all_that_counts() -> None:
    mean, images = RunningMean(3, window=4), torch.randn(9, 3)
    for _ in range(2):
        mean.observe(torch.randn(2, 3))
    mean.observe(images)
    torch.testing.assert_close(mean.value, images.mean(dim=0))


def test_the_default_window() -> None:
    assert RunningMean(3).window == 200


def test_set_makes_a_tensor_the_mean() -> None:
    mean, value = RunningMean(2, 3), torch.randn(2, 3)
    mean.observe(torch.randn(4, 2, 3))
    mean.set(value, 7)
    assert torch.equal(mean.value, value) and mean.ready == 1 and mean.count == 7


def test_observing_forgets_and_gathers_in_eval_mode_until_it_stops() -> None:
    mean, images = RunningMean(3), torch.randn(4, 3)
    mean.observe(torch.randn(2, 3))
    assert mean.observed == 0
    mean.eval().start_observing()
    assert mean.ready == 0 and mean.count == 0
    mean.observe(images)
    mean.stop_observing()
    mean.observe(torch.randn(2, 3))
    torch.testing.assert_close(mean.value, images.mean(dim=0))
    assert mean.observed == 1 and mean.count == 1
    mean.train().observe(torch.randn(2, 3))
    assert mean.observed == 0, "training moves them on"
    mean.start_observing()
    mean.stop_observing()
    assert mean.observed == 0, "nothing came"


# What is not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_image_that_is_not_finite_is_left_out(bad: float) -> None:
    found, expected, images = RunningMean(2, 3, window=8), RunningMean(2, 3, window=8), torch.randn(6, 4, 2, 3)
    for index, batch in enumerate(images):
        spoilt = batch.clone()
        spoilt[index % 4, 1, 2] = bad
        found.observe(spoilt)
        expected.observe(torch.cat([batch[: index % 4], batch[index % 4 + 1 :]]))
    assert found.value.isfinite().all()
    torch.testing.assert_close(found.value, expected.value)
    assert found.count == expected.count == 6


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_batch_without_a_finite_image_changes_nothing(bad: float) -> None:
    mean, images = RunningMean(3), torch.full((4, 3), bad)
    mean.observe(images)
    assert mean.ready == 0 and mean.count == 0 and (mean.value == 0).all()
    mean.observe(torch.ones(2, 3))
    before = {name: value.clone() for name, value in mean.named_buffers()}
    mean.observe(images)
    assert all(torch.equal(value, before[name]) for name, value in mean.named_buffers())
    assert (mean.value == 1).all()


def test_one_by_one_too() -> None:
    found, expected, images = RunningMean(3), RunningMean(3), torch.randn(4, 3)
    for mean in (found, expected):
        mean.observe(torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))
    spoilt = torch.cat([images[:2], torch.full((1, 3), NAN), images[2:]])
    with as_one_batch(found):
        for image in spoilt:
            found.observe(image[None])
    expected.observe(images)
    torch.testing.assert_close(found.value, expected.value)


@pytest.mark.parametrize("bad", [NAN, INF, 1e30], ids=["nan", "inf", "squares beyond float32"])
def test_scenes_that_are_not_finite(bad: float) -> None:
    found, expected = CoarseCalib(3).train(), CoarseCalib(3).train()
    for _ in range(3):
        batch = torch.randn(4, 3, 8, 9) + 1
        expected(batch[1:])
        spoilt = batch.clone()
        spoilt[0, 1, 2, 3] = bad
        found(spoilt)
    assert torch.equal(found.source.value, expected.source.value) and found.source.count == 3
    found(torch.full((2, 3, 8, 9), bad))
    assert torch.equal(found.source.value, expected.source.value) and found.source.count == 3


@pytest.mark.parametrize("bad", [NAN, INF, 1e30], ids=["nan", "inf", "squares beyond float32"])
def test_tokens_that_are_not_finite(bad: float) -> None:
    found, expected = MediumCalib(12, 5).train(), MediumCalib(12, 5).train()
    first = torch.randn(4, 20, 12)
    for module in (found, expected):
        module(first)
    for _ in range(3):
        batch = torch.randn(4, 20, 12)
        expected(batch[1:])
        spoilt = batch.clone()
        spoilt[0, 3, 2] = bad
        found(spoilt)
    torch.testing.assert_close(found.source.value, expected.source.value)
    fresh = MediumCalib(12, 5).train()
    spoilt = first.clone()
    spoilt[1] = bad
    fresh(spoilt)  # no start with such an image in it
    fresh(first)
    assert all(buffer.isfinite().all() for buffer in fresh.buffers()) and fresh.source.ready
    assert fresh.eval()(first).isfinite().all()


@pytest.mark.parametrize("observing", [False, True], ids=["training", "observing"])
def test_a_damaged_image_in_a_batch_spoils_no_statistics_of_a_model(observing: bool) -> None:
    model = wrap_backbone(tiny_vit(), MGFCConfig(rank=4))
    twin, images = copy.deepcopy(model), torch.randn(4, 3, 64, 64)
    spoilt = torch.cat([images, torch.full((1, 3, 64, 64), NAN), images[:1]])
    spoilt[-1, 0, 5, 5] = INF
    for vit, batches in ((model, [images, spoilt, spoilt[4:]]), (twin, [images, images])):
        if observing:
            with vit.calibration.observing():
                for batch in batches:
                    vit(batch)
        else:
            vit.train()
            for batch in batches:
                vit(batch)
    for one, other in zip(model.calibration.adapter.statistics, twin.calibration.adapter.statistics, strict=True):
        assert one.ready and one.value.isfinite().all()
        torch.testing.assert_close(one.value, other.value, rtol=1e-4, atol=1e-5)
    assert model.eval()(images).isfinite().all()


def test_activations_that_overflow_in_one_block() -> None:
    """As in half precision, where one image's tokens may leave its range."""
    model = wrap_backbone(tiny_vit(), MGFCConfig(rank=4)).train()

    def overflow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 5:] = INF
        return output

    model.blocks[1].register_forward_hook(overflow, prepend=True)
    for _ in range(3):
        model(torch.randn(4, 3, 64, 64))
    assert all(mean.value.isfinite().all() for mean in model.calibration.adapter.statistics)
    assert model.calibration.layers["0"].medium.source.ready


# Linear mixtures


def ema_v2(average: Any, model: nn.Module) -> Any:
    if average is None:
        return ModelEmaV2(model, decay=0.75)
    average.update(model)
    return average


def ema_v3(average: Any, model: nn.Module) -> Any:
    if average is None:
        return ModelEmaV3(model, decay=0.75)
    average.update(model)
    return average


def averaged(**options: Any) -> Callable[[Any, nn.Module], Any]:
    def update(average: Any, model: nn.Module) -> Any:
        average = AveragedModel(model, use_buffers=True, **options) if average is None else average
        average.update_parameters(model)  # the first time it copies
        return average

    return update


MIXTURES = {
    "timm ModelEmaV2": (ema_v2, 0.75),
    "timm ModelEmaV3": (ema_v3, 0.75),
    "AveragedModel": (averaged(), 0.5),
    "AveragedModel, exponential": (averaged(multi_avg_fn=get_ema_multi_avg_fn(0.75)), 0.75),
}


def with_statistics(ready: bool, seed: int) -> nn.Module:
    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4, fine=FineConfig()))
    torch.manual_seed(seed)
    randomise(vit.calibration)
    if not ready:
        forget(vit.calibration)
    return vit


def expected_statistics(first: nn.Module, second: nn.Module, share: float) -> list[Tensor]:
    """Weighted means over those of the two that have any."""
    found = []
    pairs = zip(first.calibration.adapter.statistics, second.calibration.adapter.statistics, strict=True)
    for one, other in pairs:
        weights = share * bool(one.ready), (1 - share) * bool(other.ready)
        found.append((weights[0] * one.value + weights[1] * other.value) / (sum(weights) or 1))
    return found


HALVES = [(True, True), (False, True), (True, False), (False, False)]


@pytest.mark.parametrize(("mix", "share"), MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize(("first", "second"), HALVES, ids=["both", "second alone", "first alone", "none"])
@torch.no_grad()
def test_statistics_of_an_average_are_the_weighted_mean(mix: Any, share: float, first: bool, second: bool) -> None:
    one, other = with_statistics(first, 1), with_statistics(second, 2)
    expected = expected_statistics(one, other, share)
    average = mix(mix(None, one), other).module.eval()
    for mean, value in zip(average.calibration.adapter.statistics, expected, strict=True):
        torch.testing.assert_close(mean.value, value, rtol=1e-5, atol=1e-6)
        assert mean.ready == (first or second)
    images = 2 * torch.randn(2, 3, 64, 96) + 1
    coarse = average.calibration.adapter.coarse
    assert torch.equal(coarse(images), images) != (first or second)


@pytest.mark.parametrize(("first", "second"), HALVES, ids=["both", "second alone", "first alone", "none"])
def test_statistics_of_merged_adapters_are_the_weighted_mean(first: bool, second: bool) -> None:
    vit, other = with_statistics(first, 1), with_statistics(second, 2)
    expected = expected_statistics(vit, other, 0.75)
    vit.calibration.add_adapter("other", MGFCConfig(rank=4, fine=FineConfig()))
    vit.calibration.adapters["other"].load_state_dict(other.calibration.adapter.state_dict())
    vit.calibration.merge_adapters(["default", "other"], [3, 1], name="both")
    for mean, value in zip(vit.calibration.adapters["both"].statistics, expected, strict=True):
        torch.testing.assert_close(mean.value, value, rtol=1e-5, atol=1e-6)
        assert mean.ready == (first or second)


@pytest.mark.parametrize("make", [ModelEmaV2, ModelEmaV3])
def test_an_average_along_a_training_run(make: Any) -> None:
    """It starts empty, and weighs what the run's statistics were after each step."""
    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4)).train()
    average, history = make(vit, decay=0.9), []
    for _ in range(4):
        vit(torch.randn(2, 3, 64, 64))
        average.update(vit)
        history.append([mean.value.clone() for mean in vit.calibration.adapter.statistics])
    weights = [0.9 ** (3 - step) for step in range(4)]
    found = average.module.calibration.adapter.statistics
    for mean, values in zip(found, zip(*history, strict=True), strict=True):
        expected = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
        torch.testing.assert_close(mean.value, expected, rtol=1e-4, atol=1e-5)


def test_an_average_trains_on() -> None:
    one, other = RunningMean(3), RunningMean(3)
    other.observe(torch.randn(2, 3))
    with torch.no_grad():
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            a.lerp_(b, 0.25)
    before, images = other.value, torch.randn(2, 3)
    torch.testing.assert_close(one.value, before)
    one.observe(images)
    share = ((one.value - before) / (images.mean(dim=0) - before)).mean()
    torch.testing.assert_close(one.value, before + share * (images.mean(dim=0) - before))
    assert 0 < share <= 1


class Segmenter(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4)).train()
        self.head = nn.Linear(32, 5)
        self.history: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.head(self.vit(batch[0])), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.history.append([mean.value.clone() for mean in self.vit.calibration.adapter.statistics])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def test_lightnings_average(tmp_path: Path) -> None:
    module = Segmenter()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[EMAWeightAveraging(decay=0.5)],
        **options,
    )
    data = TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(0, 5, (8,)))
    trainer.fit(module, DataLoader(data, 2))
    assert len(module.history) == 4
    for mean, values in zip(module.vit.calibration.adapter.statistics, zip(*module.history, strict=True), strict=True):
        expected = values[0]
        for value in values[1:]:
            expected = 0.5 * expected + 0.5 * value
        torch.testing.assert_close(mean.value, expected, rtol=1e-4, atol=1e-5)
        assert mean.ready and not torch.allclose(mean.value, values[-1], atol=1e-4)


def test_what_inference_mode_derived_serves_training_too() -> None:
    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4))
    with vit.calibration.observing():
        vit(torch.randn(4, 3, 64, 64))
    images = 3 * torch.randn(2, 3, 64, 64) + 2
    with torch.inference_mode():
        expected = vit(images)
    found = vit(images)
    found.sum().backward()
    torch.testing.assert_close(found, expected.clone())


def test_without_a_weight_there_is_no_mean_whatever_the_sum() -> None:
    mean = RunningMean(3)
    mean.set(torch.ones(3))
    assert torch.equal(mean.derive(torch.clone), torch.ones(3))
    mean.weight.zero_()
    assert not mean.value.any() and not mean.derive(torch.clone).any()
