"""Wrapping a backbone that sits inside somebody else's model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import helpers
import lightning
import pytest
import timm
import torch
from helpers import randomise, same
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Dinov2Config, Dinov2Model, Trainer, TrainingArguments
from zoo import CASES

from mgfc import CalibrationError, FeatureMaps, MGFCConfig, SegmentationHead, get_calibration, wrap_backbone

CONFIG = MGFCConfig(rank=4)
SIZES = {**helpers.SIZES, "num_classes": 0}


def build(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def test_segmentation_model() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES)
            self.encoder = nn.ModuleDict({"model": wrap_backbone(vit, CONFIG)})
            self.maps = FeatureMaps(self.encoder["model"], (1, 2))
            self.decoder = SegmentationHead(self.maps.channels, 5, hidden_dim=16)

        def forward(self, images: Tensor) -> Tensor:
            return self.decoder(self.maps(images))

    model, images = Segmenter(), torch.randn(2, 3, 32, 48)
    calibration = get_calibration(model)
    assert calibration.backbone is model.encoder["model"]
    before = model(images)
    assert before.shape == (2, 5, 8, 12)
    calibration.check(images, model=model)
    randomise(calibration)
    assert not torch.equal(model(images), before)
    model(images).square().mean().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert all(p.grad is not None for p in calibration.parameters())


@torch.no_grad()
def test_composite_vision_language_model() -> None:
    case = build("transformers-CLIPModel")
    model, images = case.build(), case.images()
    bare = case.call(model, images)
    assert wrap_backbone(model, CONFIG) is model
    calibration = get_calibration(model)
    assert calibration.backbone is model.vision_model
    assert all(p.requires_grad for p in model.text_model.parameters())
    randomise(calibration)
    assert not same(case.call(model, images).image_embeds, bare.image_embeds)
    assert same(case.call(model, images).text_embeds, bare.text_embeds)


@torch.no_grad()
def test_segmentation_host_sees_refined_maps() -> None:
    case = build("transformers-UperNetForSemanticSegmentation-swin")
    model, images = case.build(), case.images()
    wrap_backbone(model, CONFIG)
    calibration = get_calibration(model)
    bare = case.call(model, images).logits
    randomise(calibration)
    assert not torch.equal(case.call(model, images).logits, bare)
    assert all(p.requires_grad for p in model.decode_head.parameters())


def test_wrapping_only_a_part_of_a_host() -> None:
    case = build("transformers-UperNetForSemanticSegmentation-swin")
    model = case.build()
    wrap_backbone(model.backbone, CONFIG)
    assert get_calibration(model).backbone is model.backbone


def test_ema_copy_is_independent() -> None:
    vit, images = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES), torch.randn(1, 3, 32, 48)
    wrap_backbone(vit, CONFIG)
    randomise(vit.calibration)
    ema = ModelEmaV3(vit, decay=0.5)
    before = ema.module(images)
    assert same(before, vit.eval()(images))
    randomise(vit.calibration, std=1.0)
    assert same(ema.module(images), before)
    old = ema.module.calibration.layers["0"].low_rank.up.clone()
    ema.update(vit)
    torch.testing.assert_close(
        ema.module.calibration.layers["0"].low_rank.up, 0.5 * (old + vit.calibration.layers["0"].low_rank.up)
    )


class LightningSegmenter(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES)
        self.vit = wrap_backbone(vit, MGFCConfig(rank=4))
        self.head = nn.Linear(32, 5)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        tokens = self.vit.forward_features(batch[0])[:, 1:]
        logits = self.head(tokens).mT.unflatten(2, (4, 6))
        loss = F.cross_entropy(F.interpolate(logits, scale_factor=8), batch[1])
        return loss + self.vit.calibration.loss(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(directory: Path, *callbacks: lightning.Callback) -> tuple[LightningSegmenter, lightning.Trainer]:
    torch.manual_seed(0)
    module, data = LightningSegmenter(), TensorDataset(torch.randn(4, 3, 32, 48), torch.randint(0, 5, (4, 32, 48)))
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(data, 2))
    return module, trainer


def test_lightning(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path)
    assert get_calibration(module) is module.vit.calibration
    before, after = LightningSegmenter().state_dict(), module.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all("calibration" in name or name.startswith("head") for name in moved)
    assert any(name.endswith("low_rank.up") for name in moved)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    twin = LightningSegmenter()
    twin.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    images = torch.randn(1, 3, 32, 48)
    assert same(twin.eval().vit(images), module.eval().vit(images))


def test_lightning_averages_calibrators_and_nothing_else(tmp_path: Path) -> None:
    """Its average is a copy of the module while it trains, and takes the module's place at the end."""
    plain, _ = fit(tmp_path)
    averaged, _ = fit(tmp_path, EMAWeightAveraging(decay=0.5))
    calibration = get_calibration(averaged)
    assert calibration.backbone is averaged.vit and calibration.num_batches
    start, last, mean = (module.state_dict() for module in (LightningSegmenter(), plain, averaged))
    for name, value in mean.items():
        if "calibration" in name and name.endswith("low_rank.up"):
            assert value.any() and not torch.equal(value, last[name])
        elif "calibration" not in name and not name.startswith("head"):
            assert torch.equal(value, start[name])
    frozen = {name for name, p in averaged.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in start if name.startswith("vit.") and "calibration" not in name}
    images = torch.randn(1, 3, 32, 48)
    with calibration.disabled():
        bare = averaged.eval().vit(images)
    assert same(bare, LightningSegmenter().eval().vit(images)) and not same(averaged.vit(images), bare)


class CalibratedViT(nn.Module):
    """The backbone of `docs/hosts.md`, for hosts that build one by name."""

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2), adapter: Any = CONFIG) -> None:
        super().__init__()
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES)
        self.maps = FeatureMaps(wrap_backbone(vit, adapter), out_indices)
        self.out_channels = self.maps.channels

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps(images)


def assert_calibrated(host: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor]) -> None:
    """The host calls every calibrated block, and its output depends on the calibrators."""
    calibration = get_calibration(host.eval())
    assert len(calibration.check(images, model=host)) == len(calibration.layers)
    with torch.no_grad():
        bare = forward(images)
        randomise(calibration)
        assert not torch.equal(forward(images), bare)


@pytest.mark.hosts
def test_torchgeo() -> None:
    trainers = pytest.importorskip("torchgeo.trainers")
    sizes = {"in_channels": 3, "task": "multiclass", "num_classes": 5, "weights": None}
    task = trainers.SemanticSegmentationTask(model="dpt", backbone="tu-vit_tiny_patch16_224", **sizes)
    wrap_backbone(task.model.encoder.model, CONFIG)
    assert_calibrated(task, torch.randn(1, 3, 224, 224), task)


@pytest.mark.hosts
def test_terratorch() -> None:
    models = pytest.importorskip("terratorch.models")
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    TERRATORCH_BACKBONE_REGISTRY.register(CalibratedViT)
    names = {"task": "segmentation", "backbone": "CalibratedViT", "decoder": "FCNDecoder", "num_classes": 5}
    model = models.EncoderDecoderFactory().build_model(**names)
    assert_calibrated(model, torch.randn(2, 3, 64, 64), lambda images: model(images).output)


@pytest.mark.hosts
def test_mmengine(tmp_path: Path) -> None:
    """Built by a registry, trained by its runner with its moving average."""
    pytest.importorskip("mmengine")
    from mmengine.model import BaseModel
    from mmengine.registry import MODELS
    from mmengine.runner import Runner

    MODELS.register_module(module=CalibratedViT, force=True)

    @MODELS.register_module(force=True)
    class Segmenter(BaseModel):
        def __init__(self, backbone: dict[str, Any]) -> None:
            super().__init__()
            self.backbone = MODELS.build(backbone)
            self.head = nn.Conv2d(self.backbone.out_channels[-1], 5, 1)

        def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
            logits = F.interpolate(self.head(self.backbone(images)[-1]), size=labels.shape[1:])
            return {"loss": F.cross_entropy(logits, labels)} if mode == "loss" else logits

    data = [(torch.randn(3, 32, 48), torch.randint(0, 5, (32, 48))) for _ in range(4)]
    options: dict[str, Any] = {
        "model": {"type": "Segmenter", "backbone": {"type": "CalibratedViT"}},
        "train_dataloader": {
            "dataset": data,
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler"},
            "collate_fn": {"type": "default_collate"},
        },
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-2}},
        "custom_hooks": [{"type": "EMAHook", "momentum": 0.5}],
        "default_scope": "mmengine",
        "log_level": "ERROR",
    }
    train = {"by_epoch": True, "max_epochs": 2}
    runner = Runner(work_dir=str(tmp_path), train_cfg=train, **options)
    start = {name: value.clone() for name, value in runner.model.state_dict().items()}
    trained = runner.train()
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, start[name])}
    assert any(name.endswith("low_rank.up") for name in moved)
    assert all("calibration" in name or name.startswith("head") for name in moved)
    assert get_calibration(trained).num_batches == 4
    get_calibration(trained).save_pretrained(tmp_path / "adapter")
    images = torch.randn(1, 3, 32, 48)
    expected = trained.eval().backbone(images)
    assert same(MODELS.build({"type": "CalibratedViT", "adapter": tmp_path / "adapter"}).eval()(images), expected)
    assert_calibrated(trained.backbone, images, lambda images: trained.backbone(images)[-1])


class TrainerSegmenter(nn.Module):
    """What `Trainer` expects: a loss in the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Dinov2Config(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
        self.maps = FeatureMaps(wrap_backbone(Dinov2Model(config), MGFCConfig(rank=4)), out_indices=(1, 2))
        self.head = SegmentationHead(self.maps.channels, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.maps(pixel_values))
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_transformers_trainer_resumes_where_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "pixel_values": torch.randn(3, 32, 48, generator=generator),
            "labels": torch.randint(5, (32, 48), generator=generator),
        }
        for _ in range(8)
    ]

    def train(resume: str | None = None) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = TrainerSegmenter()
        Trainer(model=model, args=arguments, train_dataset=items).train(resume_from_checkpoint=resume)
        assert get_calibration(model).num_batches == 4
        return {name: value.clone() for name, value in model.state_dict().items()}

    through = train()
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert any(value.any() for name, value in through.items() if name.endswith("low_rank.up"))
    assert all(torch.equal(value, through[name]) for name, value in resumed.items())


def test_a_host_that_runs_the_parts_of_a_block_is_told_what_is_reached() -> None:
    """The original EoMT's way: low-rank adapters train, the stages behind a block see nothing."""

    class Eomt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = wrap_backbone(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES), CONFIG)

        def forward(self, images: Tensor) -> Tensor:
            x = self.backbone.patch_embed(images).flatten(1, 2)
            for block in self.backbone.blocks:
                x = x + block.ls1(block.attn(block.norm1(x)))
                x = x + block.ls2(block.mlp(block.norm2(x)))
            return x

    net, images = Eomt(), torch.randn(1, 3, 32, 48)
    calibration = get_calibration(net)
    with pytest.raises(CalibrationError, match="low-rank adapters have an effect, but the stages behind a block have none"):
        calibration.check(images, model=net)
    net(images).square().mean().backward()
    assert all(layer.low_rank.up.grad.any() for layer in calibration.layers.values())
    with pytest.warns(UserWarning, match=r"the last forward of a host called none .* Give it the host"):
        assert len(calibration.check(images)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.check(images)  # of a forward of the backbone itself there is nothing to say


def test_an_adapter_of_the_authors_dinov3_moves(tmp_path: Path) -> None:
    """Its storage tokens count as prefix tokens, as in timm's form and Transformers'."""
    own = build("authors-DinoVisionTransformer-dinov3").build()
    wrap_backbone(own, CONFIG)
    randomise(own.calibration)
    own.calibration.save_pretrained(tmp_path)
    other = timm.create_model("vit_small_patch16_dinov3", **SIZES | {"mlp_ratio": 2.0})
    with pytest.warns(UserWarning, match="other weights"):
        wrap_backbone(other, tmp_path)
    assert same(other.calibration.state_dict(), own.calibration.state_dict())
    assert [report.leading for report in other.calibration.check(torch.randn(1, 3, 32, 32))] == [5, 5, 5]
