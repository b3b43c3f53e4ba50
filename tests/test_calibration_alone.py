"""`MGFCConfig(rank=None)`: calibration of what is already trained, without any learnt part."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import randomise, same
from hub_server import HubServer
from tiny import tiny_dinov2, tiny_vit
from torch import nn

from mgfc import CoarseConfig, ConfigError, FineConfig, MediumConfig, MGFCConfig, unwrap_backbone, wrap_backbone
from mgfc.reports import STAGES

CONFIG = MGFCConfig(rank=None)
IMAGES = 2 * torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(3)) + 1
LABELS = torch.randint(0, 5, (8, 64, 96))


def observed(config: MGFCConfig = CONFIG, **options: Any) -> nn.Module:
    vit = wrap_backbone(tiny_vit(), config, **options)
    with vit.calibration.observing():
        for batch in IMAGES.split(4):
            vit(batch)
    return vit


@torch.no_grad()
def test_it_has_no_parameters_and_starts_as_the_identity() -> None:
    vit = wrap_backbone(tiny_vit(), CONFIG)
    assert list(vit.calibration.parameters()) == [] and vit.calibration.num_parameters == 0
    assert all(layer.low_rank is None for layer in vit.calibration.layers.values())
    assert same(vit(IMAGES), tiny_vit()(IMAGES))
    vit = observed()
    assert not same(vit(2 * IMAGES), tiny_vit()(2 * IMAGES))
    with vit.calibration.disabled():
        assert same(vit(2 * IMAGES), tiny_vit()(2 * IMAGES))
    assert same(unwrap_backbone(vit)(IMAGES), tiny_vit()(IMAGES))


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (CONFIG, ["0", "1", "2", "3", "4", "5"]),
        (MGFCConfig(rank=None, medium=MediumConfig(layers="last:4")), ["2", "3", "4", "5"]),
        (MGFCConfig(rank=None, medium=MediumConfig(layers=(0, 5))), ["0", "5"]),
        (MGFCConfig(rank=None, layers="first:2", fine=FineConfig(layers="last:1"), medium=None), ["1"]),
        (MGFCConfig(rank=None, medium=None), []),
        (MGFCConfig(rank=None, medium=None, coarse=None), []),
    ],
)
@torch.no_grad()
def test_blocks_without_any_stage_have_no_layer(config: MGFCConfig, blocks: list[str]) -> None:
    vit = wrap_backbone(tiny_vit(depth=6), config)
    assert list(vit.calibration.layers) == blocks
    randomise(vit.calibration)
    reports = vit.calibration.check(IMAGES)
    assert [report.name for report in reports] == [f"blocks.{block}" for block in blocks]
    rows = [line.split()[0] for line in vit.calibration.summary().splitlines()]
    assert [row for row in rows if row.startswith("blocks.")] == [f"blocks.{block}" for block in blocks]
    assert same(vit(IMAGES), tiny_vit(depth=6)(IMAGES)) == (config.coarse is None and not blocks)


def test_summary_and_check() -> None:
    vit = observed()
    lines = vit.calibration.summary().splitlines()
    assert lines[0].split() == list(STAGES)
    assert "0 parameters, 0.00 %" in lines[-2] and lines[-1] == "statistics of 2 batches, gathered after training"
    reports = vit.calibration.check(3 * IMAGES)
    assert len(reports) == 3 and all(report.changed and report.grid == (4, 6) for report in reports)


def test_its_loss_is_a_constant_of_zero() -> None:
    vit, head = observed(freeze=False), nn.Linear(32, 5)
    vit.train()
    loss = head(vit(IMAGES)).square().mean() + vit.calibration.loss(LABELS)
    assert vit.calibration.loss(LABELS) == 0 and vit.calibration.losses(LABELS) == {}
    loss.backward()
    assert head.weight.grad.any() and vit.blocks[0].attn.qkv.weight.grad.any()


def test_a_loss_on_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"CoarseConfig\.loss_weight: expected 0 without low-rank adapters.*found 1\.0"):
        MGFCConfig(rank=None, coarse=CoarseConfig(loss_weight=1.0), num_classes=5)


@pytest.mark.parametrize("changes", [{}, {"medium": None}, {"coarse": None}, {"fine": FineConfig()}], ids=str)
def test_files_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, **changes)
    vit = observed(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.calibration.save_pretrained(tmp_path)
        twin = wrap_backbone(tiny_vit(), tmp_path)
    assert twin.calibration.config == config and twin.calibration.adapter.is_observed
    assert same(twin.calibration.state_dict(), vit.calibration.state_dict())
    with torch.no_grad():
        assert same(twin(2 * IMAGES), vit(2 * IMAGES)) and not same(twin(2 * IMAGES), tiny_vit()(2 * IMAGES))
    assert json.loads((tmp_path / "config.json").read_text())["calibration"]["rank"] is None
    assert (tmp_path / "model.safetensors").stat().st_size < 100_000
    card = (tmp_path / "README.md").read_text()
    assert "None" not in card and "without low-rank adapters" in card


def test_the_hub(logged_in: HubServer) -> None:
    vit = observed()
    vit.calibration.push_to_hub("me/calibrated")
    twin = wrap_backbone(tiny_vit(), "me/calibrated")
    with torch.no_grad():
        assert same(twin(2 * IMAGES), vit(2 * IMAGES))


def test_others_are_added_and_merged() -> None:
    vit = observed()
    vit.calibration.add_adapter("other", CONFIG)
    with vit.calibration.using("other"), vit.calibration.observing():
        vit(3 - IMAGES)
    vit.calibration.merge_adapters(["default", "other"], [1, 3])
    found = [vit.calibration.adapters[name].coarse.source.value for name in ("default", "other", "merged")]
    torch.testing.assert_close(found[2], (found[0] + 3 * found[1]) / 4)
    vit.calibration.set_adapter("merged")
    vit.calibration.delete_adapter("other")
    vit.calibration.add_adapter("learnt", MGFCConfig(rank=4))
    vit.calibration.set_adapter("learnt")
    assert sum(p.requires_grad for p in vit.parameters()) == 6


@torch.no_grad()
def test_fusing_has_nothing_to_do() -> None:
    vit = observed()
    expected = vit(IMAGES)
    with vit.calibration.fused():
        assert same(vit(IMAGES), expected)


# Beside a PEFT adapter


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False, **options)


@pytest.mark.parametrize("first", ["lora", "mgfc"])
def test_beside_lora_which_alone_is_trained(first: str) -> None:
    vit = tiny_vit()
    if first == "lora":
        peft.inject_adapter_in_model(lora(), vit)
    wrap_backbone(vit, CONFIG)
    if first == "mgfc":
        peft.inject_adapter_in_model(lora(), vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.train()
    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    vit(IMAGES).square().mean().backward()
    assert all(p.grad is not None for name, p in vit.named_parameters() if name in trained)
    with vit.calibration.observing():
        vit(IMAGES)
    assert vit.calibration.adapter.is_observed and vit.training
    with torch.no_grad():
        assert not same(vit.eval()(2 * IMAGES), unwrap_backbone(vit)(2 * IMAGES))


def test_lora_is_saved_beside_it(tmp_path: Path) -> None:
    vit = observed(peft_config=lora())
    vit.calibration.save_pretrained(tmp_path)
    twin = wrap_backbone(tiny_vit(), tmp_path)
    with torch.no_grad():
        assert same(twin(2 * IMAGES), vit(2 * IMAGES))
        assert not same(twin(2 * IMAGES), observed()(2 * IMAGES))


def test_peft_imported_late_has_nothing_to_freeze() -> None:
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import tiny_vit
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]
from mgfc import MGFCConfig, wrap_backbone
vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=None))
import peft
peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), vit)
warnings.simplefilter("error")
vit.train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_transformers_model() -> None:
    model = wrap_backbone(tiny_dinov2(), CONFIG)
    images = IMAGES[..., :56, :84]
    with model.calibration.observing():
        model(images)
    with torch.no_grad():
        calibrated = model(3 * images).last_hidden_state
        with model.calibration.disabled():
            assert not torch.allclose(model(3 * images).last_hidden_state, calibrated, atol=1e-3)


def test_its_statistics_follow_the_backbone() -> None:
    vit = wrap_backbone(tiny_vit().to("meta"), MGFCConfig(rank=None))
    assert {buffer.device.type for buffer in vit.calibration.buffers()} == {"meta"}
