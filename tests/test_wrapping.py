"""The contract of `wrap_backbone`, for every class of the zoo."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
from helpers import SIZES, assert_unchanged, forget, only_layer, randomise, same, snapshot, tensors
from packaging.version import Version
from test_zoo import flat, grid_starts, in_raster_order
from torch import Tensor, nn
from zoo import CASES, Case, cases

from mgfc import (
    Calibration,
    CalibrationError,
    ConfigError,
    FineConfig,
    MGFCConfig,
    UnsupportedBackboneError,
    get_calibration,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.backbones.layout import pick_tensor, view_patches

SUPPORTED = [case for case in cases() if case.tier in (1, 2)]
CONFIG = MGFCConfig(rank=4, fine=FineConfig())
REFUSED = {
    "timm-Nest": "split into image blocks",
    "timm-TNT": "several token streams",
    "timm-CrossVit": "several token streams",
    "timm-CoaT-parallel": "several token streams",
    "timm-ByobNet-mobilevit": "folded patches",
    "transformers-MobileViTModel": "folded patches",
    "transformers-SegGptModel": "several images of a batch item",
    "transformers-MllamaVisionModel": "several images of a batch item",
    "transformers-TimesformerModel": "several images of a batch item",
    "transformers-PixtralVisionModel": "images of different grids share one sequence",
    "transformers-GroupViTVisionModel": "merged into groups",
    "transformers-ViltModel": "found text beside it",
    "transformers-HieraBackbone": "scrambled",
    "transformers-Qwen2VisionTransformerPretrainedModel": "3-D convolution",
    "transformers-Qwen2_5_VisionTransformerPretrainedModel": "3-D convolution",
    "transformers-Qwen3VLVisionModel": "3-D convolution",
    "transformers-Glm4vVisionModel": "3-D convolution",
    "transformers-VideoMAEModel": "3-D convolution",
    "transformers-VivitModel": "3-D convolution",
    "transformers-VJEPA2Model": "3-D convolution",
}
every_class = pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)


def wrapped(case: Case, **build: Any) -> tuple[nn.Module, Calibration]:
    model = wrap_backbone(case.build(**build), CONFIG)
    calibration = get_calibration(model)
    randomise(calibration)
    return model, calibration


def maps(case: Case, model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """The model's own feature maps, by the way that they are asked for."""
    found: dict[str, list[Tensor]] = {}
    if "forward_intermediates" in case.features:
        found["forward_intermediates"] = list(model.forward_intermediates(images, intermediates_only=True))
    if {"hidden_states", "feature_maps"} & set(case.features):
        output = case.call(model, images, output_hidden_states=True)
        for kind in {"hidden_states", "feature_maps"} & set(case.features):
            found[kind] = list(getattr(output, kind))
    return found


def tokens_of(case: Case, model: nn.Module, images: Tensor) -> list[Tensor]:
    """What leaves each block, after refinement, extra and patch tokens in the block's own order."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, output: seen.append(flat(case, case.tokens(output))))
        for name in case.blocks
    ]
    case.call(model, images)
    for hook in hooks:
        hook.remove()
    return seen


@every_class
@torch.no_grad()
def test_fresh_calibrators_change_nothing(case: Case) -> None:
    model, images = case.build(), case.images()
    bare, bare_maps = case.call(model, images), maps(case, model, images)
    before, kind, signature = snapshot(model), type(model), model.forward
    # Freezing alone can make PyTorch choose another kernel on a CPU, so the flags stay as they were.
    assert wrap_backbone(model, CONFIG, freeze=False) is model
    assert type(model) is kind
    assert model.forward == signature
    calibration = get_calibration(model)
    own = {name for name in model.state_dict() if "calibration." in name}
    assert set(before["state"]) == set(model.state_dict()) - own
    assert same(case.call(model, images), bare)
    assert same(maps(case, model, images), bare_maps) or not case.features
    randomise(calibration)
    changed = tokens_of(case, model, images)
    with calibration.disabled():
        assert same(case.call(model, images), bare)
        assert all(not torch.equal(a, b) for a, b in zip(changed, tokens_of(case, model, images), strict=True))
    unwrap_backbone(model)
    assert_unchanged(model, before)
    assert same(case.call(model, images), bare)


@every_class
@torch.no_grad()
def test_blocks_and_grid(case: Case) -> None:
    model, images = case.build(), case.images()
    case.call(model, images)  # Transformers adds hooks of its own on demand
    before = snapshot(model)
    calibration = get_calibration(wrap_backbone(model, CONFIG))
    randomise(calibration)
    prefix = next(name for name, module in model.named_modules() if module is calibration.backbone)
    assert tuple(".".join(filter(None, (prefix, name))) for name in calibration.block_names) == case.blocks
    assert tuple(layer.dim for layer in calibration.layers.values()) == case.dims
    kwargs = case.kwargs(images) if callable(case.kwargs) else dict(case.kwargs or {})
    if case.library == "timm":
        reports = calibration.check(kwargs.get("images", images), model=model)
    else:
        reports = calibration.check(model=model, **{case.input_name: images, **kwargs})
    assert tuple(report.grid for report in reports) == case.grids
    assert tuple(report.leading for report in reports) == case.leading
    assert tuple(report.trailing for report in reports) == case.trailing
    assert all(report.changed for report in reports)
    unwrap_backbone(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("case", [c for c in SUPPORTED if c.grids[0] is not None], ids=lambda case: case.name)
@torch.no_grad()
def test_patches_are_in_their_places(case: Case) -> None:
    """The most changed patch is that of the perturbed image cell, and refinement goes back to where it came from."""
    model, calibration = wrapped(case)
    with calibration.disabled():
        seen: dict[int, Tensor] = {}

        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                tensor = pick_tensor(output)
                hooks = calibration.blocks[index]
                view = view_patches(tensor, calibration.layers[str(index)].dim, hooks.order, hooks.tracker, output)
                seen[index] = view.patches
                assert torch.equal(view.put_back(view.patches, tensor), tensor)
                assert (view.put_back(view.patches + 1, tensor) != tensor).sum() == view.patches.numel()

            return hook

        for index, name in enumerate(case.blocks):
            model.get_submodule(name).register_forward_hook(keep(index), with_kwargs=True)

        def patches(images: Tensor, index: int) -> Tensor:
            case.call(model, images)
            return seen[index]

        assert all(in_raster_order(case, n, partial(patches, index=n), leading=0) for n in grid_starts(case))


@every_class
@torch.no_grad()
def test_refinement_reaches_successors_and_feature_maps(case: Case) -> None:
    model, calibration = wrapped(case)
    images, depth = case.images(), len(case.blocks)
    with calibration.disabled():
        bare, bare_maps = tokens_of(case, model, images), maps(case, model, images)
    for index in range(depth):
        only_layer(calibration, index)
        refined, refined_maps = tokens_of(case, model, images), maps(case, model, images)
        changed = [not torch.equal(a, b) for a, b in zip(bare, refined, strict=True)]
        assert changed == [n >= index for n in range(depth)]
        for kind, found in refined_maps.items():
            differ = [not torch.equal(a, b) for a, b in zip(tensors(bare_maps[kind]), tensors(found), strict=True)]
            assert case.tier > 1 or differ == sorted(differ)
            assert differ[-1], f"{kind} miss the refinement of {case.blocks[index]}"
            if case.tier == 1 and len(found) in (depth, depth + 1):
                assert differ[-depth:] == [n >= index for n in range(depth)]
        nn.init.zeros_(calibration.layers[str(index)].low_rank.up)  # which adapts every token; the stages patches alone
        staged = tokens_of(case, model, images)[index]
        leading, end = case.leading[index], staged.shape[1] - case.trailing[index]
        assert torch.equal(staged[:, :leading], bare[index][:, :leading])
        assert torch.equal(staged[:, end:], bare[index][:, end:])
        has_stage = calibration.layers[str(index)].medium is not None
        assert torch.equal(staged[:, leading:end], bare[index][:, leading:end]) != has_stage


PATCHES_GIVEN = ("NaFlexVit-packed", "Siglip2VisionModel", "Llama4VisionModel", "Gemma4VisionModel")
MAPS_GIVEN = ("timm-EfficientFormer", "timm-FastVit")  # behind their stem


@pytest.mark.parametrize("case", [c for c in cases() if c.name not in REFUSED], ids=lambda case: case.name)
@torch.no_grad()
def test_images_are_calibrated_once_on_their_way_in(case: Case) -> None:
    model, calibration = wrapped(case)
    coarse, images = calibration.adapter.coarse, 2 * case.images() + 1
    entering: list[tuple[Tensor, Tensor]] = []
    if coarse is not None:
        coarse.register_forward_hook(lambda module, args, output: entering.append((args[0], output)))
    output = case.call(model, images)
    if case.name.endswith(PATCHES_GIVEN):
        assert not entering
        return
    ((seen, calibrated),) = entering
    assert coarse is not None and seen.shape[1] == coarse.source.value.shape[-1]
    if case.name in MAPS_GIVEN:
        assert seen.ndim == 4
        return
    assert not torch.equal(seen, calibrated)
    forget(coarse)
    if case.architecture == "VitMatteForImageMatting":  # its processor puts a trimap behind the image
        assert torch.equal(seen, torch.cat([images, images[:, :1]], dim=1))
        expected = model(pixel_values=calibrated)
    elif case.architecture == "RadioModel":  # normalises images itself
        own = model.get_submodule(next(n for n, m in model.named_modules() if type(m).__name__ == "RadioInputConditioner"))
        assert torch.equal(seen, own(images))
        expected = case.call(model, calibrated * own.norm_std + own.norm_mean)
    else:
        assert torch.equal(seen, images)
        expected = case.call(model, calibrated)
    for one, other in zip(tensors(output), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in SUPPORTED if "features_only" in c.features], ids=lambda case: case.name)
def test_features_only(case: Case) -> None:
    model, images = case.build(features_only=True, out_indices=(0, 1, 2) if case.tier == 1 else (0, 1)), case.images()
    with torch.no_grad():
        bare = model(images)
        wrap_backbone(model, CONFIG, freeze=False)  # frozen, it may run other kernels
        assert same(model(images), bare)
        randomise(get_calibration(model))
        assert not torch.equal(model(images)[-1], bare[-1])


@every_class
def test_gradients_reach_calibrators_alone(case: Case) -> None:
    model, calibration = wrapped(case)
    torch.stack([tokens.square().mean() for tokens in tokens_of(case, model, case.images())]).sum().backward()
    own = {f"calibration.{name}": p for name, p in calibration.named_parameters()}
    unused = () if any(grid is not None for grid in case.grids) else ("fine",)
    for name, parameter in own.items():
        if not any(part in name.split(".") for part in unused):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    ids = {id(parameter) for parameter in own.values()}
    others = [p for p in calibration.backbone.parameters() if id(p) not in ids]
    assert all(p.grad is None and not p.requires_grad for p in others)
    frozen = {id(p) for p in others} | ids
    assert all(p.requires_grad for p in model.parameters() if id(p) not in frozen)


@every_class
@torch.no_grad()
def test_copies_are_independent(case: Case) -> None:
    model, calibration = wrapped(case)
    images = case.images()
    expected = case.call(model, images)
    copies = [copy.deepcopy(model)]
    try:
        pickle.dumps(case.build())
        copies.append(pickle.loads(pickle.dumps(model)))
    except (AttributeError, pickle.PicklingError):
        pass  # some Transformers models cannot be pickled, wrapped or not
    other = wrap_backbone(case.build(), CONFIG)
    other.load_state_dict(model.state_dict())
    for twin in [*copies, other]:
        assert same(case.call(twin, images), expected)
        randomise(get_calibration(twin), std=1.0)
        assert not same(tokens_of(case, twin, images), tokens_of(case, model, images))
        assert same(case.call(model, images), expected)
        unwrap_backbone(twin)
    assert same(case.call(model, images), expected)
    assert get_calibration(model) is calibration


CHECKPOINTED = [c for c in SUPPORTED if c.checkpointing]
# PyTorch's reentrant form follows neither tensors by keyword nor those in nested tuples, whatever is trained.
NOT_REENTRANT = {"Llama4VisionModel", "MaskFormerSwinBackbone", "PvtV2Model", "PvtV2Backbone"}
REENTRANT = [c for c in CHECKPOINTED if c.library == "transformers" and c.architecture not in NOT_REENTRANT]


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, None) for case in CHECKPOINTED), *((case, {"use_reentrant": True}) for case in REENTRANT)],
    ids=lambda value: getattr(value, "name", "reentrant" if value else "default"),
)
def test_checkpointing_gives_the_same_gradients(case: Case, options: dict[str, bool] | None) -> None:
    """Two forwards, at other sizes where the class permits, before one backward."""
    if options and Version(version("transformers")) < Version("5.23"):
        pytest.skip("Transformers before 5.23 gives no gradients with use_reentrant=True")
    grads = []
    for checkpointing in (False, True):
        model, calibration = wrapped(case)
        torch.manual_seed(1)
        randomise(calibration)
        if checkpointing:
            model.set_grad_checkpointing(True) if case.library == "timm" else model.gradient_checkpointing_enable(options)
        model.train()
        height, width = case.image_size
        sizes = [(height, width), (width, height)] if case.dynamic else [(height, width)] * 2
        torch.manual_seed(2)
        losses = []
        for seed, size in enumerate(sizes):
            output = case.call(model, case.images(seed=seed, size=size))
            losses += [t.float().square().mean() for t in tensors(output) if t.is_floating_point() and t.requires_grad]
        torch.stack(losses).sum().backward()
        grads.append({n: p.grad for n, p in calibration.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 0
    for name, grad in grads[0].items():
        atol = 1e-6 if options else 1e-7
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", cases(tier=3), ids=lambda case: case.name)
def test_tier_3_works_or_says_why(case: Case) -> None:
    model, images = case.build(), case.images()
    before = snapshot(model)
    if case.name in REFUSED:
        with pytest.raises(UnsupportedBackboneError, match=REFUSED[case.name]):
            wrap_backbone(model, CONFIG)
        assert_unchanged(model, before)
        return
    wrap_backbone(model, CONFIG)
    calibration = get_calibration(model)
    randomise(calibration)
    assert tuple(layer.dim for layer in calibration.layers.values()) == case.dims
    with torch.no_grad():
        refined = tokens_of(case, model, images)
        with calibration.disabled():
            assert all(not torch.equal(a, b) for a, b in zip(refined, tokens_of(case, model, images), strict=True))


def tiny() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=5, **SIZES)


def test_second_wrap_raises() -> None:
    model = wrap_backbone(tiny(), CONFIG)
    before = snapshot(model)
    with pytest.raises(UnsupportedBackboneError, match=r"wrapped already.*unwrap_backbone"):
        wrap_backbone(model)
    assert_unchanged(model, before)


def test_unwrap_and_get_need_a_calibration() -> None:
    with pytest.raises(CalibrationError, match="expected one calibration, found none"):
        unwrap_backbone(tiny())
    two = nn.ModuleList([wrap_backbone(tiny(), CONFIG), wrap_backbone(tiny(), CONFIG)])
    with pytest.raises(CalibrationError, match=r"found 0.calibration, 1.calibration"):
        get_calibration(two)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: "not a module", "Expected a torch.nn.Module, found str"),
        (lambda: nn.Linear(3, 3), "Linear: expected a vision transformer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "found no list of blocks"),
        (lambda: timm.create_model("resnet18"), "ResNet: expected a vision transformer"),
        (lambda: timm.create_model("mixer_s32_224"), "MlpMixer: expected a vision transformer"),
    ],
    ids=["string", "linear", "sequential", "resnet", "mixer"],
)
def test_not_a_vit(build: Callable[[], Any], message: str) -> None:
    model = build()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(UnsupportedBackboneError, match=message):
        wrap_backbone(model)
    if before is not None:
        assert_unchanged(model, before)


def test_a_list_of_images_of_several_sizes_is_refused() -> None:
    """As DINOv2's own repository takes: its blocks would return a list, of which one tensor can be told to be tokens."""
    model = wrap_backbone(tiny(), CONFIG)
    block = model.blocks[0]
    plain = block.forward
    block.forward = lambda x: [plain(item) for item in x] if isinstance(x, list) else plain(x)
    tokens = [torch.randn(1, 25, 32), torch.randn(1, 13, 32)]
    block(tokens[0])
    with pytest.raises(CalibrationError, match="expected images of one size, found a list of 2 tensors"):
        block(tokens)


def test_blocks_that_are_no_expression() -> None:
    with pytest.raises(UnsupportedBackboneError, match=r"blocks: expected a regular expression, found '\('"):
        wrap_backbone(tiny(), blocks="(")


def test_graphs_and_compiled_models_are_refused() -> None:
    with pytest.raises(UnsupportedBackboneError, match="Wrap the original model first, then compile"):
        wrap_backbone(torch.compile(tiny(), backend="eager"))
    for part in (lambda model: model, lambda model: model.blocks[0]):
        model = tiny()
        part(model).compile(backend="eager")
        with pytest.raises(UnsupportedBackboneError, match="Wrap the original model first, then compile"):
            wrap_backbone(model)
    with pytest.raises(UnsupportedBackboneError, match="found a traced graph"):
        wrap_backbone(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))


def test_blocks_that_take_the_batch_second_are_refused() -> None:
    class Block(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 2, batch_first=batch_first)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    class Clip(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 32, 8, 8)
            self.blocks = nn.ModuleList(Block(batch_first) for _ in range(2))
            self.batch_first = batch_first

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.conv1(images).flatten(2).mT
            tokens = tokens if self.batch_first else tokens.transpose(0, 1)
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    get_calibration(wrap_backbone(Clip(batch_first=True), CONFIG)).check(torch.randn(2, 3, 32, 48))
    model = Clip(batch_first=False)
    before = snapshot(model)
    with pytest.raises(UnsupportedBackboneError, match=r"found that blocks.0 attends over the first axis .* batch_first=True"):
        wrap_backbone(model, CONFIG)
    assert_unchanged(model, before)


def test_a_sequence_passes_through() -> None:
    vit, images = tiny().eval(), torch.randn(1, 3, 32, 48)
    sequence = nn.Sequential(vit.patch_embed, nn.Flatten(1, 2), *vit.blocks)
    bare = sequence(images)
    wrap_backbone(sequence, CONFIG)
    assert torch.equal(sequence(images), bare)
    assert [report.grid for report in sequence.calibration.check(images)] == [(4, 6)] * 3


def test_text_beside_the_tower_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text, self.token_embedding = tiny(), tiny().blocks, nn.Embedding(10, 32)

    with pytest.raises(UnsupportedBackboneError, match=r"found text beside it \(token_embedding\)"):
        wrap_backbone(Pair())


def test_occupied_name_is_refused() -> None:
    model = tiny()
    model.calibration = "taken"
    with pytest.raises(UnsupportedBackboneError, match="attribute `calibration` of its own"):
        wrap_backbone(model)
    assert model.calibration == "taken"


def test_explicit_blocks() -> None:
    images = torch.randn(1, 3, 32, 48)
    by_regex = wrap_backbone(tiny(), CONFIG, blocks=r"blocks\.[12]")
    assert by_regex.calibration.block_names == ("blocks.1", "blocks.2")
    assert [r.grid for r in by_regex.calibration.check(images)] == [(4, 6)] * 2
    by_name = wrap_backbone(tiny(), CONFIG, blocks=["blocks.0"])
    assert by_name.calibration.block_names == ("blocks.0",)
    with pytest.raises(UnsupportedBackboneError, match=r"no module named 'blocks.9'"):
        wrap_backbone(tiny(), blocks=["blocks.9"])
    with pytest.raises(UnsupportedBackboneError, match="found no list of blocks"):
        wrap_backbone(tiny(), blocks="nothing")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (MGFCConfig(rank=33), "expected at most 32.*found 33"),
        (MGFCConfig(rank=4, layers=(3,)), r"block indices of a backbone of 3 blocks, found \(3,\)"),
        (MGFCConfig(rank=4, layers="last:4"), "at most the backbone's 3 blocks"),
        (3, "expected an MGFCConfig, a directory or a Hub id, found int"),
    ],
)
def test_configuration_that_does_not_fit(adapter: Any, message: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        wrap_backbone(model, adapter)
    assert_unchanged(model, before)


def test_default_budget() -> None:
    shares = {}
    for name, limit in {"small": 3.0, "base": 1.5, "large": 1.0}.items():
        with torch.device("meta"):
            vit = timm.create_model(f"vit_{name}_patch14_dinov2", num_classes=0)
        total = sum(p.numel() for p in vit.parameters())
        shares[name] = 100 * wrap_backbone(vit).calibration.num_parameters / total
        assert shares[name] <= limit, shares
    assert math.isclose(shares["small"], 1.67, abs_tol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_half_precision_backbone(dtype: torch.dtype) -> None:
    model, images = tiny().eval().to(dtype), torch.randn(1, 3, 32, 48, dtype=dtype)
    bare = model(images)
    wrap_backbone(model, CONFIG)
    assert {p.dtype for p in model.calibration.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert same(model(images), bare)
    randomise(model.calibration)
    assert model(images).dtype == dtype
    model.to(dtype)
    assert model(images).dtype == dtype


def test_batch_norms_that_the_user_froze_stay_so() -> None:
    case = next(case for case in CASES if case.name == "timm-LevitDistilled" or case.family == "LeViT")
    model = case.build().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    norms[0].eval()
    unwrap_backbone(wrap_backbone(model))
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)
