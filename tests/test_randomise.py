"""Randomised scenes: which images change, in which range, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mgfc import CoarseCalib, CoarseConfig, MGFCConfig
from mgfc.calibrators.randomise import randomise_scenes


def scenes(batch: int = 4, channels: int = 3, size: tuple[int, int] = (16, 24)) -> Tensor:
    """Smooth enough that blur and noise can be told."""
    return F.interpolate(torch.randn(batch, channels, 4, 6), size, mode="bilinear") * 2 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 16, 24), (1, 1, 5, 5), (2, 4, 1, 9), (3, 12, 14, 14)], ids=str)
def test_shape_dtype_and_range_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = (torch.randn(shape) * 3 + 2).to(dtype)
    low, high = given.amin(dim=(2, 3), keepdim=True), given.amax(dim=(2, 3), keepdim=True)
    for _ in range(5):
        found = randomise_scenes(given, 1.0)
        assert found.shape == given.shape and found.dtype == dtype and found.isfinite().all()
        slack = 1e-2 * (high - low) if dtype in (torch.float16, torch.bfloat16) else 1e-5 * (high - low) + 1e-5
        assert ((found >= low - slack) & (found <= high + slack)).all()


def test_a_share_of_none_and_of_all() -> None:
    given = scenes(16)
    assert torch.equal(randomise_scenes(given, 0.0), given)
    assert all(not torch.equal(a, b) for a, b in zip(randomise_scenes(given, 1.0), given, strict=True))


def test_a_share_of_some_leaves_the_others_to_the_bit() -> None:
    given = scenes(1).expand(400, -1, -1, -1)
    changed = (randomise_scenes(given, 0.3) != given).flatten(1).any(dim=1)
    assert 0.2 < changed.float().mean() < 0.4


def test_images_of_a_batch_differ_in_what_happens_to_them() -> None:
    given = scenes(1).expand(8, -1, -1, -1)
    found = randomise_scenes(given, 1.0)
    assert all(not torch.allclose(found[0], other, atol=1e-2) for other in found[1:])


def test_images_do_not_mix() -> None:
    """What happens to an image depends on the random numbers and on itself."""
    given = scenes(2)
    torch.manual_seed(3)
    first = randomise_scenes(given, 1.0)[0]
    given[1] = 7 * given[1] - 3
    torch.manual_seed(3)
    assert torch.equal(randomise_scenes(given, 1.0)[0], first)


def test_a_seed_settles_everything() -> None:
    given, found = scenes(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(randomise_scenes(given, 0.7))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_autocast_does_not_round_images() -> None:
    given, found = scenes(32), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(randomise_scenes(given, 1.0))
    assert torch.equal(*found)


def test_light_colour_sharpness_and_noise_all_change() -> None:
    given = scenes(1, size=(32, 48)).expand(300, -1, -1, -1)
    found = randomise_scenes(given, 1.0)
    moved = found.mean(dim=(2, 3)) - given.mean(dim=(2, 3))
    spread = moved.std(dim=0).mean()
    assert spread > 0.1, "light"
    assert (moved - moved.mean(dim=1, keepdim=True)).std() > 0.2 * spread, "colour"
    assert ((found.std(dim=(2, 3)) / given.std(dim=(2, 3))).log().std(dim=0) > 0.1).all(), "contrast"
    fine = (found[..., 1:] - found[..., :-1]).square().mean(dim=(1, 2, 3)) / found.var(dim=(1, 2, 3))
    usual = (given[..., 1:] - given[..., :-1]).square().mean() / given[0].var()
    assert (fine > 2 * usual).float().mean() > 0.2, "noise"
    assert (fine < 0.9 * usual).float().mean() > 0.1, "blur"


def test_constant_images_and_padding() -> None:
    assert torch.allclose(randomise_scenes(torch.full((8, 3, 9, 9), 4.0), 1.0), torch.tensor(4.0), atol=1e-4)


# In the coarse stage


def test_the_stage_randomises_in_training_alone() -> None:
    module, given = CoarseCalib(3, randomise=1.0), scenes()
    assert not torch.equal(module.train()(given), given)
    plain = CoarseCalib(3).train()
    assert torch.equal(plain(given), given)
    assert torch.equal(module.source.value, plain.source.value), "the statistics are those of the images as they come"
    evaluated = module.eval()(given)
    assert torch.equal(evaluated, module(given)) and torch.equal(evaluated, plain.eval()(given))
    module.source.observing = True
    assert torch.equal(module(given), given)


def test_the_stage_draws_no_random_numbers_where_it_randomises_nothing() -> None:
    state = torch.get_rng_state()
    CoarseCalib(3).train()(scenes_at(0))
    CoarseCalib(3, randomise=1.0).eval()(scenes_at(0))
    assert torch.equal(torch.get_rng_state(), state)


def scenes_at(value: float) -> Tensor:
    return torch.full((2, 3, 8, 8), value).cumsum(dim=2)


def test_padding_stays_zero() -> None:
    module, given = CoarseCalib(3, randomise=1.0).train(), scenes() + 10
    given[:, :, 12:], given[:, :, :, :3] = 0, 0
    for _ in range(5):
        found = module(given)
        assert (found[:, :, 12:] == 0).all() and (found[..., :3] == 0).all()
        assert (found[:, :, :12, 3:] != given[:, :, :12, 3:]).any(dim=1).float().mean() > 0.9


def test_the_option_reaches_the_stage() -> None:
    from tiny import tiny_vit

    from mgfc import wrap_backbone

    for share in (0.0, 0.4):
        vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4, coarse=CoarseConfig(randomise=share)))
        assert vit.calibration.adapter.coarse.randomise == share
