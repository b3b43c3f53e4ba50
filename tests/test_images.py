"""Images on their way into a backbone: windows of a scene, how far images lie from the source, and the hook itself."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise, same
from PIL import Image
from tiny import tiny_dinov2, tiny_vit
from torch import Tensor, nn

from mgfc import CalibrationError, MediumConfig, MGFCConfig, wrap_backbone

SCENE = 2 * torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5)) + 1
SCENE[..., 48:] += 3  # so that windows of it differ
LEFT, RIGHT = (..., slice(0, 48), slice(0, 64)), (..., slice(16, 64), slice(32, 96))


@pytest.fixture
def vit() -> nn.Module:
    model = wrap_backbone(tiny_vit(), MGFCConfig(rank=8))
    randomise(model.calibration)
    return model


@contextmanager
def entering(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the patch embedding is given."""
    found: list[Tensor] = []
    handle = model.patch_embed.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    yield found
    handle.remove()


def entered(model: nn.Module, images: Tensor) -> Tensor:
    with entering(model) as found, torch.no_grad():
        model(images)
    return found[0]


# Scenes


def test_windows_of_a_scene_are_calibrated_as_in_the_whole_image(vit: nn.Module) -> None:
    whole = entered(vit, SCENE)
    assert not torch.allclose(whole, SCENE, atol=0.1)
    for window in (LEFT, RIGHT):
        with vit.calibration.scene(SCENE):
            found = entered(vit, SCENE[window])
        assert torch.equal(found, whole[window])
        assert not torch.allclose(entered(vit, SCENE[window]), found, atol=0.1), "a window alone is another scene"


def test_flips_and_batches_of_windows(vit: nn.Module) -> None:
    whole = entered(vit, SCENE)
    windows = torch.cat([SCENE[LEFT], SCENE[RIGHT], SCENE[LEFT].flip(3)])
    with vit.calibration.scene(SCENE):
        found = entered(vit, windows)
        assert torch.equal(entered(vit, SCENE), whole)
    assert torch.equal(found, torch.cat([whole[LEFT], whole[RIGHT], whole[LEFT].flip(3)]))


def test_scales_of_a_scene_move_as_it_does(vit: nn.Module) -> None:
    """Every pixel value becomes the same value, whatever its image is resized to."""
    whole, half = entered(vit, SCENE), SCENE[..., ::2, ::2]
    with vit.calibration.scene(SCENE):
        assert torch.equal(entered(vit, half), whole[..., ::2, ::2])


def test_a_batch_of_scenes_and_their_windows(vit: nn.Module) -> None:
    scenes = torch.cat([SCENE, 3 - SCENE])
    whole = entered(vit, scenes)
    with vit.calibration.scene(scenes):
        assert torch.equal(entered(vit, scenes[LEFT]), whole[LEFT])


@pytest.mark.parametrize("number", [1, 3, 4])
def test_another_number_of_images_than_of_scenes_is_named(vit: nn.Module, number: int) -> None:
    scenes, windows = torch.cat([SCENE, 3 - SCENE]), SCENE[LEFT].expand(number, -1, -1, -1)
    message = rf"scene: expected one image, or one for each of the {number} images of a forward, found 2\."
    with vit.calibration.scene(scenes), pytest.raises(CalibrationError, match=message):
        vit(windows)
    assert torch.equal(entered(vit, SCENE[LEFT]), entered(vit, windows)[:1])


@pytest.mark.parametrize(
    "images", [SCENE[0], SCENE[:, :1], SCENE.flatten(2), torch.zeros(0, 3, 8, 8), SCENE.repeat(1, 2, 1, 1), None], ids=str
)
def test_what_is_no_batch_of_images_is_named(vit: nn.Module, images: Any) -> None:
    before = entered(vit, SCENE)
    with pytest.raises(CalibrationError, match=r"scene: expected images \(B, 3, H, W\), found "), vit.calibration.scene(images):
        pass
    assert torch.equal(entered(vit, SCENE), before)


def test_scenes_end_and_nest(vit: nn.Module) -> None:
    other = 5 - 2 * SCENE
    alone = entered(vit, SCENE[LEFT])
    with vit.calibration.scene(SCENE):
        outer = entered(vit, SCENE[LEFT])
        with vit.calibration.scene(other):
            inner = entered(vit, SCENE[LEFT])
        assert torch.equal(entered(vit, SCENE[LEFT]), outer)
    assert torch.equal(entered(vit, SCENE[LEFT]), alone)
    with pytest.raises(KeyError), vit.calibration.scene(SCENE):
        raise KeyError
    assert torch.equal(entered(vit, SCENE[LEFT]), alone)
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in ((outer, inner), (outer, alone), (inner, alone)))


def test_a_scene_belongs_to_its_thread(vit: nn.Module) -> None:
    alone, found = entered(vit, SCENE[LEFT]), []
    with vit.calibration.scene(SCENE):
        thread = threading.Thread(target=lambda: found.append(entered(vit, SCENE[LEFT])))
        thread.start()
        thread.join()
    assert torch.equal(found[0], alone)


def test_a_scene_belongs_to_its_model(vit: nn.Module) -> None:
    alone = entered(vit, SCENE[LEFT])
    with vit.calibration.scene(SCENE):
        inside = entered(vit, SCENE[LEFT])
        for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
            assert torch.equal(entered(twin, SCENE[LEFT]), alone)
        assert torch.equal(entered(vit, SCENE[LEFT]), inside)


def test_a_scene_without_a_coarse_stage_changes_nothing() -> None:
    model = wrap_backbone(tiny_vit(), MGFCConfig(rank=8, coarse=None))
    randomise(model.calibration)
    with torch.no_grad():
        expected = model(SCENE)
        with model.calibration.scene(SCENE):
            assert torch.equal(model(SCENE), expected)


def test_a_scene_leaves_training_and_other_resolutions_alone(vit: nn.Module) -> None:
    twin = copy.deepcopy(vit).train()
    with vit.calibration.scene(SCENE):
        vit.train()(SCENE[LEFT])
    twin(SCENE[LEFT])
    first, second = (model.calibration.adapter.coarse.source.value for model in (vit, twin))
    assert torch.equal(first, second)


def test_windows_at_a_transformers_model() -> None:
    model = wrap_backbone(tiny_dinov2(), MGFCConfig(rank=8))
    randomise(model.calibration)
    seen: list[Tensor] = []
    model.embeddings.patch_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = SCENE[..., :56, :84]
    with torch.no_grad(), model.calibration.scene(image):
        model(pixel_values=image)
        model(pixel_values=image[..., :28, 14:56])
    assert torch.equal(seen[1], seen[0][..., :28, 14:56])
    assert not torch.allclose(seen[0], image, atol=0.1)


# Distances


@pytest.fixture
def town(shared: Callable[[str], Path]) -> Callable[[str, int], Iterator[Tensor]]:
    """Small images of a split, in [0, 1], one at a time."""
    root = shared("data/synth_town")

    def images(split: str, number: int) -> Iterator[Tensor]:
        for name in (root / "splits" / f"{split}.txt").read_text().split()[:number]:
            image = Image.open(root / "images" / f"{name}.jpg").resize((128, 96))
            yield torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255

    return images


@torch.no_grad()
def test_distance_grows_from_clean_images_over_fog_to_night(town: Callable[[str, int], Iterator[Tensor]]) -> None:
    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=None, medium=None))
    with vit.calibration.observing():
        for image in town("train", 60):
            vit((image - 0.45) / 0.225)
    images = torch.cat(list(town("val", 20)))
    distances = []
    for seen in (images, 0.5 * images + 0.45, 0.15 * images):
        vit((seen - 0.45) / 0.225)
        found = vit.calibration.distance()
        assert found.shape == (20,) and (found >= 0).all()
        distances.append(found)
    clean, fog, night = distances
    assert 0.5 < clean.mean() < 2, "about 1 for images like the source's"
    assert (fog > 5 * clean).float().mean() > 0.5 and fog.mean() > 5
    assert (clean < fog).all() and (fog < night).all()


def test_distance_is_z(vit: nn.Module) -> None:
    coarse = vit.calibration.adapter.coarse
    images = torch.cat([SCENE, 3 - SCENE]).double()
    vit.double()(images)
    expected, square = coarse.source.value
    for image, found in zip(images, vit.calibration.distance(), strict=True):
        mean, deviation = image.mean(dim=(1, 2)), (image.var(dim=(1, 2), correction=0) + 1e-6).sqrt()
        away = torch.stack([mean, deviation.log()]) - expected
        torch.testing.assert_close(found, (away**2 / (square - expected**2)).mean(), rtol=1e-9, atol=0)


def test_distance_of_windows_is_that_of_their_scene(vit: nn.Module) -> None:
    vit(SCENE)
    whole = vit.calibration.distance()
    vit(SCENE[LEFT])
    assert not torch.allclose(vit.calibration.distance(), whole)
    with vit.calibration.scene(SCENE):
        vit(SCENE[LEFT])
    assert torch.equal(vit.calibration.distance(), whole)


def test_distance_needs_a_forward_in_evaluation_in_this_thread(vit: nn.Module) -> None:
    message = "distance: expected a forward in evaluation with a coarse stage before, found none in this thread"
    with pytest.raises(CalibrationError, match=message):
        vit.calibration.distance()
    vit.train()(SCENE)
    with pytest.raises(CalibrationError, match=message):
        vit.calibration.distance()
    thread = threading.Thread(target=vit.eval(), args=(SCENE,))
    thread.start()
    thread.join()
    with pytest.raises(CalibrationError, match=message):
        vit.calibration.distance()
    vit(SCENE)
    assert vit.calibration.distance().shape == (1,)
    with pytest.raises(CalibrationError, match=message):
        copy.deepcopy(vit).calibration.distance()
    without = wrap_backbone(tiny_vit(), MGFCConfig(rank=8, coarse=None))
    without(SCENE)
    with pytest.raises(CalibrationError, match=message):
        without.calibration.distance()


def test_distance_holds_no_graph(vit: nn.Module) -> None:
    images = SCENE.clone().requires_grad_()
    vit(images)
    assert not vit.calibration.distance().requires_grad


# The hook


def test_disabled_and_other_adapters(vit: nn.Module) -> None:
    calibrated = entered(vit, SCENE)
    with vit.calibration.disabled():
        assert torch.equal(entered(vit, SCENE), SCENE)
    vit.calibration.add_adapter("fresh", MGFCConfig(rank=8))
    with vit.calibration.using("fresh"):
        assert torch.equal(entered(vit, SCENE), SCENE)
    assert torch.equal(entered(vit, SCENE), calibrated)


def test_images_of_the_caller_stay_as_they_are(vit: nn.Module) -> None:
    images = SCENE.clone()
    vit(images)
    assert torch.equal(images, SCENE)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_images_of_any_number_of_channels(channels: int) -> None:
    vit = wrap_backbone(tiny_vit(in_chans=channels), MGFCConfig(rank=None))
    assert vit.calibration.adapter.coarse.source.value.shape == (2, 2, channels)
    randomise(vit.calibration)
    images = 2 * torch.randn(2, channels, 64, 96) + 1
    assert torch.equal(entered(vit, images), vit.calibration.adapter.coarse(images))
    assert not torch.equal(entered(vit, images), images)


def test_training_sees_randomised_images_and_gathers_the_statistics_of_plain_ones() -> None:
    from mgfc import CoarseConfig

    vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=8, coarse=CoarseConfig(randomise=1.0))).train()
    given = entered(vit, SCENE)
    assert not torch.equal(given, SCENE)
    coarse = vit.calibration.adapter.coarse
    torch.testing.assert_close(coarse.source.value[:1, 0], coarse.statistics(SCENE)[:, 0])
    assert torch.equal(entered(vit.eval(), SCENE[LEFT]), coarse(SCENE[LEFT]))


def test_gradients_of_images_pass_the_coarse_stage(vit: nn.Module) -> None:
    images = SCENE.clone().requires_grad_()
    vit(images).square().mean().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_check_warns_of_a_model_whose_images_pass_by(vit: nn.Module) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, tokens: Tensor) -> Tensor:
            for block in self.vit.blocks:
                tokens = block(tokens)
            return tokens

    with pytest.warns(UserWarning, match=r"coarse stage saw no images of shape \(B, C, H, W\)"):
        vit.calibration.check(torch.randn(1, 24, 32), model=Host())


def test_compile_and_export_with_a_scene(vit: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(vit, backend="eager")
    with torch.no_grad():
        expected = vit(SCENE)
        assert torch.equal(compiled(SCENE), expected)
        with vit.calibration.scene(SCENE):
            window = vit(SCENE[LEFT])
            torch.testing.assert_close(compiled(SCENE[LEFT]), window)
        alone = vit(SCENE[LEFT])
        torch.testing.assert_close(compiled(SCENE[LEFT]), alone)
        assert not torch.allclose(alone, window, atol=1e-2)
    torch._dynamo.reset()


def test_the_stage_is_in_state_dicts_and_copies(vit: nn.Module) -> None:
    twin = wrap_backbone(tiny_vit(), MGFCConfig(rank=8, medium=MediumConfig()))
    twin.load_state_dict(vit.state_dict())
    assert "calibration.adapter_default.coarse.source.total" in vit.state_dict()
    with torch.no_grad():
        assert same(twin(SCENE), vit(SCENE)) and same(copy.deepcopy(vit)(SCENE), vit(SCENE))


def test_training_and_disabled_forwards_leave_no_distance(vit: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    vit(images)
    assert vit.calibration.distance().shape == (2,)
    with vit.calibration.disabled():
        vit(images)
    with pytest.raises(CalibrationError, match="expected a forward in evaluation"):
        vit.calibration.distance()
