"""Feature maps against what each library itself returns for the same blocks."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from tiny import calibrated, tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Backbone, Dinov2Config, ViTMAEConfig, ViTMAEModel

from mgfc import CalibrationError, ConfigError, FeatureMaps, MGFCConfig, UnsupportedBackboneError, unwrap_backbone

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def with_registers() -> nn.Module:
    return tiny_vit(reg_tokens=4)


def without_class_token() -> nn.Module:
    return tiny_vit(class_token=False, global_pool="avg")


def swin() -> nn.Module:
    options = {"embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 4, "img_size": (64, 96)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **options).eval()


def reference(vit: nn.Module, indices: tuple[int, ...]) -> list[Tensor]:
    """Timm's own maps. For Swin its indices are stages."""
    options = {"output_fmt": "NCHW", "intermediates_only": True, "norm": False}
    return vit.forward_intermediates(IMAGES, indices=list(indices), **options)


timm_vits = pytest.mark.parametrize("make", [tiny_vit, with_registers, without_class_token])


@timm_vits
@torch.no_grad()
def test_a_bare_timm_vit_gives_timms_own_maps(make: Any) -> None:
    vit = make()
    maps = FeatureMaps(vit, (0, 2))(IMAGES)
    for own, expected in zip(maps, reference(vit, (0, 2)), strict=True):
        assert own.shape == (2, 32, 4, 6) and torch.equal(own, expected)


@timm_vits
@pytest.mark.parametrize("wrapped_first", [True, False])
@torch.no_grad()
def test_a_calibrated_timm_vit_gives_the_refined_maps(make: Any, wrapped_first: bool) -> None:
    vit = make()
    bare = reference(vit, (0, 2))
    if wrapped_first:
        calibrated(vit)
        features = FeatureMaps(vit, (0, 2))
    else:
        features = FeatureMaps(vit, (0, 2))
        calibrated(vit)
    refined = reference(vit, (0, 2))
    for own, expected, plain in zip(features(IMAGES), refined, bare, strict=True):
        assert torch.equal(own, expected) and (own - plain).abs().max() > 1e-2
    with vit.calibration.disabled():
        assert all(map(torch.equal, features(IMAGES), bare))
    unwrap_backbone(vit)
    assert all(map(torch.equal, features(IMAGES), bare))


@pytest.mark.parametrize("wrapped_first", [True, False, None], ids=["before", "after", "never"])
@torch.no_grad()
def test_transformers_maps_are_those_of_its_backbone_class(wrapped_first: bool | None) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
    config = Dinov2Config(**options, out_indices=[1, 3], apply_layernorm=False)  # stage 0 is the stem
    own, images = Dinov2Backbone(config).eval(), IMAGES[:, :, :56, :84]
    bare = own(images).feature_maps
    if wrapped_first:
        calibrated(own)
    features = FeatureMaps(own, (0, 2))
    if wrapped_first is False:
        calibrated(own)
    maps = features(images)
    for item, expected, plain in zip(maps, own(images).feature_maps, bare, strict=True):
        assert item.shape == (2, 32, 4, 6) and torch.equal(item, expected)
        assert wrapped_first is None or (item - plain).abs().max() > 1e-2


@torch.no_grad()
def test_transformers_models_give_their_hidden_states_as_maps() -> None:
    model, images = tiny_dinov2(), IMAGES[:, :, :56, :84]
    calibrated(model)
    states = model(images, output_hidden_states=True).hidden_states
    for index, item in zip((0, 1, 2), FeatureMaps(model, (0, 1, 2))(images), strict=True):
        assert torch.equal(item.flatten(2).mT, states[index + 1][:, 1:])


@torch.no_grad()
def test_a_host_model_is_searched_for_its_tower() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = tiny_vit(), nn.Conv2d(32, 5, 1)

    host = Host()
    features = FeatureMaps(host, (1,))
    assert torch.equal(features(IMAGES)[0], FeatureMaps(host.encoder, (1,))(IMAGES)[0])
    assert features.channels == [32]


@torch.no_grad()
def test_swin_maps_keep_each_stages_size() -> None:
    model = swin()
    features = FeatureMaps(model, (0, 1, 3))
    assert features.channels == [16, 32, 64]
    maps = features(IMAGES)
    assert [tuple(item.shape) for item in maps] == [(2, 16, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6)]
    assert all(map(torch.equal, maps, reference(model, (0, 1, 2))))
    calibrated(model, MGFCConfig(rank=4))
    refined = features(IMAGES)
    assert all(map(torch.equal, refined, reference(model, (0, 1, 2))))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(refined, maps, strict=True))


@torch.no_grad()
def test_indices_order_repetition_and_names_of_blocks() -> None:
    vit = tiny_vit()
    first, second, third = FeatureMaps(vit, (0, 1, 2))(IMAGES)
    for indices, expected in (((-1,), [third]), ((-3, -1), [first, third]), ((2, 0), [third, first]), ((1, 1), [second] * 2)):
        features = FeatureMaps(vit, indices)
        assert all(map(torch.equal, features(IMAGES), expected)) and features.channels == [32] * len(indices)
    assert FeatureMaps(vit, (-1,)).out_indices == (2,)
    named = FeatureMaps(vit, (0,), blocks=["blocks.1", "blocks.2"])
    assert torch.equal(named(IMAGES)[0], second)


@torch.no_grad()
def test_scales_resize_bilinearly() -> None:
    vit = tiny_vit()
    plain = FeatureMaps(vit, (0, 1, 2))(IMAGES)
    scaled = FeatureMaps(vit, (0, 1, 2), scales=(4, 1, 0.5))(IMAGES)
    assert [tuple(item.shape[2:]) for item in scaled] == [(16, 24), (4, 6), (2, 3)]
    assert torch.equal(scaled[1], plain[1])
    assert torch.equal(scaled[0], F.interpolate(plain[0], scale_factor=4, mode="bilinear", align_corners=False))


@torch.no_grad()
def test_any_size_from_call_to_call() -> None:
    features = FeatureMaps(tiny_vit(), (2,))
    before = features(IMAGES)[0]
    for size in ((16, 16), (32, 160), (160, 32)):
        assert features(torch.randn(1, 3, *size))[0].shape == (1, 32, size[0] // 16, size[1] // 16)
    assert torch.equal(features(IMAGES)[0], before)


@pytest.mark.parametrize("indices", [(), (3,), (-4,), (0, 7)], ids=str)
def test_wrong_indices(indices: tuple[int, ...]) -> None:
    vit = tiny_vit()
    with pytest.raises(ConfigError) as caught:
        FeatureMaps(vit, indices)
    assert "out_indices: expected block indices of a backbone of 3 blocks" in str(caught.value)
    assert str(indices) in str(caught.value)
    assert not any(module._forward_hooks for module in vit.modules())


def test_wrong_number_of_scales() -> None:
    for scales in ((1, 2, 3), (1, 0)):
        with pytest.raises(ConfigError, match=r"scales: expected a number above 0 for each of 2 maps, found \(1,"):
            FeatureMaps(tiny_vit(), (0, 1), scales=scales)


@torch.no_grad()
def test_sizes_of_a_pyramid_are_multiples_of_the_smallest() -> None:
    maps = FeatureMaps(tiny_vit(), (0, 1, 2, 2), scales=(4, 2, 1, 0.5))
    found = [tuple(item.shape[2:]) for item in maps(torch.randn(1, 3, 7 * 16, 1 * 16))]
    assert found == [(32, 8), (16, 4), (8, 2), (4, 1)]


@torch.no_grad()
def test_a_pyramid_is_exported_with_dynamic_sizes() -> None:
    maps = FeatureMaps(tiny_vit(), (0, 1, 2), scales=(2, 1, 0.5))
    height, width = (torch.export.Dim(name, min=2, max=20) for name in ("height", "width"))
    program = torch.export.export(maps, (torch.randn(1, 3, 64, 96),), dynamic_shapes=({2: 16 * height, 3: 16 * width},))
    for size in ((64, 96), (112, 48)):
        images = torch.randn(1, 3, *size)
        for found, expected in zip(program.module()(images), maps(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_not_a_transformer() -> None:
    with pytest.raises(UnsupportedBackboneError):
        FeatureMaps(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (0,))


def test_masked_input_has_no_maps() -> None:
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=64, decoder_hidden_size=32
    )
    features = FeatureMaps(ViTMAEModel(config).eval(), (2,))
    with pytest.raises(CalibrationError, match=r"ViTMAEModel: expected a map from block 2.*no grid \(masked or padded input\)"):
        features(torch.randn(1, 3, 64, 64))


def test_a_block_that_is_not_called_is_named() -> None:
    vit = tiny_vit()
    features = FeatureMaps(vit, (0, 2))
    vit.blocks = vit.blocks[:2]
    with pytest.raises(CalibrationError, match="VisionTransformer: expected a map from block 2"):
        features(IMAGES)


def test_a_failed_forward_keeps_nothing() -> None:
    features = FeatureMaps(tiny_vit(), (0,))
    with pytest.raises((RuntimeError, AssertionError)):
        features(torch.randn(1, 5, 64, 64))
    assert features._forward.maps is None and features(IMAGES)[0].shape == (2, 32, 4, 6)


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    maps = FeatureMaps(model, (0, 2))(images)
    sum(item.square().mean() for item in maps).backward()
    return [p.grad.clone() for p in model.calibration.parameters() if p.grad is not None]


def timm_checkpointing(model: nn.Module, reentrant: bool) -> None:
    model.set_grad_checkpointing()


def transformers_checkpointing(model: nn.Module, reentrant: bool) -> None:
    if reentrant and Version(version("transformers")) < Version("5.23"):
        pytest.skip("Transformers before 5.23 gives no gradients here")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("make", "enable", "images"),
    [(tiny_vit, timm_checkpointing, IMAGES), (tiny_dinov2, transformers_checkpointing, IMAGES[:, :, :56, :84])],
    ids=["timm", "transformers"],
)
def test_checkpointing_gives_the_same_gradients(make: Any, enable: Any, images: Tensor, reentrant: bool) -> None:
    model = make()
    calibrated(model)
    model.train()
    expected = gradients(model, images)
    enable(model, reentrant)
    found = gradients(model, images)
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_deep_copy_is_independent() -> None:
    features = FeatureMaps(tiny_vit(), (0, 2))
    calibrated(features.backbone)
    expected = features(IMAGES)
    twin = copy.deepcopy(features)
    assert all(map(torch.equal, twin(IMAGES), expected))
    for parameter in features.backbone.parameters():
        parameter.zero_()
    assert all(map(torch.equal, twin(IMAGES), expected))
    assert not torch.equal(features(IMAGES)[0], expected[0])


@torch.no_grad()
def test_its_state_is_the_backbones() -> None:
    features = FeatureMaps(tiny_vit(), (0,))
    assert set(features.state_dict()) == {f"backbone.{key}" for key in features.backbone.state_dict()}
    other = FeatureMaps(tiny_vit(seed=1), (0,))
    other.load_state_dict(features.state_dict())
    assert torch.equal(other(IMAGES)[0], features(IMAGES)[0])
