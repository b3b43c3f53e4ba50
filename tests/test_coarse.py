"""The coarse stage on images: what counts as one, its statistics, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from test_calibrators import coarse_by_hand
from torch import Tensor
from torch.nn import functional as F

from mgfc import CoarseCalib

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS = [1, 3, 4, 12]


def trained(channels: int = 3, **options: float) -> CoarseCalib:
    """With the statistics of images of mean 1 and standard deviation 0.5, more or less."""
    module = CoarseCalib(channels, **options).train()
    for _ in range(8):
        module(images(4, channels))
    return module.eval()


def images(batch: int, channels: int = 3, size: tuple[int, int] = (14, 21)) -> Tensor:
    shift, scale = torch.randn(2, batch, channels, 1, 1)
    return 1 + 0.2 * shift + 0.5 * (0.2 * scale).exp() * torch.randn(batch, channels, *size)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_statistics_it_is_the_identity_to_the_bit(channels: int, dtype: torch.dtype) -> None:
    given = (50 * torch.randn(2, channels, 7, 9)).to(dtype)
    for module in (CoarseCalib(channels), CoarseCalib(channels).to(dtype)):
        found = module.eval()(given)
        assert found.dtype == dtype and torch.equal(found, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_keep_their_dtype_and_statistics_are_in_full_precision(dtype: torch.dtype) -> None:
    module, given = trained(), (3 * images(2)).to(dtype)
    found = module(given)
    assert found.dtype == dtype and not torch.equal(found, given)
    full = torch.promote_types(dtype, torch.float32)
    assert module.statistics(given).dtype == full
    expected = module.to(full)(given.to(full))
    if dtype == torch.float64:  # of statistics in float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(found, expected.to(dtype)), "only the result is rounded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_gathers_what_one_in_full_precision_does(dtype: torch.dtype) -> None:
    half, full = CoarseCalib(3).to(dtype).train(), CoarseCalib(3).train()
    for _ in range(5):
        batch = (300 * images(4)).to(dtype)  # squares of which half precision cannot hold
        half(batch)
        full(batch.float())
    assert half.source.total.dtype == torch.float32
    assert torch.equal(half.source.value, full.source.value) and full.source.value.isfinite().all()


def test_images_far_from_zero_have_a_variance() -> None:
    """As those of satellites and of thermal cameras, which are often left as the sensor counts."""
    module = CoarseCalib(12).eval()
    given = 3000 + 200 * torch.randn(2, 12, 32, 48)
    mean, log_deviation = module.statistics(given).unbind(dim=1)
    variance, expected = torch.var_mean(given.double(), dim=(2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_deviation.double(), variance.log() / 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_pixels_lose_no_digits(memory_format: torch.memory_format) -> None:
    given = (2 + torch.randn(1, 3, 1024, 2048)).to(memory_format=memory_format)
    module = CoarseCalib(3)
    torch.testing.assert_close(module.statistics(given).double(), module.statistics(given.double()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("distance", [0.0, 1e-22, 1e-20, 1e-9])
def test_gradients_near_the_sources_mean_are_finite(distance: float) -> None:
    module = CoarseCalib(3).eval()
    expected = torch.zeros(2, 3)
    module.source.set(torch.stack([expected, expected + 1]))
    away = torch.full((1, 2, 3), distance**0.5, requires_grad=True)
    (module.fraction(away, (1, 2)) + module.distance(away)).sum().backward()
    assert away.grad is not None and away.grad.isfinite().all()


def test_images_of_a_batch_are_calibrated_one_at_a_time() -> None:
    module, given = trained(), torch.cat([images(2), 5 * images(2) - 3])
    together = module(given)
    assert torch.equal(together[:2], module(given[:2]))
    for image, found in zip(given, together, strict=True):
        torch.testing.assert_close(module(image[None])[0], found, rtol=0, atol=1e-6)
    assert torch.equal(module(given.flip(0)).flip(0), together)


PADDINGS = [(0, 0, 0, 3), (0, 5, 0, 0), (2, 3, 4, 1)]


@pytest.mark.parametrize("padding", PADDINGS, ids=["below", "right", "letterbox"])
def test_padding_does_not_count_and_stays_zero(padding: tuple[int, int, int, int]) -> None:
    module = trained().double()
    given = 2 * images(2).double() + 1
    given[:, 1] = torch.where(given[:, 1] > 1, given[:, 1], 0)  # zeros of one channel are no padding
    given[0, :, 6], given[0, :, :, 4] = 0, 0  # nor is a black row or column within
    padded = F.pad(given, padding)
    found, alone = module(padded), module(given)
    left, _, top, _ = padding
    inside = found[:, :, top : top + 14, left : left + 21]
    torch.testing.assert_close(inside, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(alone, given, atol=0.1)
    outside = torch.ones_like(padded, dtype=torch.bool)
    outside[:, :, top : top + 14, left : left + 21] = False
    assert (found[outside] == 0).all()
    torch.testing.assert_close(module.statistics(padded), module.statistics(given), rtol=0, atol=1e-12)
    twins = [CoarseCalib(3).double().train() for _ in range(2)]
    for module, batch in zip(twins, (padded, given), strict=True):
        module(batch)
    torch.testing.assert_close(twins[0].source.value, twins[1].source.value, rtol=0, atol=1e-12)


def test_each_image_has_its_own_padding() -> None:
    """As in a batch of images of several sizes."""
    module = CoarseCalib(3).double().eval()
    randomise(module)
    batch = torch.zeros(2, 3, 5, 6, dtype=torch.float64)
    batch[0, :, :3, :6] = torch.randn(3, 3, 6) + 1
    batch[1, :, 1:5, 2:5] = torch.randn(3, 4, 3) - 2
    expected = torch.stack([coarse_by_hand(module, image) for image in batch])
    torch.testing.assert_close(module(batch), expected, rtol=0, atol=1e-12)
    assert ((expected == 0) == (batch == 0)).all()


def test_an_image_of_nothing_but_padding_stays() -> None:
    module, empty = trained(), torch.zeros(1, 3, 8, 8)
    assert torch.equal(module(empty), empty)


@pytest.mark.parametrize("channels", CHANNELS)
def test_what_a_camera_does_to_channels_is_undone(channels: int) -> None:
    module, given = trained(channels), images(8, channels)
    gain, offset = 2 + torch.rand(channels, 1, 1), 3 * torch.randn(channels, 1, 1)
    before = (given * gain + offset - given).square().mean()
    after = (module(given * gain + offset) - given).square().mean()
    assert after < 0.05 * before
    assert (module(given) - given).square().mean() < 0.01 * before


def test_strength_is_the_share_of_the_way() -> None:
    module, given = trained(), 1000 * images(2)
    away = {}
    for strength in (0.0, 0.5, 1.0):
        module.strength = strength
        away[strength] = module.source.value[0] - module.statistics(module(given))
    assert torch.equal(module.source.value[0] - module.statistics(given), away[0.0])
    torch.testing.assert_close(away[0.5], away[0.0] / 2, rtol=1e-2, atol=1e-2)
    assert away[1.0].abs().max() < 0.01 * away[0.0].abs().max()


def test_statistics_of_a_scene_take_the_place_of_the_images_own() -> None:
    module, scene = trained(), 2 * images(2) - 1
    window = scene[:, :, 2:9, 3:12]
    whole = module(scene)
    found = module(window, module.statistics(scene))
    torch.testing.assert_close(found, whole[:, :, 2:9, 3:12], rtol=0, atol=1e-6)
    assert not torch.allclose(module(window), found, atol=1e-2)


def test_calibration_is_differentiable() -> None:
    """For what learns in front of it, such as an adversary or a learnt front end."""
    module = trained().double()
    given = (2 * images(2, size=(3, 4)).double() + 1).requires_grad_()
    assert torch.autograd.gradcheck(module, given)


def test_it_holds_no_parameters_and_little_state() -> None:
    module = CoarseCalib(3)
    assert not list(module.parameters())
    assert sum(buffer.numel() for buffer in module.buffers()) == 2 * 2 * 3 + 3
