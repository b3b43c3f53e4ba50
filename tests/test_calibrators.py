"""Each stage and the layer against their equations, alone, at any width and on any grid."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mgfc import CalibLayer, CoarseCalib, FineCalib, MediumCalib
from mgfc.calibrators import LowRank
from mgfc.calibrators.running import as_one_batch

Make = Callable[[int], nn.Module]


class Pixels(nn.Module):
    """The coarse stage with the pixels of images as tokens, so that what holds of every stage is tested of each."""

    def __init__(self, dim: int, strength: float = 1.0) -> None:
        super().__init__()
        self.stage = CoarseCalib(dim, strength)
        self.source, self.strength = self.stage.source, strength

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.stage(as_images(tokens, grid)).flatten(2).mT

    def observe(self, tokens: Tensor) -> None:
        self.stage.observe(as_images(tokens))


def as_images(tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    return tokens.mT.unflatten(2, grid or (1, tokens.shape[1]))


class Block(nn.Module):
    """A block that does nothing else: its feed-forward network is the identity, of one width."""

    def __init__(self, layer: CalibLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        adapted = tokens if self.layer.low_rank is None else self.layer.low_rank(tokens, tokens)
        return self.layer(adapted, grid)


def full_layer(dim: int, rank: int | None = None, hidden: int | None = None) -> CalibLayer:
    low_rank = LowRank(dim, hidden or dim, rank or max(dim // 2, 1))
    return CalibLayer(dim, low_rank, MediumCalib(dim, 5), FineCalib(dim))


def full_block(dim: int) -> Block:
    return Block(full_layer(dim))


STAGES = {
    "coarse": Pixels,
    "medium": MediumCalib,
    "fine": FineCalib,
}
ALL = {**STAGES, "layer": full_block}
every_module = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
GRIDS = [(1, 1), (1, 7), (7, 1), (2, 2), (6, 9), (9, 6)]


def active(make: Make, dim: int = 12) -> nn.Module:
    """With gates, W_up and statistics as after a training."""
    module = make(dim).eval()
    randomise(module)
    return module


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.unflatten(1, grid)


@every_module
@pytest.mark.parametrize("dim", [1, 7, 48, 384])
def test_identity_at_initialisation(make: Make, dim: int) -> None:
    tokens = torch.randn(2, 6 * 9, dim)
    assert torch.equal(make(dim)(tokens, (6, 9)), tokens)


@every_module
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid(make: Make, grid: tuple[int, int]) -> None:
    module, tokens = active(make), torch.randn(3, math.prod(grid), 12)
    refined = module(tokens, grid)
    assert refined.shape == tokens.shape and refined.isfinite().all()
    assert make is FineCalib or not torch.allclose(refined, tokens, atol=1e-3)


@every_module
def test_works_in_a_module_of_the_users_own(make: Make) -> None:
    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calib = make(10)

        def forward(self, maps: Tensor) -> Tensor:
            return self.calib(maps.flatten(2).mT, maps.shape[2:]).mT.unflatten(2, maps.shape[2:])

    neck, maps = Neck().eval(), torch.randn(2, 10, 3, 5)
    assert torch.equal(neck(maps), maps)
    randomise(neck)
    copy = Neck().eval()
    copy.load_state_dict(neck.state_dict())
    assert torch.equal(copy(maps), neck(maps)) and not torch.equal(neck(maps), maps)


@pytest.mark.parametrize(
    ("make", "is_spatial"),
    [
        (Pixels, False),
        (MediumCalib, False),
        (FineCalib, True),
        (full_block, True),
        (lambda dim: Block(CalibLayer(dim, LowRank(dim, dim, 4), MediumCalib(dim))), False),
    ],
    ids=["coarse", "medium", "fine", "layer", "layer without fine"],
)
def test_a_transposed_grid_matters_to_the_spatial_stage_only(make: Make, is_spatial: bool) -> None:
    module, tokens = active(make), torch.randn(2, 4 * 6, 12)
    right, transposed = module(tokens, (4, 6)), module(tokens, (6, 4))
    assert torch.equal(right, transposed) != is_spatial
    assert not is_spatial or (right - transposed).abs().mean() > 1e-2


@every_module
def test_a_flipped_map_gives_the_flipped_result(make: Make) -> None:
    module = make(12).double().eval()
    kernels = {name: p.clone() for name, p in module.named_parameters() if name.endswith("kernel")}
    randomise(module)
    with torch.no_grad():
        for name, kernel in kernels.items():
            module.get_parameter(name).copy_(kernel)  # symmetric, as at initialisation
    tokens = torch.randn(2, 4 * 7, 12, dtype=torch.float64)
    flipped = as_map(tokens, (4, 7)).flip(2).flatten(1, 2)
    expected = as_map(module(tokens, (4, 7)), (4, 7)).flip(2).flatten(1, 2)
    torch.testing.assert_close(module(flipped, (4, 7)), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, flipped, atol=1e-2)


@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_token_wise_stages_follow_any_permutation(make: Make) -> None:
    module, tokens, order = active(make).double(), torch.randn(2, 20, 12, dtype=torch.float64), torch.randperm(20)
    torch.testing.assert_close(module(tokens[:, order]), module(tokens)[:, order], rtol=0, atol=1e-12)


@every_module
def test_images_of_a_batch_do_not_mix(make: Make) -> None:
    module, tokens = active(make).double(), torch.randn(3, 4 * 5, 12, dtype=torch.float64)
    alone = torch.cat([module(image.unsqueeze(0), (4, 5)) for image in tokens])
    torch.testing.assert_close(module(tokens, (4, 5)), alone, rtol=0, atol=1e-12)


# The equations, once more and naively


def coarse_by_hand(module: CoarseCalib, image: Tensor) -> Tensor:
    """One image (C, H, W), of which the rows and columns at the border that are 0 in all channels are padding."""
    channels, height, width = image.shape
    filled = [(y, x) for y in range(height) for x in range(width) if any(image[c, y, x] != 0 for c in range(channels))]
    rows, columns = [y for y, _ in filled], [x for _, x in filled]
    pixels = [(y, x) for y in range(min(rows), max(rows) + 1) for x in range(min(columns), max(columns) + 1)]
    means, logs = [], []
    for channel in image:
        mean = sum(channel[y, x] for y, x in pixels) / len(pixels)
        variance = sum((channel[y, x] - mean) ** 2 for y, x in pixels) / len(pixels)
        means.append(mean)
        logs.append((variance + 1e-6).sqrt().log())
    expected, square = module.source.value
    distance = 0.0
    for c in range(channels):
        for k, found in enumerate((means[c], logs[c])):
            distance += (expected[k, c] - found) ** 2 / (square[k, c] - expected[k, c] ** 2) / (2 * channels)
    strength = module.strength * max(0.0, 1 - 0.5 / distance)
    result = image.clone()
    for c in range(channels):
        mean = means[c] + strength * (expected[0, c] - means[c])
        stretch = (expected[1, c].exp() / logs[c].exp()) ** strength
        for y, x in pixels:
            result[c, y, x] = mean + stretch * (image[c, y, x] - means[c])
    return result


def medium_by_hand(module: MediumCalib, image: Tensor) -> Tensor:
    dim = image.shape[1]
    prototypes = [row[1 : 1 + dim] / row[0] for row in module.source.value]
    variances = [row[1 + dim :] / row[0] - p**2 for row, p in zip(module.source.value, prototypes, strict=True)]
    source_mean = sum(row[1 : 1 + dim] for row in module.source.value)
    middle = (source_mean + image.mean(0)) / 2
    cosine = torch.stack(
        [torch.stack([F.cosine_similarity(x - middle, p - source_mean, dim=0) for p in prototypes]) for x in image]
    )
    assignment = (cosine / module.temperature).softmax(1)
    offsets = []
    for k, prototype in enumerate(prototypes):
        share = assignment[:, k].sum() / len(image)
        centroid = sum(assignment[i, k] * x for i, x in enumerate(image)) / assignment[:, k].sum()
        distance = ((prototype - centroid) ** 2 / variances[k]).mean()
        strength = module.strength * max(0.0, 1 - module.threshold / distance)
        offsets.append(strength * share / (share + 0.025) * (prototype - centroid))
    moved = [sum(assignment[i, k] * offset for k, offset in enumerate(offsets)) for i in range(len(image))]
    return torch.stack([x + shift for x, shift in zip(image, moved, strict=True)])


def fine_by_hand(module: FineCalib, image: Tensor, grid: tuple[int, int]) -> Tensor:
    (height, width), size = grid, module.kernel.shape[-1]
    refined = []
    for y in range(height):
        for x in range(width):
            response = torch.zeros(image.shape[-1], dtype=image.dtype)
            for dy in range(size):
                for dx in range(size):
                    row = min(max(y + dy - size // 2, 0), height - 1)
                    column = min(max(x + dx - size // 2, 0), width - 1)
                    response = response + module.kernel[:, dy, dx] * image[row * width + column]
            token = image[y * width + x]
            centred = token - token.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt()
            share = (module.select.weight @ normed + module.select.bias).sigmoid()
            refined.append(token + module.gate * share * response)
    return torch.stack(refined)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_coarse_is_its_equation(strength: float, channels: int) -> None:
    module = CoarseCalib(channels, strength).double()
    randomise(module)
    images = 2 * torch.randn(2, channels, 3, 4, dtype=torch.float64) + 1
    expected = torch.stack([coarse_by_hand(module.eval(), image) for image in images])
    torch.testing.assert_close(module(images), expected, rtol=0, atol=1e-12)
    assert torch.allclose(expected, images, rtol=0, atol=1e-12) == (strength == 0)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_medium_is_its_equation(temperature: float) -> None:
    module, tokens = MediumCalib(6, 5, temperature, threshold=1.5).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    randomise(module)
    expected = torch.stack([medium_by_hand(module.eval(), image) for image in tokens])
    torch.testing.assert_close(module(tokens, (3, 4)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (1, 1)], ids=str)
def test_fine_is_its_equation(kernel_size: int, grid: tuple[int, int]) -> None:
    module, tokens = FineCalib(6, kernel_size).double(), torch.randn(2, math.prod(grid), 6, dtype=torch.float64)
    randomise(module)
    expected = torch.stack([fine_by_hand(module, image, grid) for image in tokens])
    torch.testing.assert_close(module(tokens, grid), expected, rtol=0, atol=1e-12)


def test_layer_is_its_equations_with_the_stages_from_medium_to_fine() -> None:
    layer, tokens = full_layer(10, 6, hidden=15).double(), torch.randn(2, 12, 10, dtype=torch.float64)
    randomise(layer.eval())
    after = [medium_by_hand(layer.medium, image) for image in tokens]
    expected = torch.stack([fine_by_hand(layer.fine, image, (3, 4)) for image in after])
    torch.testing.assert_close(layer(tokens, (3, 4)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [slice(None), slice(4, 9)], ids=["all", "some"])
@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4)], ids=["tokens", "map"])
def test_low_rank_is_its_equation(channels: slice, shape: tuple[int, ...]) -> None:
    low_rank, tokens = LowRank(10, 15, 6).double(), torch.randn(*shape, 10, dtype=torch.float64)
    output = torch.randn(*shape, 15, dtype=torch.float64)[..., channels]
    assert torch.equal(low_rank(tokens, output, channels), output)
    randomise(low_rank)
    record: dict[str, Tensor] = {}
    down, up = low_rank.down.T, low_rank.up.T[:, channels]
    expected = torch.stack([h + 2 * f @ down @ up for f, h in zip(tokens, output, strict=True)])
    torch.testing.assert_close(low_rank(tokens, output, channels, record), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        written = low_rank(tokens, output, channels, inplace=True)
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-12)
    assert torch.equal(written, output) or not output.is_contiguous()
    scene = torch.stack([(f @ down).flatten(0, -2).mean(dim=0) for f in tokens])
    torch.testing.assert_close(record["scene"], scene, rtol=0, atol=1e-12)
    torch.testing.assert_close(2 * tokens @ down @ up, tokens @ low_rank.weight(channels).T, rtol=0, atol=1e-12)


# The high-pass


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_high_pass_of_a_constant_map_is_zero_up_to_the_borders(kernel_size: int, grid: tuple[int, int]) -> None:
    fine = FineCalib(4, kernel_size).double()
    tokens = torch.tensor([-3.0, 0.0, 1.0, 100.0], dtype=torch.float64).expand(2, math.prod(grid), 4)
    # The kernel is made in float32, and its sum is 0 to that precision.
    assert fine.high_pass(tokens, grid).abs().max() < 100 * 1e-6


def test_high_pass_answers_a_step_beside_it_only() -> None:
    maps = torch.zeros(1, 4, 8, 3)
    maps[:, :, 4:] = 1.0
    response = as_map(FineCalib(3).high_pass(maps.flatten(1, 2), (4, 8)), (4, 8))
    columns = response.abs().amax(dim=(0, 1, 3))
    assert (columns[[3, 4]] > 0.3).all() and columns[[0, 1, 2, 5, 6, 7]].max() < 1e-6


# Running statistics


def domain(shift: float, scale: float, images: int = 8) -> Tensor:
    """Token maps of one scene structure in another light: (B, 60, 12)."""
    draw = torch.Generator().manual_seed(0)
    categories = 3 * torch.randn(3, 12, generator=draw)
    which = torch.randint(3, (images, 60), generator=draw)
    tokens = categories[which] + 0.1 * torch.randn(images, 60, 12, generator=draw)
    return scale * tokens + shift * torch.linspace(-1, 1, 12)


def trained_on(module: nn.Module, tokens: Tensor, batches: int = 60) -> nn.Module:
    module.train()
    for batch in range(batches):
        places = torch.arange(batch, batch + 4) % len(tokens)
        module(tokens[places], (6, 10))
    return module.eval()


@pytest.mark.parametrize(
    ("make", "shift", "scale"),
    [
        (partial(Pixels, strength=0.7), 2.0, 1.0),
        (partial(Pixels, strength=0.7), 0.0, 0.5),
        (partial(MediumCalib, strength=0.4), 2.0, 1.0),
    ],
    ids=["coarse, shifted", "coarse, flattened", "medium, shifted"],
)
def test_another_light_is_drawn_to_the_source(make: Make, shift: float, scale: float) -> None:
    source, target = domain(0.0, 1.0), domain(shift, scale)
    module = trained_on(make(12), source)
    before, after = (target - source).square().mean(), (module(target, (6, 10)) - source).square().mean()
    assert after < 0.7 * before
    own = (module(source, (6, 10)) - source).square().mean()
    assert own < 0.04 * before, "the source itself moves little"


def test_medium_leaves_other_shares_of_the_categories_alone_and_coarse_does_not() -> None:
    source = domain(0.0, 1.0)
    sky = source[:, :1].expand(-1, 45, -1) + 0.1 * torch.randn(8, 45, 12)
    more_sky = torch.cat([sky, source[:, :15]], dim=1)
    moved = {}
    for make in (Pixels, MediumCalib):
        module = trained_on(make(12), source)
        moved[make] = (module(more_sky, (6, 10)) - more_sky).square().mean() / module.strength**2
    assert moved[MediumCalib] < 0.1 * moved[Pixels]


def test_prototypes_find_the_categories() -> None:
    source = domain(0.0, 1.0)
    module = trained_on(MediumCalib(12, num_prototypes=6), source)
    assignment = module.similarity(source).argmax(dim=-1).flatten()
    draw = torch.Generator().manual_seed(0)
    torch.randn(3, 12, generator=draw)
    which = torch.randint(3, (8, 60), generator=draw).flatten()
    for prototype in assignment.unique():
        categories = which[assignment == prototype]
        assert (categories == categories.mode().values).float().mean() > 0.95


@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_training_changes_no_token_and_evaluation_learns_nothing(make: Make) -> None:
    module, tokens = make(12).train(), torch.randn(2, 20, 12)
    for _ in range(2):
        assert torch.equal(module(tokens, (4, 5)), tokens)
    assert module.source.count == 2
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = 2 * tokens + 1
    assert not torch.equal(module(other, (4, 5)), other)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_statistics_of_a_layer_are_those_of_the_tokens_that_leave_its_block() -> None:
    layer, tokens = full_layer(12), torch.randn(2, 20, 12)
    randomise(layer)
    layer.train()
    alone = copy.deepcopy(layer.medium)
    alone.observe(tokens)
    before = layer.medium.source.value
    layer(tokens, (4, 5))
    assert torch.equal(layer.medium.source.value, alone.source.value) and not torch.equal(alone.source.value, before)


def test_an_image_like_the_sources_stays_as_it_is_and_one_far_off_is_drawn_all_the_way() -> None:
    source = domain(0.0, 1.0)
    module = trained_on(Pixels(12), source)
    expected, square = module.source.value
    inside = source[:1]  # any image
    usual = (inside - inside.mean(1)) / inside.std(1, correction=0) * expected[1].exp() + expected[0]
    assert torch.equal(module(usual), usual)
    mean, spread = module(usual + 1000.0).mean(dim=1)[0], (square - expected.square()).sqrt()[0]
    assert ((mean - expected[0]).abs() < spread).all()


def test_a_category_like_the_sources_stays_as_it_is_and_one_far_off_is_drawn_to_it() -> None:
    module = MediumCalib(12, num_prototypes=4).eval()
    centroids = 3 * torch.eye(4, 12)
    with torch.no_grad():
        module.source.set(torch.cat([torch.ones(4, 1), centroids, centroids.square() + 0.1**2], dim=1) / 4)
    usual = centroids.repeat(15, 1).unsqueeze(0)
    assert torch.equal(module(usual), usual)
    inside, outside = usual.clone(), usual.clone()
    inside[:, ::4] += 0.09
    outside[:, ::4] += 0.5
    assert (module(inside) - inside).abs().max() < 1e-6
    left, before = (module(outside) - usual)[:, ::4].square().mean(), (outside - usual)[:, ::4].square().mean()
    assert left < 0.05 * before, "its share of the image makes it certain, but not quite"
    others = torch.arange(60) % 4 > 0
    assert (module(outside) - outside)[:, others].abs().max() < 1e-3, "the other categories stay"


@pytest.mark.parametrize("threshold", [1e-25, 0.3, 3.0, 49.0])
def test_what_lies_within_the_threshold_stays_to_the_bit_and_what_lies_beyond_moves(threshold: float) -> None:
    module = MediumCalib(12, threshold=threshold)
    fresh = torch.randn(1, 20, 12)
    assert torch.equal(module.eval()(fresh), fresh)
    assert module.fraction(torch.full((4, 12), 0.999 * threshold**0.5), -1).eq(0).all()
    torch.testing.assert_close(module.fraction(torch.full((4, 12), (2 * threshold) ** 0.5), -1), torch.full((4, 1), 0.5))


def test_all_that_medium_measures_is_in_full_precision_under_autocast() -> None:
    module, tokens = active(MediumCalib), torch.randn(2, 30, 12)
    measures = module.similarity, module.assign, module, lambda x: module.deviations(x, expected[1])
    expected = [module.similarity(tokens), module.assign(tokens)]
    expected += [module(tokens), module.deviations(tokens, expected[1])]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(measure(tokens), value) for measure, value in zip(measures, expected, strict=True))


def test_a_category_that_the_source_has_nothing_of_moves_nothing() -> None:
    module, prototype = MediumCalib(12, num_prototypes=2).eval(), torch.full((1, 12), 3.0)
    only = torch.cat([torch.ones(1, 1), prototype, prototype.square() + 0.01], dim=1)
    module.source.set(torch.cat([only, torch.zeros_like(only)]))
    tokens = 0.5 + 0.1 * torch.randn(1, 20, 12)
    assert (module.assign(tokens)[..., 1] > 0.99).all()
    torch.testing.assert_close(module(tokens), tokens, rtol=0, atol=1e-4)
    module.source.set(torch.cat([only, only - 2]))  # the same tokens are moved by a category that it has
    assert (module(tokens) - tokens).abs().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_statistics_stay_in_full_precision(make: Make, dtype: torch.dtype) -> None:
    """Those of channels that lie far from zero, whose variance half precision could not hold."""
    source = domain(0.0, 1.0) + 20
    module, tokens = trained_on(make(12), source), domain(0.3, 0.9) + 20
    expected = module(tokens)
    found = copy.deepcopy(module).to(dtype)(tokens)
    assert torch.equal(found, expected) and not torch.equal(expected, tokens)
    assert {buffer.dtype for buffer in module.double().buffers()} == {torch.float64}


@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_squares_of_large_activations_fit_into_the_statistics_of_half_precision(make: Make) -> None:
    module = make(12).to(torch.float16).train()
    for _ in range(2):
        module(1000 + 50 * torch.randn(2, 20, 12, dtype=torch.float16), (4, 5))
    assert all(buffer.isfinite().all() for buffer in module.buffers())


@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_images_that_pass_one_by_one_are_one_batch(make: Make) -> None:
    together, apart = (trained_on(make(12), domain(0.0, 1.0), batches=2).train() for _ in range(2))
    tokens = domain(1.0, 0.8)[:3]
    together.observe(tokens)
    with as_one_batch(apart):
        for image in tokens:
            apart.observe(image.unsqueeze(0))
    for a, b in zip(apart.buffers(), together.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    fresh = make(12).train()
    with as_one_batch(fresh):
        for image in tokens:
            fresh.observe(image.unsqueeze(0))
    assert fresh.source.count == 1


@pytest.mark.parametrize("make", [Pixels, MediumCalib], ids=["coarse", "medium"])
def test_a_recomputation_under_checkpointing_counts_no_batch_twice(make: Make) -> None:
    plain, checkpointed = (trained_on(make(12), domain(0.0, 1.0), batches=3).train() for _ in range(2))
    tokens = domain(1.0, 0.8)[:2].requires_grad_()
    grads = []
    for module in (plain, checkpointed):
        run = partial(checkpoint, module, use_reentrant=False) if module is checkpointed else module
        (grad,) = torch.autograd.grad((run(tokens, (6, 10)) ** 3).sum(), tokens)
        grads.append(grad)
    assert torch.equal(*grads)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True))


@pytest.mark.parametrize("make", [Pixels, MediumCalib, full_block], ids=["coarse", "medium", "layer"])
def test_constant_maps_and_single_patches_stay_finite(make: Make) -> None:
    module = make(12).train()
    for tokens in (torch.ones(2, 6, 12), torch.zeros(2, 6, 12), torch.randn(1, 1, 12)):
        tokens.requires_grad_()
        refined = module(tokens, (1, tokens.shape[1]))
        refined.sum().backward()
        assert refined.isfinite().all() and tokens.grad.isfinite().all()


# The layer


@pytest.mark.parametrize("stages", [(), ("medium",), ("fine",), ("medium", "fine")], ids=str)
@pytest.mark.parametrize("rank", [8, None])
def test_every_choice_of_stages(rank: int | None, stages: tuple[str, ...]) -> None:
    layer = CalibLayer(16, rank and LowRank(16, 16, rank), **{name: STAGES[name](16) for name in stages})
    tokens = torch.randn(2, 12, 16)
    assert torch.equal(Block(layer)(tokens, (3, 4)), tokens)
    assert {name.split(".")[0] for name in layer.state_dict()} == {*(["low_rank"] if rank else []), *stages}
    randomise(layer.eval())
    assert torch.equal(layer(tokens, (3, 4)), tokens) == (not stages)
    assert torch.equal(Block(layer)(tokens, (3, 4)), tokens) == (rank is None and not stages)


def test_without_a_grid_only_the_fine_stage_is_skipped() -> None:
    layer, tokens = active(full_layer), torch.randn(2, 12, 12)
    without = CalibLayer(12, layer.low_rank, layer.medium).eval()
    record: dict[str, Tensor] = {}
    assert torch.equal(layer(tokens, None, record), without(tokens, (3, 4)))
    assert set(record) == {"similarity"}
    assert not torch.equal(layer(tokens, None), layer(tokens, (3, 4)))


def test_record_holds_what_the_losses_need() -> None:
    layer, record = active(full_layer), {}
    layer(torch.randn(2, 12, 12), (3, 4), record)
    shapes = {name: tuple(value.shape) for name, value in record.items()}
    assert shapes == {"similarity": (2, 12, 5), "share": (2, 12)}


def test_a_layer_with_no_stage_to_run_returns_what_came_in() -> None:
    tokens = torch.randn(2, 12, 12)
    assert CalibLayer(12)(tokens, (3, 4)) is tokens
    assert CalibLayer(12, LowRank(12, 48, 6))(tokens, (3, 4)) is tokens
    assert CalibLayer(12, LowRank(12, 48, 6), fine=FineCalib(12))(tokens, None) is tokens
    assert CalibLayer(12, LowRank(12, 48, 6), MediumCalib(12))(tokens, (3, 4)) is tokens  # in training


def test_every_module_with_parameters_is_called_as_one() -> None:
    """Engines that shard or move parameters bring them back by hooks on the modules that own them."""
    layer, called = full_layer(12), set()
    for name, module in layer.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    Block(layer)(torch.randn(2, 12, 12), (3, 4))
    assert {name.rpartition(".")[0] for name, _ in layer.named_parameters()} <= called


# Training, precision, cost


@every_module
def test_all_parameters_get_gradients(make: Make) -> None:
    module, tokens = active(make), torch.randn(2, 4 * 5, 12, requires_grad=True)
    module(tokens, (4, 5)).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().min() > 0
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_a_fresh_fine_stage_can_start_to_learn() -> None:
    module, tokens = FineCalib(12), torch.randn(2, 4 * 5, 12)
    module(tokens, (4, 5)).square().sum().backward()
    assert (module.gate.grad != 0).all()


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_modules_stay_close_to_float32(make: Make, dtype: torch.dtype) -> None:
    module, tokens = active(make).to(dtype), torch.randn(2, 4 * 5, 12).to(dtype)
    refined = module(tokens, (4, 5))
    assert refined.dtype == dtype
    expected = module.float()(tokens.float(), (4, 5))
    assert (refined.float() - expected).abs().max() < 0.05 * (1 + expected.abs().max())


@every_module
def test_cost_is_linear_in_the_number_of_patches(make: Make) -> None:
    def flops(height: int) -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, height * 16, 12), (height, 16))
        return counter.get_total_flops()

    module = active(make)
    assert flops(32) == 2 * flops(16)
    assert flops(16) > 0 or make is Pixels, "which has no products of matrices"


@every_module
def test_no_tensor_of_n_by_n(make: Make) -> None:
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                item.numel() for item in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(item, Tensor)
            )
            return out

    module = active(make)
    with Sizes():
        module(torch.randn(1, 32 * 32, 12), (32, 32))
    assert sizes and max(sizes) < 48 * 32 * 32 < (32 * 32) ** 2


# What standalone users get wrong


@pytest.mark.parametrize("make", [FineCalib], ids=["fine"])
def test_a_grid_that_does_not_fit_is_named(make: Make) -> None:
    with pytest.raises(ValueError, match=r"expected 4 x 5 = 20 tokens.*found 21"):
        make(12)(torch.randn(2, 21, 12), (4, 5))


@pytest.mark.parametrize("kernel_size", [0, 2, 4, -3])
def test_a_kernel_has_an_odd_side(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=rf"kernel_size.*odd.*found {kernel_size}"):
        FineCalib(8, kernel_size)
