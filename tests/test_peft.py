"""LoRA and calibrators on one backbone, in either order."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from helpers import assert_unchanged, randomise, same, snapshot
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from mgfc import (
    AdapterMismatchError,
    ConfigError,
    MGFCConfig,
    UnsupportedBackboneError,
    get_calibration,
    unwrap_backbone,
    wrap_backbone,
)

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(r=2, target_modules=["qkv"])


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    )


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def fill_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


def test_unwrapping_leaves_a_later_adapter_of_peft_with_a_frozen_backbone() -> None:
    model = wrap_backbone(vit(), MGFCConfig(rank=8))
    adapted = get_peft_model(model, LORA)
    unwrap_backbone(model)
    assert trained(adapted) and all("lora_" in name for name in trained(adapted))


def test_flags_come_back_when_an_earlier_adapter_of_peft_is_gone() -> None:
    model = vit()
    before = snapshot(model)
    adapted = get_peft_model(model, LORA)
    model.requires_grad_(True)
    wrap_backbone(model, MGFCConfig(rank=8))
    assert adapted.unload() is model
    assert not any("calibration" not in name for name in trained(model))
    assert_unchanged(unwrap_backbone(model), before)


@pytest.mark.parametrize("targets", [["qkv"], "all-linear"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_peft_after_wrapping_leaves_the_calibrators_alone(targets: list[str] | str, name: str) -> None:
    model = wrap_backbone(vit(), MGFCConfig(rank=8))
    before = {n for n in trained(model) if "calibration" in n}
    calibration = get_calibration(model)
    randomise(calibration)
    modules = {n: type(m) for n, m in calibration.named_modules()}
    config = LoraConfig(r=2, target_modules=targets)
    adapted = get_peft_model(model, config, adapter_name=name)
    assert {n.removeprefix("base_model.model.") for n in trained(adapted) if "calibration" in n} == before
    assert {n: type(m) for n, m in calibration.named_modules()} == modules
    assert all("lora" in n or "calibration" in n for n in trained(adapted))
    assert any("lora" in n for n in trained(adapted))
    # PEFT's own switches are about its adapter alone.
    fill_lora(model)
    model.eval()
    both = model(IMAGES)
    with adapted.disable_adapter():
        calibrated = model(IMAGES)
    with calibration.disabled():
        adapted_only = model(IMAGES)
        with adapted.disable_adapter():
            bare = model(IMAGES)
    assert same(bare, vit().eval()(IMAGES))
    assert len({tuple(out.flatten()[:4].tolist()) for out in (both, calibrated, adapted_only, bare)}) == 4
    assert not any("calibration" in key for key in peft.get_peft_model_state_dict(adapted, adapter_name=name))
    adapted.merge_and_unload()
    assert {n for n in trained(model) if "calibration" in n} == before
    torch.testing.assert_close(model(IMAGES), both, rtol=1e-4, atol=1e-4)


def test_wrapping_after_peft_leaves_lora_alone() -> None:
    model = inject_adapter_in_model(LORA, vit())
    before = trained(model)
    assert before and all("lora" in n for n in before)
    wrap_backbone(model, MGFCConfig(rank=8))
    assert {n for n in trained(model) if not n.startswith("calibration.")} == before
    assert any(n.startswith("calibration.") for n in trained(model))


def test_transformers_adapters_leave_the_calibrators_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Config, Dinov2Model

    # Transformers 5.24 asks for a version of PEFT that is not out.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")

    def dino() -> nn.Module:
        torch.manual_seed(0)
        return Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16)
        )

    def of_calibrators(model: nn.Module) -> set[str]:
        return {name for name in trained(model) if "calibration" in name}

    config = LoraConfig(r=2, target_modules=["q_proj"])
    saved = dino()
    saved.add_adapter(config)
    fill_lora(saved)
    saved.save_pretrained(tmp_path)
    model = wrap_backbone(dino(), MGFCConfig(rank=4))
    randomise(model.calibration)
    before, state = trained(model), {n: p.clone() for n, p in model.calibration.state_dict().items()}
    model.load_adapter(tmp_path)  # for inference, which freezes what is PEFT's
    assert trained(model) == before
    model.delete_adapter("default")
    model.add_adapter(config)
    assert of_calibrators(model) == before and any("lora" in name for name in trained(model))
    for switch in (model.disable_adapters, model.enable_adapters):
        switch()
        assert of_calibrators(model) == before
    assert all(torch.equal(p, state[n]) for n, p in model.calibration.state_dict().items())


TARGETS = {"target_modules": ["fc1"]}
METHODS = {
    "AdaLora": {"r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "Delora": {"r": 2},
    "FourierFT": {"n_frequency": 20},
    "Gralora": {"r": 4},
    "HRA": {"r": 2},
    "Hira": {"r": 2},
    "IA3": {"feedforward_modules": ["fc1"]},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "Lora": {"r": 2},
    "Miss": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {},
    "Psoft": {"r": 4},
    "Pvera": {"r": 4},
    "RandLora": {"r": 4},
    "Road": {},
    "Shira": {"r": 2},
    "VBLoRA": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "Vera": {"r": 4},
    "WaveFT": {"n_frequency": 20},
}
MERGED: list[tuple[str, dict[str, Any]]] = [
    *METHODS.items(),
    ("Lora", {"r": 2, "use_dora": True}),
    ("Lora", {"r": 2, "use_rslora": True}),
    ("IA3", {"feedforward_modules": []}),
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize(("name", "options"), MERGED, ids=[f"{name}-{'-'.join(options)}" for name, options in MERGED])
def test_every_method_of_peft_merges_beside_low_rank_adapters(name: str, options: dict[str, Any], wrapped_first: bool) -> None:
    """On the layer that both adapt. Some scale or rotate what the layer computes, which is then not the calibrators' share."""
    if not hasattr(peft, f"{name}Config"):
        pytest.skip("this version of PEFT does not have it")
    config = getattr(peft, f"{name}Config")(**TARGETS, **options)
    model = vit().eval()
    if wrapped_first:
        randomise(wrap_backbone(model, MGFCConfig(rank=8)).calibration)
        model(IMAGES)
    adapted = get_peft_model(model, config)
    if not wrapped_first:
        randomise(wrap_backbone(model, MGFCConfig(rank=8)).calibration)
    plain = adapted.eval()(IMAGES)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "calibration" not in key:
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = adapted(IMAGES)
    assert not torch.allclose(expected, plain, rtol=1e-2)
    assert all(report.changed for report in model.calibration.check(IMAGES))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IMAGES), expected, rtol=1e-4, atol=1e-4)
    model.calibration.fuse()
    torch.testing.assert_close(merged(IMAGES), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_that_peft_copied_has_one_adapter_around_it() -> None:
    model = wrap_backbone(vit().eval(), MGFCConfig(rank=8))
    randomise(model.calibration)
    expected = model(IMAGES)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["fc1"]))
    assert same(adapted.eval()(IMAGES), expected)
    for layer in model.calibration.layers.values():
        layer.low_rank.up.zero_()
    with model.calibration.disabled():
        bare = model(IMAGES)
    model.calibration.adapter.coarse.source.weight.zero_()
    for index in "012":
        if model.calibration.layers[index].medium is not None:
            model.calibration.layers[index].medium.source.weight.zero_()
    assert same(model(IMAGES), bare), "no copy of the calibrators is left in PEFT's copy of the layer"
    with pytest.raises(UnsupportedBackboneError, match="modules_to_save runs a copy of mlp"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["proj"], modules_to_save=["mlp"]), "other").eval()


class TestPeftConfig:
    def test_trains_both_and_takes_both_away(self) -> None:
        model = vit()
        model.blocks[0].requires_grad_(False)
        before = snapshot(model)
        wrap_backbone(model, MGFCConfig(rank=8), peft_config=LORA)
        assert same(model(IMAGES), vit()(IMAGES))
        assert {n.partition(".")[0] for n in trained(model)} == {"blocks", "calibration"}
        assert all("lora" in n for n in trained(model) if n.startswith("blocks"))
        model(IMAGES)[:, 0].sum().backward()
        assert model.blocks[0].attn.qkv.lora_B["default"].weight.grad.any()
        assert model.calibration.layers["0"].low_rank.up.grad.any()
        assert_unchanged(unwrap_backbone(model), before)

    @pytest.mark.parametrize("bias", ["none", "all"])
    def test_is_saved_and_loaded_with_the_calibrators(self, bias: str, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["qkv"], bias=bias)
        model = wrap_backbone(vit(), MGFCConfig(rank=8), peft_config=config)
        randomise(model.calibration)
        fill_lora(model)
        model.calibration.save_pretrained(tmp_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
        twin = wrap_backbone(vit(), tmp_path)
        assert same(model.eval()(IMAGES), twin.eval()(IMAGES))
        assert trained(twin) == trained(model)
        # The files are PEFT's own.
        loaded = peft.PeftModel.from_pretrained(vit(), tmp_path)
        with model.calibration.disabled():
            assert same(loaded(IMAGES), model(IMAGES))
        # A later save without it leaves no stale files.
        wrap_backbone(vit(), MGFCConfig(rank=8)).calibration.save_pretrained(tmp_path)
        assert not (tmp_path / "adapter_model.safetensors").exists()

    def test_copies_are_independent(self) -> None:
        model = wrap_backbone(vit(), MGFCConfig(rank=8), peft_config=LORA)
        twin = copy.deepcopy(model)
        fill_lora(twin)
        assert same(model(IMAGES), vit()(IMAGES))
        assert not same(twin(IMAGES), vit()(IMAGES))

    def test_fingerprint_is_that_of_the_bare_backbone(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        model = wrap_backbone(vit(), MGFCConfig(rank=8), peft_config=LoraConfig(r=2, target_modules="all-linear"))
        fill_lora(model)
        model.calibration.save_pretrained(tmp_path)
        wrap_backbone(vit(), tmp_path)
        assert not [w for w in recwarn if "other weights" in str(w.message)]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (LoraConfig(r=2, target_modules=["nothing"]), "PEFT refused it for this VisionTransformer: .*nothing"),
            (LoraConfig(r=2), "PEFT refused it"),
            ({"r": 2}, "expected a configuration of PEFT's, such as LoraConfig, found dict"),
        ],
    )
    def test_what_peft_refuses_leaves_the_backbone_as_it_was(self, config: object, message: str) -> None:
        model = vit()
        before = snapshot(model)
        with pytest.raises(ConfigError, match=message):
            wrap_backbone(model, MGFCConfig(rank=8), peft_config=config)
        assert_unchanged(model, before)

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="expected a backbone without adapters of PEFT's"):
            wrap_backbone(inject_adapter_in_model(LORA, vit()), MGFCConfig(rank=8), peft_config=LORA)
        wrap_backbone(vit(), MGFCConfig(rank=8), peft_config=LORA).calibration.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="has an adapter of PEFT's of its own"):
            wrap_backbone(vit(), tmp_path, peft_config=LORA)
        model = wrap_backbone(vit(), MGFCConfig(rank=8))
        with pytest.raises(AdapterMismatchError, match="Load it with wrap_backbone"):
            model.calibration.add_adapter("second", tmp_path)
