"""Calibrators of models that Transformers builds without values, and of weights that accelerate keeps elsewhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from helpers import SIZES, randomise, same
from peft import LoraConfig
from tiny import calibrated, tiny_dinov2
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from mgfc import (
    CalibrationError,
    ConfigError,
    FineConfig,
    MGFCConfig,
    ReinConfig,
    UnsupportedBackboneError,
    get_calibration,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.config import AdapterConfig

CONFIG = MGFCConfig(rank=4, fine=FineConfig())
IMAGES = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))


class Segmenter(PreTrainedModel):
    """What a user of Transformers writes: a model of their own that wraps its backbone where it is built."""

    config_class = Dinov2Config
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    adapter: AdapterConfig | Path = CONFIG
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.backbone = wrap_backbone(self.build(config), self.adapter, **self.options)
        self.head = nn.Linear(32, 5)
        self.post_init()

    def build(self, config: Dinov2Config) -> nn.Module:
        return Dinov2Model(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.backbone(pixel_values.to(self.head.weight.dtype)).last_hidden_state)


class TimmSegmenter(Segmenter):
    """The same around a backbone of timm's, which Transformers does not know."""

    base_model_prefix = "nothing"

    def build(self, config: Dinov2Config) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES | {"img_size": 56, "patch_size": 14})

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.backbone.forward_features(pixel_values.to(self.head.weight.dtype)))


class DrawsAnew(Segmenter):
    """With an initialisation that knows weights by their names, as older ones do."""

    def _init_weights(self, module: nn.Module) -> None:
        for name in ("weight", "bias", "up", "gate", "total", "count"):
            if isinstance(getattr(module, name, None), Tensor):
                getattr(module, name).data.normal_()


class WithRein(Segmenter):
    adapter = ReinConfig(num_tokens=5, token_rank=2)


MODELS = pytest.mark.parametrize("model_class", [Segmenter, TimmSegmenter, DrawsAnew, WithRein])


def config() -> Dinov2Config:
    return Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)


def without_calibrators(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "calibration" not in name}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    tiny_dinov2(patch_size=14).save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def assert_fresh(model: Any) -> None:
    """The calibrators are the exact identity, have seen nothing, and are what trains."""
    calibration = get_calibration(model)
    backbone = [p for name, p in model.backbone.named_parameters() if not name.startswith("calibration.")]
    assert backbone and not any(p.requires_grad for p in backbone)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in calibration.parameters())
    assert all(tensor.isfinite().all() for tensor in (*calibration.parameters(), *calibration.buffers()))
    assert not any(tensor.any() for tensor in calibration.buffers())
    assert all(p.any() for name, p in calibration.named_parameters() if name.endswith("low_rank.down"))
    with torch.no_grad():
        found = model.eval()(IMAGES)
        with calibration.disabled():
            assert torch.equal(model(IMAGES), found)
    assert found.isfinite().all()


class TestConstruction:
    @MODELS
    def test_of_a_configuration(self, model_class: type[Segmenter]) -> None:
        assert_fresh(model_class(config()))
        assert_fresh(model_class._from_config(config()))
        assert_fresh(model_class._from_config(config(), dtype=torch.bfloat16))

    @MODELS
    @pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": {"": "cpu"}}])
    def test_of_bare_weights(self, model_class: type[Segmenter], options: Any, tmp_path: Path) -> None:
        source = model_class(config())
        source.save_pretrained(tmp_path, state_dict=without_calibrators(source))
        model = model_class.from_pretrained(tmp_path, **options)
        assert_fresh(model)
        assert same(without_calibrators(model), without_calibrators(source.to(model.dtype)))
        get_calibration(model).check(IMAGES, model=model)
        unwrap_backbone(model)
        assert all(p.requires_grad for p in model.parameters())

    def test_of_a_backbones_weights(self, bare: Path) -> None:
        model = Segmenter.from_pretrained(bare)
        assert_fresh(model)
        assert same(without_calibrators(model.backbone), Dinov2Model.from_pretrained(bare).state_dict())

    @MODELS
    def test_of_saved_weights(self, model_class: type[Segmenter], tmp_path: Path) -> None:
        saved = model_class(config())
        randomise(saved.backbone.calibration)
        saved.save_pretrained(tmp_path)
        model = model_class.from_pretrained(tmp_path)
        assert same(model.state_dict(), saved.state_dict()) and same(model(IMAGES), saved.eval()(IMAGES))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in saved.named_parameters() if p.requires_grad
        }
        half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).backbone.calibration
        assert same(half.state_dict(), saved.backbone.calibration.state_dict()), "statistics stay in full precision"

    def test_what_training_made_is_not_forgotten(self, bare: Path) -> None:
        model = Segmenter.from_pretrained(bare).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(IMAGES).square().mean().backward()
        optimizer.step()
        before = {name: value.clone() for name, value in model.backbone.calibration.state_dict().items()}
        assert before["adapter_default.layers.0.low_rank.up"].any() and before["adapter_default.coarse.source.count"] == 1
        for twin in (model.eval(), copy.deepcopy(model).train().eval()):
            twin(IMAGES)
            assert same(twin.backbone.calibration.state_dict(), before)

    def test_with_an_adapter_that_was_saved(self, bare: Path, tmp_path: Path) -> None:
        backbone = Dinov2Model.from_pretrained(bare, attn_implementation="eager")  # as a part of another model
        expected = calibrated(backbone, CONFIG)
        expected.save_pretrained(tmp_path / "adapter")

        class Saved(Segmenter):
            adapter = tmp_path / "adapter"

        model = Saved.from_pretrained(bare)
        assert same(model.backbone.calibration.state_dict(), expected.state_dict())
        assert same(model.backbone(IMAGES), backbone(IMAGES))

    def test_with_several_adapters(self, bare: Path) -> None:
        class Two(Segmenter):
            def build(self, config: Dinov2Config) -> nn.Module:
                self.backbone = wrap_backbone(Dinov2Model(config), CONFIG)
                self.backbone.calibration.add_adapter("other", MGFCConfig(rank=2))
                return self.backbone

            def __init__(self, config: Dinov2Config) -> None:
                PreTrainedModel.__init__(self, config)
                self.build(config)
                self.head = nn.Linear(32, 5)
                self.post_init()

        calibration = get_calibration(Two.from_pretrained(bare))
        assert all(p.requires_grad for p in calibration.adapters["default"].parameters())
        assert not any(p.requires_grad for p in calibration.adapters["other"].parameters())
        layers = [layer for adapter in calibration.adapters.values() for layer in adapter.layers.values()]
        assert not any(layer.low_rank.up.any() for layer in layers) and all(layer.low_rank.down.any() for layer in layers)

    def test_with_peft_needs_the_weights_first(self, bare: Path) -> None:
        class Adapted(Segmenter):
            options = {"peft_config": LoraConfig(r=2, target_modules=["query"])}  # noqa: RUF012

        with pytest.raises(UnsupportedBackboneError, match=r"an adapter of PEFT's .* backbone whose weights have values"):
            Adapted.from_pretrained(bare)


class TestMetaDevice:
    def test_to_empty(self) -> None:
        """PyTorch's own way: places without values, which a state dict then fills."""
        with torch.device("meta"):
            model = Segmenter(config())
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        source = Segmenter(config())
        model.to_empty(device="cpu").load_state_dict(without_calibrators(source), strict=False)
        assert_fresh(model)

    def test_assigned_values(self) -> None:
        with torch.device("meta"):
            model, whole = Segmenter(config()), Segmenter(config())
        source = Segmenter(config())
        randomise(source.backbone.calibration)
        whole.load_state_dict(source.state_dict(), assign=True)
        assert same(whole.eval()(IMAGES), source.eval()(IMAGES))
        model.load_state_dict(without_calibrators(source), strict=False, assign=True)
        assert_fresh(model)

    def test_saving_before_the_first_forward(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = Segmenter(config())
        model.load_state_dict(without_calibrators(Segmenter(config())), strict=False, assign=True)
        model.backbone.calibration.save_pretrained(tmp_path)
        assert "statistics of no batch yet" in model.backbone.calibration.summary()
        assert_fresh(model)

    def test_what_takes_parameters_away_is_named(self) -> None:
        with init_empty_weights(), pytest.raises(UnsupportedBackboneError, match="init_empty_weights"):
            wrap_backbone(tiny_dinov2(), CONFIG)


OFFLOADS: dict[str, Callable[[nn.Module, str], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "cpu, buffers": lambda model, folder: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu"), offload_buffers=True),
    "map": lambda model, folder: dispatch_model(
        model,
        {"embeddings": "cpu", "layernorm": "cpu"}
        | {f"encoder.layer.{i}": "disk" if i % 2 else "cpu" for i in range(3)}
        | ({"calibration": "disk"} if hasattr(model, "calibration") else {}),
        main_device="cpu",
        offload_dir=folder,
        offload_buffers=True,
    ),
}


class TestOffload:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, Any]:
        torch.manual_seed(0)
        calibration = calibrated(tiny_dinov2(patch_size=14), CONFIG)
        calibration.save_pretrained(tmp_path / "adapter", base_model="org/name")
        return tmp_path / "adapter", calibration.backbone(IMAGES).last_hidden_state

    @pytest.mark.parametrize("wrapped_first", [False, True])
    @pytest.mark.parametrize("offload", OFFLOADS.values(), ids=list(OFFLOADS))
    def test_forward_and_save(
        self,
        offload: Callable[[nn.Module, str], Any],
        wrapped_first: bool,
        saved: tuple[Path, Any],
        tmp_path: Path,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        adapter, expected = saved
        torch.manual_seed(0)
        model = tiny_dinov2(patch_size=14)
        if wrapped_first:
            wrap_backbone(model, adapter)
        offload(model, str(tmp_path / "offloaded"))
        assert any(p.is_meta for p in model.encoder.parameters())
        if not wrapped_first:
            wrap_backbone(model, adapter)
        assert wrapped_first or not any(p.is_meta for p in model.calibration.parameters())
        model.calibration.save_pretrained(tmp_path / "again", base_model="org/name")
        assert torch.equal(model(IMAGES).last_hidden_state, expected)
        assert not any(tensor.is_meta for tensor in model.calibration.state_dict().values())
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (adapter / "model.safetensors").read_bytes()
        assert (tmp_path / "again" / "config.json").read_bytes() == (adapter / "config.json").read_bytes(), (
            "its fingerprint, too"
        )
        assert not [w for w in recwarn if "other weights" in str(w.message)]
        with model.calibration.observing():
            model(IMAGES)
        assert model.calibration.num_batches == 1 and len(model.calibration.check(IMAGES)) == 3

    def test_the_first_forward_takes_calibrators_back(self, saved: tuple[Path, Any], tmp_path: Path) -> None:
        adapter, expected = saved
        torch.manual_seed(0)
        model = disk_offload(wrap_backbone(tiny_dinov2(patch_size=14), adapter), str(tmp_path / "x"), torch.device("cpu"), True)
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(model(IMAGES).last_hidden_state, expected)
        assert {n for n, p in model.named_parameters() if not p.is_meta} == {
            f"calibration.{n}" for n, _ in model.calibration.named_parameters()
        }

    @pytest.mark.parametrize("has_calibrators", [False, True])
    def test_in_a_class_of_the_users(self, has_calibrators: bool, bare: Path, tmp_path: Path) -> None:
        """Transformers infers the map from all modules, calibrators among them, and reads the file in place."""
        source = bare
        if has_calibrators:
            saved, source = Segmenter.from_pretrained(bare), tmp_path / "saved"
            randomise(saved.backbone.calibration)
            saved.save_pretrained(source)
        places = dict.fromkeys(["backbone.encoder", "backbone.calibration"], "disk")
        places |= dict.fromkeys(["backbone.embeddings", "backbone.layernorm", "head"], "cpu")
        model = Segmenter.from_pretrained(source, device_map=places, offload_folder=tmp_path / "off", offload_buffers=True)
        assert any(p.is_meta for p in model.parameters())
        if has_calibrators:
            assert same(model(IMAGES), saved.eval()(IMAGES))
            assert same(model.backbone.calibration.state_dict(), saved.backbone.calibration.state_dict())
        else:
            with torch.no_grad():
                assert model(IMAGES).isfinite().all()
            assert_fresh(model)

    def test_each_calibrator_lies_where_its_block_computes(self) -> None:
        """A CPU has one device, so some blocks are told to compute on the meta device, as a second one."""
        model = tiny_dinov2(patch_size=14)
        places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "meta", "encoder.layer.2": "cpu"}
        dispatch_model(model, places | {"layernorm": "cpu"}, main_device="cpu", force_hooks=True)
        with pytest.raises(ConfigError, match="ReinConfig: expected blocks on one device"):
            wrap_backbone(model, ReinConfig(num_tokens=5, token_rank=2))
        calibration = wrap_backbone(model, CONFIG).calibration
        found = {
            key: {tensor.device.type for tensor in layer.state_dict().values()} for key, layer in calibration.layers.items()
        }
        assert found == {"0": {"cpu"}, "1": {"meta"}, "2": {"cpu"}}
        assert calibration.adapter.coarse.source.total.device.type == "cpu"

    def test_fusing_is_refused(self, tmp_path: Path) -> None:
        model = wrap_backbone(tiny_dinov2(), CONFIG)
        disk_offload(model, str(tmp_path), torch.device("cpu"))
        with pytest.raises(CalibrationError, match=r"expected a plain weight to fuse .* offloaded"):
            model.calibration.fuse()
        assert re.search("low-rank", model.calibration.summary())
