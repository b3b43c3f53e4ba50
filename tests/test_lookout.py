"""Code bases that freeze their backbone: the one early warning, with its cause and the line to change."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from tiny import tiny_vit
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from mgfc import CoarseConfig, MGFCConfig, get_calibration, wrap_backbone
from mgfc.cli import main

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    """A segmenter in which something freezes the backbone."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.backbone = wrap_backbone(tiny_vit(), MGFCConfig(rank=4, **config))
        self.head = nn.Linear(32, 5)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone.forward_features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class SetTrain(Host):
    """Rein's way: all but what has its own name in it is frozen at every call of train()."""

    def train(self, mode: bool = True) -> Host:
        super().train(mode)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_("reins" in name)
        return self


class FrozenEncoder(Host):
    """mmsegmentation's way: the encoder is in eval mode whatever the model is in."""

    def train(self, mode: bool = True) -> Host:
        super().train(mode)
        self.backbone.eval()
        return self


class FrozenForGood(Host):
    """DINOv3's way: eval mode and requires_grad_(False), once, when the decoder is built."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Host:
        super().train(mode)
        self.backbone.eval()
        return self


class NoGrad(Host):
    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(images)


class Inference(Host):
    def features(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            tokens = super().features(images)
        return tokens.clone()


class RunsParts(Host):
    """The original EoMT's way."""

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.patch_embed(images).flatten(1, 2)
        for block in self.backbone.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return x


class SkipsBlocks(Host):
    def features(self, images: Tensor) -> Tensor:
        return self.backbone.patch_embed(images).flatten(1, 2)


def train(model: Host, steps: int = 3) -> list[str]:
    """What warnings say in some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model.train()
            model(IMAGES).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(item.message) for item in caught]


@pytest.mark.parametrize(
    ("host", "cause", "line", "steps"),
    [
        (SetTrain, "The calibrators are frozen", "calibration.set_adapter(calibration.active_adapter)", 1),
        (FrozenForGood, "The calibrators are frozen", "calibration.set_adapter(calibration.active_adapter)", 1),
        (FrozenEncoder, "trained in eval mode, so that the statistics of the source stay empty", "calibration.train()", 2),
        (NoGrad, "without gradients (torch.no_grad or inference_mode)", "Call the backbone outside of it", 2),
        (Inference, "without gradients (torch.no_grad or inference_mode)", "Call the backbone outside of it", 2),
        (
            RunsParts,
            "low-rank adapters have an effect, but the stages behind a block none",
            "calibration.check(images, model=",
            3,
        ),
        (
            SkipsBlocks,
            "none of the calibrated blocks, so that calibrators have no effect",
            "calibration.check(images, model=",
            3,
        ),
    ],
)
def test_each_way_of_freezing_is_said_once_and_early(host: type[Host], cause: str, line: str, steps: int) -> None:
    if steps > 1:
        assert train(host(), steps - 1) == []
    model = host()
    (message,) = train(model, steps)
    assert cause in message and line in message and "freeze their backbone" in message
    assert train(model, 3) == []


def test_what_trains_is_not_talked_about() -> None:
    assert train(Host()) == []
    assert train(Host(coarse=CoarseConfig(), medium=None)) == []


def test_what_is_meant_is_not_talked_about() -> None:
    """A fresh or loaded model in evaluation, a teacher, a part of a forward, gradients that are accumulated."""
    model = Host()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                model.eval()(IMAGES)
                model(IMAGES)
                model.backbone.patch_embed(IMAGES)
                model(IMAGES)
        randomise(model.backbone.calibration)
        model.requires_grad_(False)
        with torch.no_grad():  # a teacher in training mode
            model.train()(IMAGES)
            model(IMAGES)


def test_probing_the_head_first_is_not_talked_about() -> None:
    """Each way that the warnings name, for calibrators that are trained later."""
    model = Host()
    calibration = model.backbone.calibration
    calibration.enabled = False
    calibration.requires_grad_(False)
    assert train(model) == []
    calibration.enabled = True
    calibration.set_adapter("default")
    assert train(model) == []

    class Probed(Host):
        def train(self, mode: bool = True) -> Host:
            super().train(mode)
            self.backbone.calibration.eval()
            return self

    trained = Probed()
    trained.load_state_dict(model.state_dict())
    trained.backbone.requires_grad_(False)
    assert train(trained) == []


def test_a_frozen_fresh_model_without_gradients_is_not_talked_about() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model = Host().requires_grad_(False).eval()
        model(IMAGES)
        model(IMAGES)


def test_empty_statistics_are_told_once_where_validation_follows_training() -> None:
    model = FrozenEncoder()
    (message,) = train(model)
    assert "trained in eval mode" in message
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model.eval()(IMAGES)


def test_passes_over_the_data_after_training_are_fine() -> None:
    """As `torch.optim.swa_utils.update_bn` makes them: in training mode, without gradients, one after another."""
    model = Host()
    model.head = nn.Sequential(model.head, nn.BatchNorm1d(25))
    assert train(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_bn([IMAGES] * 3, model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pytree")
def test_compiled_blocks_are_reached() -> None:
    """Also by a thread of its own, whose forwards are told apart."""
    model = Host()
    for block in model.backbone.blocks:
        block.compile(backend="eager")
    assert train(model) == []
    found: list[Any] = []

    def run() -> None:
        model(IMAGES)
        found.append(model.backbone.calibration.active.reached)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0].left and found[0].adapted


def test_a_forward_that_ends_early_is_fine() -> None:
    """The patch embedding alone, as hosts count tokens, and an error that is handled, as where memory runs out."""
    model = Host().train()
    with torch.no_grad():
        model.backbone.patch_embed(IMAGES)
    assert train(model) == []

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.backbone.blocks[0].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(IMAGES)
    handle.remove()
    assert train(model) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transformed_functions_are_left_alone() -> None:
    """`torch.func` hands in tensors whose values cannot be looked at."""
    models = [tiny_vit(seed) for seed in (0, 1)]
    for model in models:
        randomise(wrap_backbone(model, MGFCConfig(rank=4)).calibration)
    parameters, buffers = torch.func.stack_module_state(models)

    def run(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (IMAGES,))

    found = torch.func.vmap(run)(parameters, buffers)
    for output, model in zip(found, models, strict=True):
        torch.testing.assert_close(output, model(IMAGES), rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_of_a_whole_backbone_is_fine() -> None:
    class Checkpointed(Host):
        def features(self, images: Tensor) -> Tensor:
            return checkpoint(super().features, images.requires_grad_(), use_reentrant=True)

    assert train(Checkpointed()) == []


@contextmanager
def told() -> Iterator[Callable[[], str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: " ".join(str(item.message) for item in caught)


def test_saves_and_summaries_tell_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Host()
    calibration = get_calibration(model)
    with told() as messages:
        calibration.save_pretrained(tmp_path)
    assert "as they were made, without an effect: nothing trained them" in messages()
    assert "statistics of no batch yet: coarse and medium calibration have no effect" in calibration.summary()
    assert main(["info", str(tmp_path)]) == 0
    assert "statistics of no batch yet: coarse and medium calibration have no effect" in capsys.readouterr().out
    train(FrozenEncoder())
    eval_only = FrozenEncoder()
    train(eval_only)
    with told() as messages:
        eval_only.backbone.calibration.save_pretrained(tmp_path)
    assert "statistics have seen no batch" in messages()
    train(model)
    with told() as messages:
        calibration.save_pretrained(tmp_path)
    assert messages() == ""
    assert "statistics of 3 batches" in calibration.summary() and "frozen" not in calibration.summary()
    assert main(["info", str(tmp_path)]) == 0
    assert "statistics of 3 batches" in capsys.readouterr().out
    model.backbone.requires_grad_(False)
    assert "The parameters are frozen" in calibration.summary()
