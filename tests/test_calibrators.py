"""Each stage and the layer against their equations, alone, at any width and on any grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mgfc import CalibLayer, CoarseCalib, FineCalib, MediumCalib

Make = Callable[[int], nn.Module]


def full_layer(dim: int, rank: int | None = None) -> CalibLayer:
    rank = rank or max(dim // 2, 1)
    return CalibLayer(dim, rank, CoarseCalib(rank, 3), MediumCalib(rank, 5), FineCalib(rank))


STAGES = {
    "coarse": CoarseCalib,
    "medium": MediumCalib,
    "fine": FineCalib,
}
ALL = {**STAGES, "layer": full_layer}
every_module = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
every_stage = pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)
GRIDS = [(1, 1), (1, 7), (7, 1), (2, 2), (6, 9), (9, 6)]


def active(make: Make, dim: int = 12) -> nn.Module:
    """With gates and W_up as after a training."""
    module = make(dim)
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

    neck, maps = Neck(), torch.randn(2, 10, 3, 5)
    assert torch.equal(neck(maps), maps)
    randomise(neck)
    copy = Neck()
    copy.load_state_dict(neck.state_dict())
    assert torch.equal(copy(maps), neck(maps)) and not torch.equal(neck(maps), maps)


@pytest.mark.parametrize(
    ("make", "is_spatial"),
    [
        (CoarseCalib, False),
        (MediumCalib, False),
        (FineCalib, True),
        (full_layer, True),
        (lambda dim: CalibLayer(dim, 4, CoarseCalib(4), MediumCalib(4)), False),
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
    module = make(12).double()
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


@pytest.mark.parametrize("make", [CoarseCalib, MediumCalib], ids=["coarse", "medium"])
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
    """One image (N, C), a token at a time."""
    dim = image.shape[-1]
    scene = []
    for token in module.scene_tokens:
        weights = torch.stack([token @ z / math.sqrt(dim) for z in image]).softmax(0)
        scene.append(token + sum(w * z for w, z in zip(weights, image, strict=True)))
    refined = []
    for z in image:
        weights = torch.stack([z @ s / math.sqrt(dim) for s in scene]).softmax(0)
        context = sum(w * s for w, s in zip(weights, scene, strict=True))
        refined.append(z + module.gate * (module.mix.weight @ context))
    return torch.stack(refined)


def medium_by_hand(module: MediumCalib, image: Tensor) -> Tensor:
    prototypes = module.prototypes
    assert prototypes is not None
    cosine = torch.stack([torch.stack([z @ p / (z.norm() * p.norm()) for p in prototypes]) for z in image])
    assignment = (cosine / module.temperature).softmax(1)
    centroids = [
        sum(assignment[i, k] * z for i, z in enumerate(image)) / assignment[:, k].sum() for k in range(len(prototypes))
    ]
    refined = []
    for i, z in enumerate(image):
        pull = sum(assignment[i, k] * (prototypes[k] + centroids[k]) for k in range(len(prototypes)))
        refined.append(z + module.gate * (module.mix.weight @ pull))
    return torch.stack(refined)


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
                    response = response + module.kernel[:, 0, dy, dx] * image[row * width + column]
            z = image[y * width + x]
            share = (module.select.weight @ z + module.select.bias).sigmoid()
            refined.append(z + module.gate * share * response)
    return torch.stack(refined)


def test_coarse_is_its_equation() -> None:
    module, tokens = CoarseCalib(6, num_tokens=3).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    randomise(module)
    expected = torch.stack([coarse_by_hand(module, image) for image in tokens])
    torch.testing.assert_close(module(tokens, (3, 4)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_medium_is_its_equation(temperature: float) -> None:
    module, tokens = MediumCalib(6, 5, temperature).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    randomise(module)
    expected = torch.stack([medium_by_hand(module, image) for image in tokens])
    torch.testing.assert_close(module(tokens, (3, 4)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (1, 1)], ids=str)
def test_fine_is_its_equation(kernel_size: int, grid: tuple[int, int]) -> None:
    module, tokens = FineCalib(6, kernel_size).double(), torch.randn(2, math.prod(grid), 6, dtype=torch.float64)
    randomise(module)
    expected = torch.stack([fine_by_hand(module, image, grid) for image in tokens])
    torch.testing.assert_close(module(tokens, grid), expected, rtol=0, atol=1e-12)


def test_layer_is_its_equation_with_the_stages_from_coarse_to_fine() -> None:
    layer, tokens = full_layer(10, 6).double(), torch.randn(2, 12, 10, dtype=torch.float64)
    randomise(layer)
    expected = []
    for x in tokens:
        centred = x - x.mean(1, keepdim=True)
        z = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        z = (z * layer.norm.weight + layer.norm.bias) @ layer.down.weight.T
        z = fine_by_hand(layer.fine, medium_by_hand(layer.medium, coarse_by_hand(layer.coarse, z)), (3, 4))
        z = z * 0.5 * (1 + (z / math.sqrt(2)).erf())
        expected.append(x + z @ layer.up.weight.T)
    torch.testing.assert_close(layer(tokens, (3, 4)), torch.stack(expected), rtol=0, atol=1e-12)


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


# Prototypes


def test_medium_without_prototypes_needs_them_in_each_call() -> None:
    module, tokens = MediumCalib(8, num_prototypes=None), torch.randn(2, 12, 8)
    with pytest.raises(ValueError, match=r"num_prototypes=None\) expects prototypes of shape \(K, C\)"):
        module(tokens)
    assert torch.equal(module(tokens, prototypes=torch.randn(4, 8)), tokens)


def test_prototypes_of_a_call_take_precedence() -> None:
    module, tokens, prototypes = active(MediumCalib), torch.randn(2, 12, 12), torch.randn(5, 12)
    bare = MediumCalib(12, num_prototypes=None)
    bare.load_state_dict({key: value for key, value in module.state_dict().items() if key != "prototypes"})
    assert torch.equal(module(tokens, prototypes=prototypes), bare(tokens, prototypes=prototypes))
    assert not torch.equal(module(tokens, prototypes=prototypes), module(tokens))


def test_a_prototype_that_no_patch_resembles_stays_finite() -> None:
    module = MediumCalib(4, 2, temperature=1e-3)
    randomise(module)
    tokens = torch.randn(1, 6, 4).abs()
    prototypes = torch.stack([torch.ones(4), -torch.ones(4)])
    assert module(tokens, prototypes=prototypes).isfinite().all()


# The layer


def test_layer_shares_prototypes_that_it_is_given() -> None:
    layer = CalibLayer(16, 8, medium=MediumCalib(8, None))
    randomise(layer)
    prototypes, tokens = torch.randn(5, 8, requires_grad=True), torch.randn(2, 12, 16)
    layer(tokens, (3, 4), prototypes).sum().backward()
    assert prototypes.grad is not None and prototypes.grad.abs().max() > 0


@pytest.mark.parametrize("stages", [(), ("coarse",), ("medium",), ("fine",), ("coarse", "fine")], ids=str)
def test_every_choice_of_stages(stages: tuple[str, ...]) -> None:
    layer = CalibLayer(16, 8, **{name: STAGES[name](8) for name in stages})
    tokens = torch.randn(2, 12, 16)
    assert torch.equal(layer(tokens, (3, 4)), tokens)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"norm", "down", "up", *stages}
    randomise(layer)
    assert not torch.equal(layer(tokens, (3, 4)), tokens)


def test_without_a_grid_only_the_fine_stage_is_skipped() -> None:
    layer, tokens = active(full_layer), torch.randn(2, 12, 12)
    without = CalibLayer(12, 6, layer.coarse, layer.medium)
    without.load_state_dict({key: value for key, value in layer.state_dict().items() if not key.startswith("fine.")})
    record: dict[str, Tensor] = {}
    assert torch.equal(layer.refine(tokens, None, record=record), without.refine(tokens, (3, 4)))
    assert set(record) == {"scene", "similarity"}
    assert not torch.equal(layer(tokens, None), layer(tokens, (3, 4)))


def test_record_holds_what_the_losses_need() -> None:
    layer, record = active(full_layer), {}
    layer.refine(torch.randn(2, 12, 12), (3, 4), record=record)
    shapes = {name: tuple(value.shape) for name, value in record.items()}
    assert shapes == {"scene": (2, 3, 6), "similarity": (2, 12, 5), "detail": (2, 12, 6)}


def test_a_token_with_a_zero_bottleneck_row_stays_exactly_as_it_was() -> None:
    layer = CalibLayer(16, 8)
    nn.init.normal_(layer.up.weight)
    tokens = torch.randn(2, 12, 16)
    tokens[:, 4] = 1.0  # LayerNorm makes it zero
    refined = layer(tokens, (3, 4))
    assert torch.equal(refined[:, 4], tokens[:, 4])
    assert (refined != tokens).any(dim=2).sum() == 2 * 11
    padded = F.pad(layer.refine(tokens, (3, 4)), (0, 0, 1, 0))
    assert torch.equal(layer.up(padded)[:, 0], torch.zeros(2, 16))


# Training, precision, cost


@every_module
def test_all_parameters_get_gradients(make: Make) -> None:
    module = active(make)
    module(torch.randn(2, 4 * 5, 12), (4, 5)).square().sum().backward()
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@every_stage
def test_a_fresh_stage_can_start_to_learn(make: Make) -> None:
    module, tokens = make(12), torch.randn(2, 4 * 5, 12)
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
    assert flops(32) == 2 * flops(16) > 0


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
