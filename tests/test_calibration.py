"""Calibrators in use: training, checkpointing, autocast, compile, export, losses, reports."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import helpers
import pytest
import timm
import torch
import torch._dynamo.testing
from helpers import assert_unchanged, randomise, same, settle, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError
from zoo import CASES

import mgfc.blocks
from mgfc import (
    Calibration,
    CalibrationError,
    CoarseConfig,
    FineConfig,
    LabelError,
    MediumConfig,
    MGFCConfig,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.adapter import Adapter
from mgfc.backbones.description import block_widths


def weighted(scale: float) -> MGFCConfig:
    return MGFCConfig(
        rank=8,
        num_classes=5,
        coarse=CoarseConfig(loss_weight=0.5 * scale),
        medium=MediumConfig(loss_weight=0.25 * scale),
        fine=FineConfig(loss_weight=0.125 * scale),
    )


LOSSES = weighted(1.0)
SIZES = {**helpers.SIZES, "num_classes": 5}


def make(config: MGFCConfig | None = None, *, trained: bool = True, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **{"dynamic_img_size": True, **SIZES, **kwargs})
    wrap_backbone(vit, config or MGFCConfig(rank=8, fine=FineConfig()))
    if trained:
        randomise(vit.calibration)
    return vit


def zoo(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Losses


def test_losses_are_weighted_terms_and_free_their_records() -> None:
    model, images, labels = make(LOSSES).train(), torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 64, 96))
    settle(model)
    model(images)
    assert set(model.calibration.adapter._records) == {0, 1, 2}
    terms = model.calibration.losses(labels)
    assert list(terms) == ["coarse", "medium", "fine"]
    assert not model.calibration.adapter._records
    twin = make(weighted(2.0)).train()
    settle(twin)
    twin(images)
    assert all(torch.equal(2 * terms[name], value) for name, value in twin.calibration.losses(labels).items())
    model(images)
    torch.testing.assert_close(model.calibration.loss(labels), sum(terms.values()))


def test_losses_train_every_granularity() -> None:
    model = make(LOSSES, trained=False).train()
    images = torch.randn(4, 3, 32, 48)
    labels = F.interpolate(images[:, :1], scale_factor=0.25).gt(0).long().squeeze(1)
    optimizer = torch.optim.AdamW(model.calibration.parameters(), lr=1e-2)
    history: list[dict[str, float]] = []
    for _ in range(40):
        model(images)
        terms = model.calibration.losses(labels)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: float(value) for name, value in terms.items()})
    assert all(history[-1][name] < 0.8 * history[0][name] for name in ("coarse", "medium", "fine"))


def test_each_loss_reaches_its_stage() -> None:
    for name, inside in {"coarse": "presence", "medium": "category", "fine": "fine"}.items():
        model = make(LOSSES).train()
        model(torch.randn(2, 3, 32, 48))
        model.calibration.losses(torch.randint(0, 5, (2, 32, 48)))[name].backward()
        reached = [key for key, grad in gradients(model.calibration).items() if grad.abs().sum() > 0]
        assert any(inside in key for key in reached)
        assert any("down" in key for key in reached)


def test_nothing_is_recorded_without_need() -> None:
    images, labels = torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))
    off = make().train()
    off(images)
    assert not off.calibration.adapter._records
    assert off.calibration.loss(labels) == 0
    assert off.calibration.losses(labels) == {}
    on = make(LOSSES)
    on.eval()(images)
    assert not on.calibration.adapter._records
    assert on.calibration.loss(labels) == 0
    with torch.no_grad():
        on.train()(images)
    assert not on.calibration.adapter._records
    with pytest.raises(CalibrationError, match="expect a forward of the backbone in training mode"):
        on.calibration.loss(labels)


def test_records_are_not_copied_or_saved() -> None:
    model = make(LOSSES).train()
    model(torch.randn(2, 3, 32, 48))
    twin = copy.deepcopy(model)
    assert not twin.calibration.adapter._records
    assert len(model.calibration.adapter._records) == 3
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not loaded.calibration.adapter._records
    images = torch.randn(1, 3, 32, 48)
    assert same(loaded.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 32, 48, dtype=torch.long), r"expected shape \(2, H, W\).*found \(3, 32, 48\)"),
        (torch.zeros(2, 1, 32, 48, dtype=torch.long), r"found \(2, 1, 32, 48\)"),
        (torch.zeros(2, 32, 48), r"expected integers, found torch.float32"),
        (torch.full((2, 32, 48), 5), r"class ids from 0 to 4 or ignore_index=255, found 5 to 5"),
        (torch.full((2, 32, 48), -1), r"found -1 to -1"),
        (None, "found NoneType"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    model = make(LOSSES).train()
    model(torch.randn(2, 3, 32, 48))
    before = snapshot(model)
    with pytest.raises(LabelError, match=message):
        model.calibration.loss(labels)
    assert_unchanged(model, before)
    model.calibration.loss(torch.zeros(2, 8, 8, dtype=torch.long))  # the records are still there


def test_losses_of_stages_on_some_blocks() -> None:
    config = MGFCConfig(
        rank=8,
        num_classes=5,
        coarse=CoarseConfig(loss_weight=1.0),
        medium=MediumConfig(layers=(1,), loss_weight=1.0),
        fine=FineConfig(layers="last:1", loss_weight=1.0),
    )
    model = make(config).train()
    model(torch.randn(2, 3, 32, 48))
    terms = model.calibration.losses(torch.randint(0, 5, (2, 32, 48)))
    assert all(value > 0 for value in terms.values())
    sum(terms.values()).backward()
    reached = {
        name.split(".")[1] for name, grad in gradients(model.calibration.adapter).items() if "layers" in name and grad.any()
    }
    assert reached == {"0", "1", "2"}


def test_losses_of_padded_batches_are_zero() -> None:
    case = next(case for case in CASES if case.architecture == "NaFlexVit" and callable(case.kwargs))
    model = wrap_backbone(case.build(), LOSSES).train()
    case.call(model, case.images())
    terms = model.calibration.losses(torch.randint(0, 5, (2, 32, 48)))
    assert all(value == 0 for value in terms.values())
    sum(terms.values()).backward()


def test_losses_without_grid() -> None:
    """Dropped patches have no labels: the losses that need places are 0, and stay differentiable."""
    model = make(LOSSES, patch_drop_rate=0.5, dynamic_img_size=False).train()
    model(torch.randn(2, 3, 32, 32))
    terms = model.calibration.losses(torch.randint(0, 5, (2, 32, 32)))
    assert terms["coarse"] > 0
    assert terms["medium"] == terms["fine"] == 0
    sum(terms.values()).backward()


def test_checkpointing_of_sizes_whose_extra_tokens_could_be_mistaken() -> None:
    """24 patches with 5 extra tokens, and 25 with as many: 29 tokens may also look like 25 patches with 4."""
    case = next(case for case in CASES if case.name == "transformers-Dinov2WithRegistersModel")
    grads = []
    for checkpointing in (False, True):
        model = wrap_backbone(case.build(), MGFCConfig(rank=4))
        torch.manual_seed(0)
        randomise(model.calibration)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        patch = model.config.patch_size
        outputs = [model(case.images(size=(h * patch, w * patch))).last_hidden_state for h, w in ((4, 6), (5, 5))]
        sum(output.square().mean() for output in outputs).backward()
        grads.append({name: p.grad for name, p in model.calibration.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


# Frozen backbone


@pytest.mark.parametrize("name", ["timm-Levit", "timm-TinyVit"])
def test_frozen_batch_norm_statistics(name: str) -> None:
    case = zoo(name)
    for freeze in (True, False):
        model = wrap_backbone(case.build(), MGFCConfig(rank=4), freeze=freeze)
        host = nn.ModuleDict({"backbone": model})
        before = {key: value.clone() for key, value in model.state_dict().items()}
        host.train()
        case.call(model, case.images())
        own = {key: value for key, value in model.state_dict().items() if not key.startswith("calibration.")}
        same_statistics = all(torch.equal(value, before[key]) for key, value in own.items())
        assert same_statistics == freeze
        unwrap_backbone(model)
        assert all(module.training for module in model.modules())


def test_unwrap_gives_back_flags() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    model.patch_embed.requires_grad_(False)
    before = snapshot(model)
    unwrap_backbone(wrap_backbone(model, MGFCConfig(rank=8)))
    assert_unchanged(model, before)


def test_lora_inside_stays_trainable() -> None:
    peft = pytest.importorskip("peft")
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), vit)
    wrap_backbone(vit, MGFCConfig(rank=8))
    assert [layer.dim for layer in vit.calibration.layers.values()] == [32, 32, 32]
    trainable = {name for name, p in vit.named_parameters() if p.requires_grad and "calibration" not in name}
    assert len(trainable) == 6
    assert all("lora_" in name for name in trainable)


# Checkpointing


TRANSPOSED = ((32, 64), (64, 32))


def crops(model: nn.Module, sizes: Sequence[tuple[int, int]], *, checkpointing: bool) -> dict[str, Tensor]:
    """A forward for each size, their losses, and one backward."""
    model.train()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(1)
    total = torch.zeros(())
    for height, width in sizes:
        features = model.forward_features(torch.randn(2, 3, height, width))
        total = total + features.square().mean() + model.calibration.loss(torch.randint(0, 5, (2, height, width)))
    total.backward()
    assert not model.calibration.adapter._records
    return gradients(model)


@pytest.mark.parametrize(
    ("config", "sizes"),
    # The medium loss reads prototypes that the second forward has moved on.
    [(LOSSES, TRANSPOSED[:1]), (replace(LOSSES, medium=MediumConfig()), TRANSPOSED)],
    ids=["one crop", "transposed crops"],
)
def test_checkpointing(config: MGFCConfig, sizes: Sequence[tuple[int, int]]) -> None:
    plain, checkpointed = (crops(make(config), sizes, checkpointing=on) for on in (False, True))
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_without_tags_a_recomputation_takes_the_wrong_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mgfc.blocks, "tag", lambda *args: None)
    with pytest.raises(CheckpointError, match="different metadata"):
        crops(make(LOSSES), TRANSPOSED, checkpointing=True)


# Autocast, compile, export


def test_autocast() -> None:
    images = torch.randn(2, 3, 32, 48)
    bare = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES).eval().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = bare(images)
        wrap_backbone(bare, LOSSES)
        assert same(bare(images), expected)
        randomise(bare.calibration)
        seen: list[Tensor] = []
        for block in bare.blocks:
            block.register_forward_hook(lambda module, args, output: seen.append(output))
        features = bare.train().forward_features(images)
        loss = features.float().square().mean() + bare.calibration.loss(torch.randint(0, 5, (2, 32, 48)))
    loss.backward()
    assert {output.dtype for output in seen} == {torch.float32}
    grads = gradients(bare.calibration)
    assert len(grads) == len(list(bare.calibration.parameters()))
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads.values())


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    model = make(depth=2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if backend == "inductor" else {"rtol": 0, "atol": 0}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size in ((32, 48), (48, 32)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images), model(images), **tolerance)
    images = torch.randn(2, 3, 32, 48)
    compiled(images).square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    model(images).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)
    with model.calibration.disabled(), torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), **tolerance)


@pytest.mark.usefixtures("dynamo")
@torch.no_grad()
def test_compile_depends_on_an_images_size_and_not_on_those_before() -> None:
    images = [torch.randn(1, 3, *size) for size in ((32, 48), (48, 32))]
    counts = []
    for model in (unwrap_backbone(make(depth=2)), make(depth=2)):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(model.eval(), backend=counter, dynamic=False)
        for index in (0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0):
            compiled(images[index])
        counts.append(counter.frame_count)
    assert counts == [2, 2]


@pytest.mark.usefixtures("dynamo")
def test_compile_with_losses() -> None:
    model, images, labels = make(LOSSES).train(), torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48))
    first, twin = model, copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    grads = []
    for model, run in ((first, first), (twin, compiled)):
        model(images)  # so that there are statistics to use
        (run(images).square().mean() + model.calibration.loss(labels)).backward()
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name])
    statistics = [dict(model.calibration.named_buffers()) for model in (first, twin)]
    for name, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], value)


@torch.no_grad()
def test_export_with_dynamic_height_and_width() -> None:
    model = make().eval()
    height, width = torch.export.Dim("height", min=2, max=20), torch.export.Dim("width", min=2, max=20)
    shapes = ({2: 8 * height, 3: 8 * width},)
    program = torch.export.export(model, (torch.randn(1, 3, 32, 48),), dynamic_shapes=shapes)
    for size in ((32, 48), (72, 40)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)
    assert set(program.state_dict) == set(model.state_dict())
    assert len(model.calibration.check(torch.randn(1, 3, 40, 32))) == 3
    assert same(copy.deepcopy(model)(images), model(images))


def test_jit_trace() -> None:
    model, images = make().eval(), torch.randn(1, 3, 32, 48)
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), model(images))


# Memory formats, padding, missing grids


@torch.no_grad()
def test_channels_last_stays() -> None:
    case = zoo("timm-DaVit")
    model = wrap_backbone(case.build(), MGFCConfig(rank=4)).to(memory_format=torch.channels_last)
    randomise(model.calibration)
    strides: list[Any] = []
    model.get_submodule(case.blocks[0]).register_forward_hook(lambda m, a, output: strides.append(output.stride()))
    images = case.images().to(memory_format=torch.channels_last)
    model(images)
    with model.calibration.disabled():
        model(images)
    assert strides[0] == strides[1]


@torch.no_grad()
def test_padding_is_left_alone() -> None:
    """Each image of a padded batch is refined as if it stood alone; the stages leave padding as it was."""
    case = next(case for case in CASES if case.architecture == "NaFlexVit" and callable(case.kwargs))
    model = wrap_backbone(case.build(), MGFCConfig(rank=4))
    batch = case.kwargs(case.images())["images"]
    prefix, outputs = case.leading[0], []
    randomise(model.calibration)
    model.blocks[0].register_forward_hook(lambda m, a, output: outputs.append(output[:, prefix:]))
    valid, layer = batch["patch_valid"], model.calibration.layers["0"]
    assert not valid.all()

    def output(batch: dict[str, Tensor]) -> Tensor:
        model(batch)
        return outputs.pop()

    refined = output(batch)
    for image in range(len(valid)):
        alone = output({key: value[image : image + 1] for key, value in batch.items()})
        torch.testing.assert_close(refined[image, valid[image]], alone[0, valid[image]])
    nn.init.zeros_(layer.low_rank.up)
    refined = output(batch)
    with model.calibration.disabled():
        bare = output(batch)
    assert torch.equal(refined[~valid], bare[~valid])
    assert (refined[valid] != bare[valid]).any(dim=-1).all()
    for image in range(len(valid)):
        expected = layer(bare[image : image + 1, valid[image]], None)
        torch.testing.assert_close(refined[image : image + 1, valid[image]], expected)


def test_dropped_patches_have_no_grid() -> None:
    model = make(patch_drop_rate=0.5, dynamic_img_size=False).train()
    calibration: Calibration = model.calibration
    assert [report.grid for report in calibration.check(torch.randn(1, 3, 32, 32))] == [(4, 4)] * 3
    for hooks in calibration.blocks:
        hooks.watch(True)
    model(torch.randn(1, 3, 32, 32))
    reports = [hooks.report for hooks in calibration.blocks]
    assert [(r.grid, r.num_patches, r.leading, r.changed) for r in reports] == [(None, 8, 1, True)] * 3
    assert "no grid, fine stage skipped" in str(reports[0])


# Reports and errors


def test_check_names_feed_forward_networks_whose_map_is_not_called() -> None:
    class Fused(nn.Module):
        """Uses the weight of `fc1` without calling it, as fused kernels do."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.fc1, self.fc2 = mlp.fc1, mlp.fc2

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias)))

    model = make()
    model.blocks[1].mlp = Fused(model.blocks[1].mlp)
    with pytest.raises(CalibrationError, match=r"first linear layer.*found.*blocks\.1.*no effect"):
        model.calibration.check(torch.randn(1, 3, 32, 32))


def test_check_restores_modes_and_reports() -> None:
    model = make().train()
    model.blocks[1].eval()
    before = snapshot(model)
    reports = model.calibration.check(torch.randn(2, 3, 32, 48))
    assert_unchanged(model, before)
    assert str(reports[0]) == "blocks.0: 24 patches, grid 4 x 6, 1 leading and 0 trailing tokens passed through, refined"
    assert not make(trained=False).calibration.check(torch.randn(1, 3, 32, 48))[0].changed


def test_check_names_blocks_that_a_host_bypasses() -> None:
    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = make()

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.vit.patch_embed(images).flatten(1, 2)
            tokens = self.vit.blocks[0](tokens)
            for block in self.vit.blocks[1:]:
                tokens = tokens + block.attn(block.norm1(tokens))
            return tokens

    host = Bypassing()
    with pytest.raises(CalibrationError, match=r"Bypassing: .* passed by: blocks\.1, blocks\.2"):
        host.vit.calibration.check(torch.randn(1, 3, 32, 48), model=host)
    assert not any(hooks.watched for hooks in host.vit.calibration.blocks)


def test_summary_counts_every_parameter() -> None:
    calibration = make(MGFCConfig(rank=8, layers="last:2", fine=FineConfig(layers=(2,)))).calibration
    lines = calibration.summary().splitlines()
    assert lines[0].split() == ["low-rank", "coarse", "medium", "fine"]
    rows = {line.split()[0]: [int(v.replace(",", "")) for v in line.split()[1:5]] for line in lines[1:3]}
    assert set(rows) == {"blocks.1", "blocks.2"}
    assert rows["blocks.1"][3] == 0 < rows["blocks.2"][3]
    shared = int(lines[3].split()[1].replace(",", ""))
    assert sum(map(sum, rows.values())) + shared == calibration.num_parameters
    assert f"{calibration.num_parameters:,} parameters" in lines[-2]
    assert lines[-1] == "statistics of 3 batches, gathered during training"
    without = make(MGFCConfig(rank=8, coarse=None, medium=None)).calibration
    assert without.num_batches is None and "statistics" not in without.summary()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda tokens: tokens[..., :16], r"expected \(B, N, 32\).*found \(2, 25, 16\)"),
        (lambda tokens: {"tokens": tokens}, "expected tokens from the block, found dict"),
        (lambda tokens: tokens[0], r"found \(25, 32\)"),
    ],
)
def test_block_output_that_is_no_tokens(output: Any, message: str) -> None:
    model = make()
    model.blocks[2].register_forward_hook(lambda m, a, tokens: output(tokens), prepend=True)
    with pytest.raises(CalibrationError, match=rf"Block 'blocks.2' of VisionTransformer: .*{message}"):
        model.forward_features(torch.randn(2, 3, 32, 48))


def test_a_copy_of_the_calibration_alone_leaves_the_backbone_out() -> None:
    model = make()
    twin = copy.deepcopy(model.calibration)
    assert same(twin.state_dict(), model.calibration.state_dict())
    randomise(twin)
    assert not same(twin.state_dict(), model.calibration.state_dict())
    with pytest.raises(CalibrationError, match="not attached to a backbone"):
        twin.summary()
    kept = sum(isinstance(value, nn.Module) for value in vars(twin).values())
    assert kept == 0
    assert copy.deepcopy(model).calibration.backbone is not model


def test_detached_calibration_says_so() -> None:
    model = make()
    calibration = model.calibration
    unwrap_backbone(model)
    with pytest.raises(CalibrationError, match="not attached to a backbone"):
        calibration.check(torch.randn(1, 3, 32, 48))
    widths = [block_widths(block) for block in model.blocks]
    assert Adapter(calibration.config, widths).num_parameters == calibration.num_parameters


def test_stage_outside_the_calibrated_blocks() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES)
    with pytest.raises(
        mgfc.ConfigError, match=r"MGFCConfig.fine.layers: expected calibrated blocks, that is, \(1, 2\), found \(0,\)"
    ):
        wrap_backbone(vit, MGFCConfig(rank=8, layers="last:2", fine=FineConfig(layers=(0,))))
