"""Wrapped models outside Python and in low precision: ONNX, ExecuTorch, weight-only quantisation, bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomise, same
from torch import nn

from mgfc import FeatureMaps, MGFCConfig, SegmentationHead, wrap_backbone


def bare(embed_dim: int = 32, dynamic_img_size: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=embed_dim,
        depth=3,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=dynamic_img_size,
    ).eval()


def wrapped(embed_dim: int = 32, dynamic_img_size: bool = True) -> nn.Module:
    vit = wrap_backbone(bare(embed_dim, dynamic_img_size), MGFCConfig(rank=8))
    randomise(vit.calibration)
    return vit.eval()


def test_onnx_with_changing_sizes(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(FeatureMaps(wrapped(), (0, 2)), SegmentationHead([32, 32], 5)).eval()
    height, width = torch.export.Dim("height", min=2, max=20), torch.export.Dim("width", min=2, max=20)
    shapes = ({2: 8 * height, 3: 8 * width},)
    program = torch.onnx.export(model, (torch.randn(1, 3, 32, 48),), dynamo=True, dynamic_shapes=shapes)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (entry,) = session.get_inputs()
    for size in ((32, 48), (48, 32), (72, 24)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(images)
            with model[0].backbone.calibration.disabled():
                assert (model(images) - expected).abs().max() > 1e-2
        (found,) = session.run(None, {entry.name: images.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_the_older_exporter(tmp_path: Path) -> None:
    """It traces, so that the size is that of the trace."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(FeatureMaps(wrapped(dynamic_img_size=False), (0, 2)), SegmentationHead([32, 32], 5)).eval()
    torch.onnx.export(model, (torch.randn(1, 3, 32, 32),), tmp_path / "model.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (torch.randn(1, 3, 32, 32), -torch.rand(1, 3, 32, 32)):  # a bright one, and one darker than the mean
        expected = model(images)
        with model[0].backbone.calibration.disabled():
            assert (model(images) - expected).abs().max() > 1e-2
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4


@pytest.mark.hosts
@torch.no_grad()
def test_executorch() -> None:
    exir = pytest.importorskip("executorch.exir")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    images = torch.randn(1, 3, 32, 32)
    model = nn.Sequential(FeatureMaps(wrapped(dynamic_img_size=False), (0, 2)), SegmentationHead([32, 32], 5)).eval()
    expected = model(images)
    with model[0].backbone.calibration.disabled():
        assert (model(images) - expected).abs().max() > 1e-2
    exported = torch.export.export(model, (images,))
    for partitioner in (None, [XnnpackPartitioner()]):
        program = exir.to_edge_transform_and_lower(exported, partitioner=partitioner).to_executorch()
        (found,) = Runtime.get().load_program(program.buffer).load_method("forward").execute([images])
        assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("name", "tolerance"), [("Int8WeightOnlyConfig", 0.05), ("Float8WeightOnlyConfig", 0.2)])
def test_quantised_backbone_with_calibrators_in_full_precision(
    name: str, tolerance: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    vit, images = wrapped(64), torch.randn(2, 3, 32, 48)
    expected = vit(images)
    quantization.quantize_(
        vit,
        getattr(quantization, name)(),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and not path.startswith("calibration."),
    )
    assert "torchao" in type(vit.blocks[0].mlp.fc1.weight).__module__
    assert {parameter.dtype for parameter in vit.calibration.parameters()} == {torch.float32}
    assert all("torchao" not in type(parameter).__module__ for parameter in vit.calibration.parameters())
    found = vit(images)
    assert 0 < (found - expected).abs().max() < tolerance
    # Saved from a quantised backbone, the adapter loads on one, and trains there.
    vit.calibration.save_pretrained(tmp_path)
    twin = bare(64)
    quantization.quantize_(twin, getattr(quantization, name)())
    wrap_backbone(twin, tmp_path)
    assert same(twin(images), found)
    wrap_backbone(bare(64), tmp_path)
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]
    twin.train()(images)[:, 0].sum().backward()
    assert twin.calibration.layers["0"].low_rank.up.grad.any()


def test_bfloat16_backbone() -> None:
    vit, images = wrapped(), torch.randn(2, 3, 32, 48)
    expected = vit(images)
    half = copy.deepcopy(vit).to(torch.bfloat16)
    half.calibration.float()
    found = half(images.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
