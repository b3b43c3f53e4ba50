"""What becomes of calibrators when the modules of a wrapped model change, or are copied to other devices."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_unchanged, randomise, same, snapshot
from tiny import calibrated, tiny_dinov2, tiny_vit
from torch import Tensor, nn
from torch.nn.parallel import replicate as replication

from mgfc import (
    CalibrationError,
    CoarseConfig,
    FeatureMaps,
    MGFCConfig,
    ReinConfig,
    SegmentationHead,
    UnsupportedBackboneError,
    get_calibration,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.blocks import BlockHooks

IMAGES = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))


class TestReplaced:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("blocks.1", lambda vit: vit.blocks.__setitem__(1, tiny_vit(1).blocks[1])),
            ("patch_embed", lambda vit: setattr(vit, "patch_embed", tiny_vit(1).patch_embed)),
            ("patch_embed.proj", lambda vit: setattr(vit.patch_embed, "proj", nn.Conv2d(3, 32, 16, 16))),
            (
                "patch_embed",
                lambda vit: (setattr(vit, "patch_embed", tiny_vit(1).patch_embed), vit.calibration.add_adapter("x")),
            ),
        ],
    )
    def test_an_error_names_what_took_a_place(self, name: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
        vit = tiny_vit()
        calibration = calibrated(vit)
        vit(IMAGES)
        change(vit)
        for _ in range(2):
            with pytest.raises(CalibrationError, match=rf"VisionTransformer: expected {name} as it was wrapped, found another"):
                vit(IMAGES)
        calibration.save_pretrained(tmp_path)  # what the message says to do
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrap_backbone(unwrap_backbone(vit), tmp_path)
        assert same(vit.calibration.adapter.state_dict(), calibration.adapter.state_dict())
        assert len(vit.calibration.check(IMAGES)) == 3

    def test_the_grid_of_an_earlier_image_is_not_used(self) -> None:
        """Also where hooks see nothing of the new stem: a forward that they miss ends before a block is calibrated."""
        vit = tiny_vit()
        calibrated(vit)
        vit(IMAGES)
        vit.patch_embed = tiny_vit().patch_embed
        with pytest.raises(CalibrationError, match="patch_embed"):
            vit(IMAGES.mT)

    def test_all_at_once(self) -> None:
        vit, other = tiny_vit(), tiny_vit(1)
        calibrated(vit)
        vit.patch_embed, vit.blocks = other.patch_embed, other.blocks
        with pytest.raises(CalibrationError, match="expected patch_embed as it was wrapped"):
            vit(IMAGES)

    @torch.no_grad()
    def test_threads_move_hooks_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two that meet a change of the model at once; each would leave hooks of its own."""
        vit = tiny_vit()
        calibrated(vit)
        vit.blocks[1].mlp = copy.deepcopy(vit.blocks[1].mlp).requires_grad_(False)
        expected = copy.deepcopy(vit)(IMAGES)
        both, attach = threading.Barrier(2), BlockHooks._attach_adapter

        def attach_together(hooks: BlockHooks, block: nn.Module) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=1)  # one waits in vain, if the other has to wait for it
            attach(hooks, block)

        monkeypatch.setattr(BlockHooks, "_attach_adapter", attach_together)
        found: list[Tensor] = []
        # Threads do not inherit the mode.
        threads = [threading.Thread(target=lambda: found.append(vit(IMAGES).detach())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2 and all(same(output, expected) for output in (*found, vit(IMAGES)))

    def test_containers_wrappers_and_shortened_models_are_fine(self) -> None:
        vit = tiny_vit()
        calibrated(vit)
        expected = vit(IMAGES)
        vit.blocks = nn.Sequential(*vit.blocks)  # another container of the same blocks
        assert same(vit(IMAGES), expected)
        vit.norm = nn.LayerNorm(32, eps=1e-6)  # nothing of ours
        assert same(vit(IMAGES), expected)
        vit.prune_intermediate_layers([0, 1])
        assert len(vit.blocks) == 2 and vit(IMAGES).isfinite().all()

    @pytest.mark.parametrize(
        "replace",
        [
            lambda block, new: setattr(block.mlp, "fc1", new.mlp.fc1),
            lambda block, new: setattr(block, "mlp", new.mlp),
        ],
    )
    @torch.no_grad()
    def test_hooks_follow_what_is_replaced_inside_a_block(self, replace: Callable[[Any, Any], None]) -> None:
        vit, expected = tiny_vit(), tiny_vit()
        calibration = calibrated(vit)
        before = vit(IMAGES)
        for model in (vit, expected):
            replace(model.blocks[2], tiny_vit(1).blocks[2])
        twin = calibrated(expected)
        twin.load_state_dict(calibration.state_dict())
        found = vit(IMAGES)
        assert same(found, expected(IMAGES)) and not same(found, before)
        assert all(report.changed for report in calibration.check(IMAGES))

    def test_what_cannot_be_followed_can_be_saved(self, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        vit = tiny_vit()
        calibration = calibrated(vit)
        get_peft_model(vit, LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["mlp"]))
        with pytest.raises(UnsupportedBackboneError, match="modules_to_save runs a copy of mlp"):
            vit(IMAGES)
        calibration.save_pretrained(tmp_path)

    def test_unwrapping_afterwards_leaves_no_hook(self) -> None:
        vit = tiny_vit().requires_grad_(False)
        old = vit.patch_embed
        before = snapshot(vit)
        calibrated(vit)
        vit.patch_embed = copy.deepcopy(old)
        unwrap_backbone(vit)
        vit.patch_embed = old
        assert_unchanged(vit, before)

    def test_copies_look_after_their_own_modules(self) -> None:
        vit = tiny_vit()
        calibrated(vit)
        twin = copy.deepcopy(vit)
        twin.blocks[1] = tiny_vit(1).blocks[1]
        with pytest.raises(CalibrationError, match=r"blocks\.1"):
            twin(IMAGES)
        assert vit(IMAGES).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*TypedStorage")
@pytest.mark.parametrize("make", [tiny_vit, tiny_dinov2])
def test_pytorchs_dynamic_quantisation(make: Callable[[], nn.Module], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It replaces every `nn.Linear` and hands its hooks on, without their keywords."""
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised layers")
    images = IMAGES[..., :56, :84] if make is tiny_dinov2 else IMAGES
    torch.manual_seed(0)
    model = make()
    calibration = calibrated(model)
    with torch.no_grad():
        expected = torch.cat([tokens.flatten() for tokens in FeatureMaps(model, (0, 2))(images)])
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    maps = FeatureMaps(quantised, (0, 2))
    with torch.no_grad():
        found = torch.cat([tokens.flatten() for tokens in maps(images)])
        with quantised.calibration.disabled():
            bare = torch.cat([tokens.flatten() for tokens in maps(images)])
    error, effect = (found - expected).square().mean(), (bare - expected).square().mean()
    assert 0 < error < 0.01 * effect
    assert all(report.changed for report in quantised.calibration.check(images))
    assert not any("quantized" in type(m).__module__ for m in quantised.calibration.modules())
    quantised.calibration.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert same(wrap_backbone(make(), tmp_path).calibration.state_dict(), calibration.state_dict())
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    with pytest.raises(CalibrationError, match="quantised"):
        quantised.calibration.fuse()
    with torch.no_grad():
        unwrap_backbone(quantised)
        assert same(torch.cat([tokens.flatten() for tokens in maps(images)]), bare)


class Segmenter(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.maps = FeatureMaps(wrap_backbone(tiny_vit(), config or MGFCConfig(rank=4)), (1, 2))
        self.head = SegmentationHead(self.maps.channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))


class CallsAMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = wrap_backbone(tiny_vit(), MGFCConfig(rank=4))

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[Any]]:
    """What `nn.DataParallel` makes for each forward, with copies of the parameters in place of those on other GPUs."""

    def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copies)
    return lambda model: replication(model, [0, 1])


class TestDataParallel:
    @pytest.mark.parametrize("adapter", [MGFCConfig(rank=4), ReinConfig(num_tokens=5, token_rank=2)])
    @pytest.mark.parametrize("host", [Segmenter, lambda config: wrap_backbone(tiny_vit(), config)])
    def test_each_copy_runs_its_own_parameters(self, host: Any, adapter: Any, replicate: Any) -> None:
        model = host(adapter).eval()
        calibration = get_calibration(model)
        randomise(calibration)
        images = IMAGES.chunk(2)
        expected = model(IMAGES)
        first, second = replicate(model)
        found = {}

        def run(key: int, replica: nn.Module) -> None:
            found[key] = replica(images[key])

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.testing.assert_close(torch.cat([found[0], found[1]]), expected, rtol=1e-4, atol=1e-5)
        # Gradients come back to the one set of parameters that there is.
        (found[0].square().sum() + found[1].square().sum()).backward()
        gradients = [p.grad.clone() for p in calibration.parameters()]
        calibration.zero_grad()
        model(IMAGES).square().sum().backward()
        for gradient, parameter in zip(gradients, calibration.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
        # A copy with other values computes otherwise, and the original and its sister do not: each has its own.
        with torch.no_grad():
            for _, part in get_calibration(second).named_modules():
                for value in getattr(part, "_former_parameters", {}).values():
                    value.zero_()
            other = second(images[1])
            assert not same(other, found[1])
            assert same(first(images[0]), found[0])
            assert same(model(IMAGES), expected)

    def test_what_cannot_be_told_is_an_error(self, replicate: Any) -> None:
        with pytest.raises(
            CalibrationError, match=r"nn\.DataParallel: expected copies of the backbone to be called themselves"
        ):
            replicate(CallsAMethod())[0](IMAGES)
        model = Segmenter(MGFCConfig(rank=4, coarse=CoarseConfig(loss_weight=1), num_classes=5)).train()
        with pytest.raises(CalibrationError, match=r"nn\.DataParallel: expected a configuration without losses"):
            replicate(model)[0](IMAGES)


class Merges(nn.Module):
    """Token merging: after a block, each pair of neighbouring patches is replaced by its mean."""

    def __init__(self, block: nn.Module, extra: int) -> None:
        super().__init__()
        self.block, self.extra = block, extra
        block.register_forward_hook(self.merge)

    def merge(self, block: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.extra :]
        return torch.cat([tokens[:, : self.extra], patches.unflatten(1, (-1, 2)).mean(dim=2)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("extra", [1, 5])
@pytest.mark.parametrize("size", [(128, 128), (64, 96), (256, 256)])
def test_merged_tokens_have_no_places(extra: int, size: tuple[int, int]) -> None:
    """Half of 16 x 16 patches are no 11 x 11 ones: only token-wise stages run, and registers stay registers."""
    vit = tiny_vit(reg_tokens=extra - 1) if extra > 1 else tiny_vit()
    calibration = calibrated(vit)
    Merges(vit.blocks[0], extra)
    images = torch.randn(2, 3, *size)
    reports = calibration.check(images)
    patches = size[0] * size[1] // 256
    assert [report.grid for report in reports] == [(size[0] // 16, size[1] // 16), None, None]
    merged = (patches // 2, extra)
    assert [(report.num_patches, report.leading) for report in reports] == [(patches, extra), merged, merged]
    assert "no grid, fine stage skipped" in str(reports[1])
    seen: dict[str, Tensor] = {}
    vit.blocks[1].register_forward_hook(lambda block, args, out: seen.update(entry=args[0], out=out))
    vit(images)
    with_stages = seen["out"].clone()
    for layer in calibration.layers.values():
        layer.medium.source.weight.zero_()
    vit(images)
    assert seen["out"].shape[1] == patches // 2 + extra
    assert not same(with_stages[:, extra:], seen["out"][:, extra:]), "medium calibration runs on merged tokens, too"


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.0])
def test_masked_patches_have_no_places(ratio: float) -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTMAEModel(ViTMAEConfig(**sizes, image_size=64, patch_size=8, mask_ratio=ratio)).eval()
    calibration = calibrated(model)
    images = torch.randn(2, 3, 64, 64)
    reports = calibration.check(images)
    kept = int(64 * (1 - ratio))  # 16 of them look like 4 x 4, and all 64, which are shuffled, like 8 x 8
    assert [(r.grid, r.num_patches, r.leading, r.trailing) for r in reports] == [(None, kept, 1, 0)] * 3
    # The spatial stage does not run, whatever it learnt; what runs leaves the class token alone.
    seen: dict[str, Tensor] = {}
    model.layers[2].register_forward_hook(lambda block, args, out: seen.update(out=out))
    noise, outputs = torch.rand(2, 64), []
    for step in ("all", "another gate", "no statistics"):
        layer = calibration.layers["2"]
        if step == "another gate":
            layer.fine.gate.normal_()
        if step == "no statistics":
            layer.medium.source.weight.zero_()
        model(images, noise=noise)
        outputs.append(seen["out"].clone())
    assert same(outputs[0], outputs[1])
    assert not same(outputs[1][:, 1:], outputs[2][:, 1:]) and same(outputs[1][:, 0], outputs[2][:, 0])
