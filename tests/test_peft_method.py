"""mgfc as a method of PEFT's, through PEFT's own functions alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from helpers import randomise, same
from hub_server import HubServer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from mgfc import CalibrationError, ConfigError, MGFCConfig, get_calibration, wrap_backbone
from mgfc.interop.peft_method import MGFCPeftConfig

pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 32, 48)
SMALL = {"rank": 8}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=5, dynamic_img_size=True
    ).eval()


def dino() -> nn.Module:
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16, out_indices=[2, 3]
    )
    return Dinov2Backbone(config).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_starts_as_the_bare_backbone_and_trains_calibrators_alone() -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL))
    assert same(model(IMAGES), vit()(IMAGES))
    assert trained(model) and all(".calibration." in name for name in trained(model))
    reference = wrap_backbone(vit(), MGFCConfig(rank=8))
    assert model.get_nb_trainable_parameters()[0] == reference.calibration.num_parameters
    model.train()(IMAGES).square().sum().backward()
    assert get_calibration(model).layers["0"].low_rank.up.grad.any()


def test_feature_maps_of_transformers_are_refined() -> None:
    """Block wrappers of PEFT's own kind are silently left out of them."""
    model = get_peft_model(dino(), MGFCPeftConfig(calibration=SMALL))
    randomise(get_calibration(model))
    found, bare = model(IMAGES).feature_maps, dino()(IMAGES).feature_maps
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(found, bare, strict=True))


def test_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL, modules_to_save=["head"]))
    randomise(get_calibration(model))
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    expected = model.eval()(IMAGES)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert PeftConfig.from_pretrained(tmp_path).calibration == MGFCConfig(rank=8).to_dict()
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert same(loaded.eval()(IMAGES), expected)
    assert not trained(loaded)
    again = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True)
    assert trained(again) == trained(model)


def test_pushed_and_pulled_by_peft(logged_in: HubServer) -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL, modules_to_save=["head"]))
    randomise(get_calibration(model))
    model.push_to_hub("org/peft")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= logged_in.files("org/peft").keys()
    assert same(PeftModel.from_pretrained(vit(), "org/peft").eval()(IMAGES), model.eval()(IMAGES))


def test_adapters_are_switched_disabled_and_deleted(tmp_path: Path) -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL), adapter_name="day")
    model.add_adapter("night", MGFCPeftConfig(calibration={"rank": 4}))
    randomise(get_calibration(model))
    model.eval()
    day = model(IMAGES)
    model.set_adapter("night")
    night = model(IMAGES)
    assert not same(day, night)
    assert all("adapter_night" in name for name in trained(model))
    with model.disable_adapter():
        assert same(model(IMAGES), vit()(IMAGES))
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(vit(), tmp_path / "night", adapter_name="other")
    assert same(other.eval()(IMAGES), night)
    other.load_adapter(tmp_path / "day", adapter_name="day")
    other.set_adapter("day")
    assert same(other.eval()(IMAGES), day)
    model.delete_adapter("night")
    assert same(model(IMAGES), day)
    assert model.active_adapters == ["day"]


def test_unloading_gives_the_bare_backbone_back() -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL, modules_to_save=["head"]))
    randomise(get_calibration(model))
    bare = model.unload()
    assert same(bare(IMAGES), vit()(IMAGES))
    assert not hasattr(bare, "calibration")
    assert bare.state_dict().keys() == vit().state_dict().keys()


def test_what_cannot_be() -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL))
    with pytest.raises(CalibrationError, match="depends on the image, so it cannot be merged"):
        model.merge_and_unload()
    model.add_adapter("second", MGFCPeftConfig(calibration=SMALL))
    with pytest.raises(CalibrationError, match="expected one active adapter"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="unknown key 'ranks'"):
        MGFCPeftConfig(calibration={"ranks": 8})


def test_beside_lora_in_one_model() -> None:
    model = get_peft_model(vit(), MGFCPeftConfig(calibration=SMALL))
    before = trained(model)
    both = get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules="all-linear"), adapter_name="lora")
    assert {name for name in trained(both) if "calibration" in name}
    assert len(trained(both)) > len(before)
