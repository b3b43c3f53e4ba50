"""Rein checkpoints against Rein's equations, and what is no Rein checkpoint."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import same
from torch import Tensor, nn

from mgfc import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, load_head, wrap_backbone
from mgfc.cli import main
from mgfc.config import ReinConfig
from mgfc.interop.rein import convert_rein

pytest.importorskip("transformers")

DEPTH, DIM, TOKENS, RANK = 3, 32, 7, 4


def checkpoint(low_rank: bool) -> dict[str, Tensor]:
    """Random tensors under a published checkpoint's keys."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / math.sqrt(shape[-1])

    reins = {
        "mlp_token2feat.weight": random(DIM, DIM),
        "mlp_token2feat.bias": random(DIM),
        "mlp_delta_f.weight": random(DIM, DIM),
        "mlp_delta_f.bias": random(DIM),
        "scale": torch.tensor(0.7),
        "transform.weight": random(8, DIM),
        "transform.bias": random(8),
        "merge.weight": random(8, 24),
        "merge.bias": random(8),
    }
    if low_rank:
        reins |= {"learnable_tokens_a": random(DEPTH, TOKENS, RANK), "learnable_tokens_b": random(DEPTH, RANK, DIM)}
    else:
        reins["learnable_tokens"] = random(DEPTH, TOKENS, DIM)
    head = {"decode_head.cls_embed.weight": random(5, 8), "decode_head.cls_embed.bias": random(5)}
    return {f"backbone.reins.{key}": value for key, value in reins.items()} | head


def reference(state: dict[str, Tensor], feats: Tensor, layer: int, use_softmax: bool = True) -> Tensor:
    """Equations of arXiv 2312.04265 for the patch tokens (B, N, C) that leave a block."""
    r = {key.removeprefix("backbone.reins."): value for key, value in state.items()}
    tokens = r["learnable_tokens"] if "learnable_tokens" in r else r["learnable_tokens_a"] @ r["learnable_tokens_b"]
    tokens = tokens[layer]
    attention = torch.einsum("bnc,mc->bnm", feats, tokens)
    if use_softmax:
        attention = torch.softmax(attention / math.sqrt(DIM), dim=-1)
    values = tokens[1:] @ r["mlp_token2feat.weight"].T + r["mlp_token2feat.bias"]
    delta = torch.einsum("bnm,mc->bnc", attention[:, :, 1:], values) + feats
    return feats + r.get("scale", 1.0) * (delta @ r["mlp_delta_f.weight"].T + r["mlp_delta_f.bias"])


def timm_vit() -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=28, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    return vit.eval(), vit.blocks


def eva() -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    vit = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    return vit.eval(), vit.blocks


def transformers_vit() -> tuple[nn.Module, nn.ModuleList]:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=28, patch_size=14)
    vit = Dinov2Model(config).eval()
    return vit, vit.encoder.layer


def last_tokens(vit: nn.Module, block: nn.Module, images: Tensor) -> Tensor:
    found = []
    handle = block.register_forward_hook(lambda *_: found.append(_[-1]))
    with torch.no_grad():
        vit(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("make", [timm_vit, eva, transformers_vit])
@pytest.mark.parametrize("size", [(28, 28), (42, 70)])
def test_computes_reins_function(low_rank: bool, make: Any, size: tuple[int, int], tmp_path: Path) -> None:
    state = checkpoint(low_rank)
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "rein.pth")
    adapter = convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    assert adapter.config == ReinConfig(TOKENS, RANK if low_rank else None)
    images = torch.randn(2, 3, *size)
    vit, blocks = make()
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _b, _a, out, i=index: torch.cat([out[:, :1], reference(state, out[:, 1:], i)], dim=1), prepend=True
        )
    expected = last_tokens(vit, blocks[-1], images)
    twin, blocks = make()
    bare = last_tokens(twin, blocks[-1], images)
    wrap_backbone(twin, tmp_path / "out")
    found = last_tokens(twin, blocks[-1], images)
    assert (found - expected).abs().max() <= 1e-5
    assert (bare - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("has_scale", "use_softmax"), [(False, True), (True, False), (False, False)])
def test_variants_of_its_training(has_scale: bool, use_softmax: bool, tmp_path: Path) -> None:
    """`zero_mlp_delta_f=True` leaves the scale out, which is 1 then; `use_softmax=False` cannot be told from the keys."""
    state = checkpoint(low_rank=True)
    if not has_scale:
        del state["backbone.reins.scale"]
    torch.save({"state_dict": state}, tmp_path / "rein.pth")
    flags = [] if use_softmax else ["--no-softmax"]
    assert main(["convert-rein", str(tmp_path / "rein.pth"), str(tmp_path / "adapter"), *flags]) == 0
    vit, blocks = timm_vit()
    images = torch.randn(1, 3, 42, 70)
    calibration = wrap_backbone(vit, tmp_path / "adapter").calibration
    assert calibration.config.use_softmax is use_softmax
    entries: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda block, args: entries.append(args[0]))
    vit(images)
    with calibration.disabled():
        found, bare = entries[0], blocks[0](vit._pos_embed(vit.patch_embed(images)))
    assert (found[:, 1:] - reference(state, bare[:, 1:], 0, use_softmax)).abs().max() < 1e-5
    assert (found[:, 1:] - reference(state, bare[:, 1:], 0, not use_softmax)).abs().max() > 1e-3


def test_can_be_trained_and_saved_again(tmp_path: Path) -> None:
    torch.save(checkpoint(True), tmp_path / "rein.pth")
    convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    vit, _ = timm_vit()
    wrap_backbone(vit, tmp_path / "out")
    images = torch.randn(1, 3, 28, 28)
    vit.forward_features(images)[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vit.calibration.parameters())
    with torch.no_grad():
        vit.calibration.adapter.maps.scale.mul_(2)
    vit.calibration.save_pretrained(tmp_path / "again")
    twin, _ = timm_vit()
    assert same(wrap_backbone(twin, tmp_path / "again")(images), vit(images))
    assert "Rein's refinement" in (tmp_path / "again" / "README.md").read_text()


def test_a_fresh_one_changes_nothing() -> None:
    images = torch.randn(1, 3, 28, 28)
    vit, _ = timm_vit()
    expected = vit(images)
    wrap_backbone(vit, ReinConfig())
    assert same(vit(images), expected)
    assert vit.calibration.loss(torch.zeros(1, 28, 28, dtype=torch.long)) == 0
    assert "linear layers" in vit.calibration.summary()


def test_the_head_is_kept_as_it_is(tmp_path: Path) -> None:
    state = checkpoint(True)
    torch.save(state, tmp_path / "rein.pth")
    convert_rein(tmp_path / "rein.pth", tmp_path)
    head = nn.Module()
    head.cls_embed = nn.Linear(8, 5)
    head.reins = nn.Module()
    head.reins.transform, head.reins.merge = nn.Linear(DIM, 8), nn.Linear(24, 8)
    load_head(tmp_path, head)
    assert same(head.cls_embed.weight.detach(), state["decode_head.cls_embed.weight"])
    assert same(head.reins.merge.bias.detach(), state["backbone.reins.merge.bias"])
    with pytest.raises(AdapterMismatchError, match="Build that module yourself"):
        load_head(tmp_path)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mmengine's checkpoints, with objects of classes that are not here; and with a hostile call."""
    module = types.ModuleType("mmengine_like.history")
    exec("class HistoryBuffer:\n    def __init__(self):\n        self.values = [1.0]\n", module.__dict__)
    module.HistoryBuffer.__module__ = "mmengine_like.history"
    monkeypatch.setitem(sys.modules, "mmengine_like", types.ModuleType("mmengine_like"))
    monkeypatch.setitem(sys.modules, "mmengine_like.history", module)
    trace = tmp_path / "trace"
    content = {
        "state_dict": checkpoint(True),
        "message_hub": {"loss": module.HistoryBuffer()},
        "hostile": _Call(exec, f"open({str(trace)!r}, 'w')"),
    }
    torch.save(content, tmp_path / "rein.pth")
    monkeypatch.delitem(sys.modules, "mmengine_like.history")
    convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    assert not trace.exists()
    twin, _ = timm_vit()
    wrap_backbone(twin, tmp_path / "out")


def without(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in checkpoint(True).items() if not key.endswith(keys)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("tokens_b"), "expected the keys of a Rein adapter"),
        (without("tokens_a"), "expected the keys of a Rein adapter"),
        ({}, "found 0 such keys"),
        ({"backbone.blocks.0.weight": torch.zeros(1)}, "found 0 such keys"),
        (checkpoint(True) | {"backbone.reins.else": torch.zeros(1)}, "unknown 'else'"),
        (checkpoint(True) | {"backbone.reins.mlp_delta_f.bias": torch.zeros(3)}, "of shapes that fit"),
        (checkpoint(True) | {"backbone.reins.learnable_tokens_b": torch.zeros(1, RANK, DIM)}, "of shapes that fit"),
        ([torch.zeros(1)], "expected a dict of tensors, found list"),
    ],
)
def test_what_is_no_rein_checkpoint(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "rein.pth")
    with pytest.raises(AdapterFileError, match=message):
        convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="found no such file"):
        convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    torch.save(checkpoint(True), tmp_path / "rein.pth")
    for size in (0, 100, 2000):
        (tmp_path / "short.pth").write_bytes((tmp_path / "rein.pth").read_bytes()[:size])
        with pytest.raises(AdapterFileError, match="weights_only=True, found otherwise"):
            convert_rein(tmp_path / "short.pth", tmp_path / "out")


def test_another_backbone(tmp_path: Path) -> None:
    torch.save(checkpoint(True), tmp_path / "rein.pth")
    convert_rein(tmp_path / "rein.pth", tmp_path / "out")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=DEPTH, num_heads=2)
    with pytest.raises(AdapterMismatchError, match="embed_dim: expected 32, found 48"):
        wrap_backbone(vit, tmp_path / "out")
