"""Detection, grids, layouts and descriptions, below the level of a wrapped model."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from typing import Any

import pytest
import timm
import torch
from helpers import SIZES
from torch import Tensor, nn
from zoo import CASES

from mgfc import MGFCConfig, UnsupportedBackboneError, wrap_backbone
from mgfc.backbones.description import block_widths, describe, fingerprint, first_linears, patch_size
from mgfc.backbones.detection import find_tower
from mgfc.backbones.grid import GridTracker, tag
from mgfc.backbones.layout import (
    MaskUnitOrder,
    RasterOrder,
    WindowOrder,
    channels_back,
    channels_last,
    padding,
    pick_tensor,
    put_tensor,
    view_patches,
)
from mgfc.backbones.modes import evaluating


def build(name: str) -> nn.Module:
    return next(case for case in CASES if case.name == name).build()


# Grids


def resolve(tracker: GridTracker, count: int, args: Any = (), kwargs: Any = None, output: Any = None) -> Any:
    tracker.enter((torch.zeros(1), *args), kwargs or {})
    return tracker.resolve(count, torch.zeros(1) if output is None else output)


def test_grid_candidates_in_order_of_trust() -> None:
    tracker = GridTracker(max_extra=2)
    assert resolve(tracker, 25) is None
    tracker.recent = ((4, 6), (6, 4))
    assert resolve(tracker, 25) == (4, 6)
    assert resolve(tracker, 23) is None
    assert resolve(tracker, 27) is None
    assert resolve(tracker, 26, args=[(3, 8)]) == (3, 8)
    assert resolve(tracker, 24, args=[2, 12]) == (2, 12)
    assert resolve(tracker, 24, kwargs={"size": [8, 3]}) == (8, 3)
    assert resolve(tracker, 24, output=(torch.zeros(1), [12, 2]), args=[(3, 8)]) == (12, 2)
    assert resolve(tracker, 24, args=[(True, False), (7, 7)]) == (4, 6)
    tokens = torch.zeros(1)
    tag((1, 24), tokens)
    tag((9, 9), tokens)
    tracker.enter((tokens,), {})
    assert tracker.resolve(24) == (1, 24)


def test_grid_halves_without_a_convolution() -> None:
    tracker = GridTracker(max_extra=0)
    tracker.recent = ((5, 7),)
    assert resolve(tracker, 12) == (3, 4)
    assert tracker.recent[0] == (3, 4)
    tracker.recent = ((5, 7),)
    assert resolve(tracker, 6) == (2, 3)


def test_tracker_copies_start_fresh() -> None:
    tracker = GridTracker(max_extra=3)
    tracker.recent = ((4, 6),)
    for twin in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
        assert (twin.recent, twin.max_extra) == ((), 3)


def test_a_prepatchified_batch_forgets_the_last_grid() -> None:
    class Embeddings(nn.Module):
        patch_size = (8, 4)

    tracker = GridTracker(max_extra=0)
    tracker.observe_image(Embeddings(), (torch.zeros(2, 3, 32, 48),), {})
    assert tracker.recent[0] == (4, 12)
    tracker.observe_image(Embeddings(), (), {"patches": torch.zeros(2, 48, 96)})
    assert tracker.recent == ()


# Layouts


def view(tensor: Tensor, dim: int, recent: Any = ()) -> Any:
    tracker = GridTracker(max_extra=9)
    tracker.recent = recent
    return view_patches(tensor, dim, RasterOrder(2, 1), tracker, tensor)


@pytest.mark.parametrize(
    ("shape", "dim", "grid", "leading", "trailing"),
    [
        ((2, 27, 5), 5, (4, 6), 2, 1),
        ((2, 4, 6, 5), 5, (4, 6), 0, 0),
        ((2, 5, 4, 6), 5, (4, 6), 0, 0),
        ((2, 5, 4, 5), 5, (5, 4), 0, 0),
    ],
)
def test_views_put_patches_back(shape: tuple[int, ...], dim: int, grid: Any, leading: int, trailing: int) -> None:
    tensor = torch.randn(shape)
    found = view(tensor, dim, ((4, 6),))
    assert (found.grid, found.leading, found.trailing) == (grid, leading, trailing)
    assert found.patches.shape == (2, grid[0] * grid[1], dim)
    assert torch.equal(found.put_back(found.patches, tensor), tensor)
    changed = found.put_back(found.patches + 1, tensor)
    assert changed.stride() == tensor.stride()
    end = tensor.shape[1] - trailing
    inside = (slice(None), slice(leading, end)) if len(shape) == 3 else ...
    tensor[inside] += 1
    assert torch.equal(changed, tensor)


def test_sequence_without_grid_keeps_declared_tokens_apart() -> None:
    found = view(torch.randn(2, 12, 5), 5)
    assert (found.grid, found.leading, found.trailing, found.patches.shape[1]) == (None, 2, 1, 9)


@pytest.mark.parametrize("shape", [(2, 5), (2, 24, 6), (2, 4, 6, 7), (2, 2, 2, 4, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, N, 5\), \(B, h, w, 5\) or \(B, 5, h, w\), found"):
        view(torch.randn(shape), 5)


def test_masked_mask_units_have_no_grid() -> None:
    for name in ("timm-Hiera", "transformers-HieraModel"):
        tower = find_tower(build(name))
        order = wrap_backbone(tower.root, MGFCConfig(rank=4)).calibration.blocks[0].order
        assert isinstance(order, MaskUnitOrder)
        tokens = torch.randn(1, 8, 16)
        found = order.view(tokens, None)
        assert found.grid is None
        assert found.patches is tokens


def test_containers_keep_their_type() -> None:
    Pair = namedtuple("Pair", "tokens size")
    old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for output in ((old, None), [old, 3], Pair(old, (1, 2)), (torch.zeros(2), old)):
        assert pick_tensor(output) is old
        result = put_tensor(output, old, new)
        assert type(result) is type(output)
        assert [item is new for item in result] == [item is old for item in output]
    assert put_tensor(old, old, new) is new
    assert pick_tensor((None, 3)) is None
    assert pick_tensor({"a": old}) is None


def test_padding_from_attention_masks() -> None:
    real = torch.tensor([[True, True, False]])
    mask = real[:, None, None].expand(1, 1, 3, 3)
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(padding((mask,), {}, 3), real)
    assert torch.equal(padding((), {"attn_mask": additive}, 3), real)
    assert padding((mask,), {}, 4) is None


# Detection and description


def test_two_towers_are_ambiguous() -> None:
    both = nn.ModuleDict({"left": build("transformers-Dinov2Model"), "right": build("transformers-SiglipVisionModel")})
    with pytest.raises(UnsupportedBackboneError, match=r"found 2: left, right"):
        find_tower(both)


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("transformers-CLIPModel", "vision_model"),
        ("transformers-TimmWrapperModel", "timm_model"),
        ("transformers-SwinBackbone", ""),
        ("transformers-DepthAnythingForDepthEstimation", "backbone"),
        ("transformers-ViTMAEModel", ""),
    ],
)
def test_tower_inside_composites(name: str, root: str) -> None:
    assert find_tower(build(name)).name == root


def test_patch_size_of_stems() -> None:
    expected = {
        "timm-VisionTransformer-dinov2": (14, 14),
        "transformers-Dinov2Model": (8, 8),
        "transformers-CLIPModel": (8, 8),
    }
    for name, size in expected.items():
        if any(case.name == name for case in CASES):
            assert patch_size(find_tower(build(name))) == size
    assert patch_size(find_tower(timm.create_model("vit_tiny_patch16_224", **{**SIZES, "patch_size": 16}))) == (16, 16)


def test_fingerprint_tells_weights_and_forgives_precision() -> None:
    torch.manual_seed(0)
    first, second = (timm.create_model("vit_tiny_patch16_224", **SIZES) for _ in range(2))
    own = torch.tensor(fingerprint(find_tower(first)))
    half = torch.tensor(fingerprint(find_tower(copy.deepcopy(first).bfloat16())))
    other = torch.tensor(fingerprint(find_tower(second)))
    assert ((own - half).abs() / own).max() < 2e-3
    assert ((own - other).abs() / own).max() > 1e-2


def test_base_model_is_a_hub_id_or_nothing(tmp_path: Any) -> None:
    vit = timm.create_model("vit_small_patch14_dinov2.lvd142m", **SIZES)
    assert describe(find_tower(vit))["base_model"] == "timm/vit_small_patch14_dinov2.lvd142m"
    model = build("transformers-Dinov2Model")
    assert describe(find_tower(model))["base_model"] is None
    model.config.name_or_path = "facebook/dinov2-small"
    assert describe(find_tower(model))["base_model"] == "facebook/dinov2-small"
    model.config.name_or_path = str(tmp_path)
    assert describe(find_tower(model))["base_model"] is None


@pytest.mark.parametrize(
    ("name", "entry", "hidden"),
    [
        ("timm-VisionTransformer-cls", ["mlp.fc1"], 128),
        ("timm-VisionTransformer-aimv2", ["mlp.fc1_g", "mlp.fc1_x"], 176),  # gate and value
        ("transformers-Aimv2VisionModel", ["ffn.gate_proj", "ffn.up_proj"], 128),
        ("timm-VisionTransformerRelPos", ["mlp.fc1"], 128),  # not attn.rel_pos.mlp.fc1
        ("transformers-Swinv2Model", ["intermediate.dense"], 64),  # nor attention.output.dense
        ("transformers-VitPoseBackbone-moe", ["mlp.fc1"], 128),  # shared by the experts
        ("timm-VisionTransformer-parallel-things", ["ffns.0.mlp.fc1"], 128),
        ("timm-VisionTransformer-parallel-scaling", ["mlp_out_proj"], 32),  # its first map is used without being called
        ("timm-VisionTransformer-parallel-diff", ["out_proj"], 32),
        ("timm-MultiScaleVit", ["mlp.fc1"], 64),
    ],
)
def test_where_a_feed_forward_network_begins(name: str, entry: list[str], hidden: int) -> None:
    tower = find_tower(build(name))
    block = tower.modules()[0]
    linears = first_linears(block)
    assert [part for part, module in block.named_modules() if any(module is found for found in linears)] == entry
    widths = block_widths(block)
    assert widths.hidden == hidden == sum(module.out_features for module in linears)
    assert widths.entry == linears[0].in_features


def test_extra_tokens_around_the_patches() -> None:
    tracker = GridTracker(max_extra=3)
    tracker.recent = ((4, 6),)

    def around(tensor: Tensor, order: Any) -> tuple[int, int]:
        found = view_patches(tensor, 8, order, tracker)
        return found.leading, found.trailing

    assert around(torch.zeros(2, 27, 8), RasterOrder(0, 1)) == (2, 1)
    assert around(torch.zeros(2, 50, 8), RasterOrder(2, 1)) == (2, 1), "as declared where there is no grid"
    assert around(torch.zeros(8, 7, 8), WindowOrder(2, 1)) == (1, 0)
    assert around(torch.zeros(2, 4, 6, 8), RasterOrder(2, 1)) == (0, 0)


@pytest.mark.parametrize(("shape", "moved"), [((2, 12, 8), False), ((2, 3, 4, 8), False), ((2, 8, 3, 4), True)], ids=str)
def test_channels_last(shape: tuple[int, ...], moved: bool) -> None:
    tensor = torch.randn(shape)
    tokens, was_moved = channels_last(tensor, 8)
    assert tokens.shape[-1] == 8 and was_moved == moved
    assert torch.equal(channels_back(tokens, was_moved), tensor)
    with pytest.raises(ValueError, match=r"expected \(B, N, 7\).*found"):
        channels_last(torch.zeros(shape), 7)


def test_block_without_linear_maps() -> None:
    with pytest.raises(UnsupportedBackboneError, match="expected a block with linear layers"):
        block_widths(nn.ReLU())


def test_evaluating_gives_every_module_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()

    def fail() -> None:
        assert not any(module.training for module in model.modules())
        raise KeyError

    with pytest.raises(KeyError), evaluating(model):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False, False]
