"""The command line: what it prints, as text and as JSON, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer

from mgfc import MGFCConfig, SegmentationHead, __version__, load_head, wrap_backbone
from mgfc.cli import main

Capture = pytest.CaptureFixture[str]


def tiny() -> timm.models.VisionTransformer:
    model: timm.models.VisionTransformer = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2
    )
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    vit = wrap_backbone(tiny(), MGFCConfig(rank=8, fine=None))
    training = {"metrics": {"mIoU": 61.2}, "datasets": ["streets"], "steps": 3}
    vit.calibration.save_pretrained(tmp_path / "adapter", head=SegmentationHead([32], 5), training=training)
    return tmp_path / "adapter"


def as_json(capsys: Capture, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


class TestInfo:
    def test_text(self, adapter: Path, capsys: Capture) -> None:
        assert main(["info", str(adapter)]) == 0
        printed = capsys.readouterr().out
        for text in (
            f"mgfc adapter, format 2, written by mgfc {__version__}",
            "VisionTransformer (timm)",
            "3 blocks of width 32, patches of 16 x 16, 1 prefix tokens",
            "mgfc: rank 8, layers all",
            "fine       none",
            "statistics of no batch yet",
            "metrics: mIoU 61.2",
            "datasets: streets",
            "licence: apache-2.0",
        ):
            assert text in printed
        path = json.dumps(str(adapter))
        assert printed.endswith(f"    backbone = wrap_backbone(backbone, {path})\n    head = load_head({path})\n")

    def test_the_code_that_it_prints_loads_the_adapter(self, adapter: Path, capsys: Capture) -> None:
        _, found = as_json(capsys, "info", str(adapter))
        names = {"backbone": tiny(), "wrap_backbone": wrap_backbone, "load_head": load_head}
        exec("\n".join(found["load"]), names)
        assert names["backbone"].calibration.config == MGFCConfig(rank=8, fine=None)
        assert names["head"].classify.out_channels == 5

    def test_a_revision(self, hub: HubServer, adapter: Path, capsys: Capture) -> None:
        hub.put("org/a", {path.name: path.read_bytes() for path in adapter.iterdir()}, revision="dev")
        _, found = as_json(capsys, "info", "org/a", "--revision", "dev")
        assert found["load"][0] == 'backbone = wrap_backbone(backbone, "org/a", revision="dev")'

    @pytest.mark.parametrize("afterwards", [True, False])
    def test_when_statistics_were_gathered(self, tmp_path: Path, capsys: Capture, afterwards: bool) -> None:
        vit = wrap_backbone(tiny(), MGFCConfig(rank=None))
        with vit.calibration.observing() if afterwards else nullcontext():
            vit.train(not afterwards)
            for _ in range(3):
                vit(torch.randn(2, 3, 32, 32))
        vit.calibration.save_pretrained(tmp_path)
        assert as_json(capsys, "info", str(tmp_path))[1]["statistics"] == {"batches": 3, "gathered_after_training": afterwards}
        sentence = f"statistics of 3 batches, gathered {'after' if afterwards else 'during'} training"
        assert main(["info", str(tmp_path)]) == 0
        assert f"\n{sentence}\n" in capsys.readouterr().out
        assert f"\n- {sentence}\n" in (tmp_path / "README.md").read_text()
        assert vit.calibration.summary().endswith(f"\n{sentence}")

    def test_notes_of_strangers_do_not_steer_the_terminal(self, tmp_path: Path, capsys: Capture) -> None:
        tiny_adapter = wrap_backbone(tiny(), MGFCConfig(rank=8)).calibration
        tiny_adapter.save_pretrained(tmp_path, training={"recipe\x1b[2J": "\x1b]0;title\x07 600 steps\nlicence: mine"})
        assert main(["info", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "600 steps licence: mine\n" in printed and "\x1b" not in printed and "\x07" not in printed

    def test_json(self, adapter: Path, capsys: Capture) -> None:
        status, found = as_json(capsys, "info", str(adapter))
        assert status == 0
        assert found["calibration"]["rank"] == 8
        assert found["backbone"]["embed_dim"] == 32
        files = found["files"]
        assert files["model.safetensors"]["bytes"] == (adapter / "model.safetensors").stat().st_size
        assert files["head.safetensors"]["values"] == sum(p.numel() for p in SegmentationHead([32], 5).parameters())

    def test_an_adapter_that_is_not_there_or_damaged(self, adapter: Path, capsys: Capture) -> None:
        assert main(["info", str(adapter / "nothing")]) == 1
        assert capsys.readouterr().err.startswith("AdapterNotFoundError: ")
        (adapter / "model.safetensors").write_bytes(b"no")
        status, found = as_json(capsys, "info", str(adapter))
        assert status == 1
        assert found["error"] == "AdapterFileError"
        assert "damaged" in found["message"]


class TestCheck:
    def test_timm(self, capsys: Capture) -> None:
        assert main(["check", "test_vit"]) == 0
        printed = capsys.readouterr().out
        assert "VisionTransformer, 160 x 160 pixels" in printed
        assert "blocks.0: 100 patches, grid 10 x 10, 1 leading and 0 trailing tokens passed through" in printed
        assert "% of the backbone's" in printed
        status, found = as_json(capsys, "check", "vit_tiny_patch16_224", "--size", "32", "64")
        assert status == 1
        assert found["error"] == "CalibrationError"
        assert "32 x 64" in found["message"]

    def test_transformers(self, tmp_path: Path, capsys: Capture) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
        )
        config.save_pretrained(tmp_path)
        status, found = as_json(capsys, "check", str(tmp_path), "--size", "42", "70", "--blocks", r"encoder\.layer\.[12]")
        assert status == 0
        assert [block["name"] for block in found["blocks"]] == ["encoder.layer.1", "encoder.layer.2"]
        assert found["blocks"][0]["grid"] == [3, 5]
        assert found["size"] == [42, 70]
        assert found["backbone"]["architecture"] == "Dinov2Model"
        assert found["parameters"] > 0

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            ("resnet18", "UnsupportedBackboneError", "expected a vision transformer"),
            ("./no/such/model", "AdapterNotFoundError", "expected the name of a timm model"),
        ],
    )
    def test_what_cannot_be_checked(self, model: str, error: str, message: str, capsys: Capture) -> None:
        status, found = as_json(capsys, "check", model)
        assert (status, found["error"]) == (1, error)
        assert message in found["message"]


def test_convert_rein(tmp_path: Path, capsys: Capture) -> None:
    from test_rein import checkpoint

    torch.save(checkpoint(True), tmp_path / "rein.pth")
    status, found = as_json(capsys, "convert-rein", str(tmp_path / "rein.pth"), str(tmp_path / "out"))
    assert status == 0
    assert found["calibration"] == {"num_tokens": 7, "token_rank": 4, "layers": "all"}
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "rein: num_tokens 7, token_rank 4" in capsys.readouterr().out
    assert main(["convert-rein", str(tmp_path / "nothing.pth"), str(tmp_path / "out")]) == 1
    assert "AdapterNotFoundError" in capsys.readouterr().err
    status, found = as_json(capsys, "convert-rein", str(tmp_path / "rein.pth"), str(tmp_path / "rein.pth"))
    assert (status, found["error"]) == (1, "AdapterNotFoundError")


@pytest.mark.parametrize("arguments", [[], ["info"], ["snow"], ["check", "test_vit", "--size", "3"]])
def test_wrong_commands(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: mgfc" in capsys.readouterr().err


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "mgfc", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"mgfc {__version__}\n"
