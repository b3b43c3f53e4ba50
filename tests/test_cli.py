"""The command line: what it prints, as text and as JSON, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import randomise
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save

from mgfc import MGFCConfig, SegmentationHead, __version__, load_head, wrap_backbone
from mgfc.backbones.named import IMAGENET, build
from mgfc.cli import main
from mgfc.viz.files import as_tensor, read_image

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

    def test_a_head_of_another_class_has_to_be_given(self, tmp_path: Path, capsys: Capture) -> None:
        vit = wrap_backbone(tiny(), MGFCConfig(rank=8))
        vit.calibration.save_pretrained(tmp_path, head=torch.nn.Conv2d(32, 5, 1))
        _, found = as_json(capsys, "info", str(tmp_path))
        head = torch.nn.Conv2d(32, 5, 1)
        names = {"backbone": tiny(), "head": head, "wrap_backbone": wrap_backbone, "load_head": load_head}
        exec("\n".join(found["load"]), names)
        assert names["head"] is head
        assert 'head = load_head("organisation/name", head)' in (tmp_path / "README.md").read_text()

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

    @pytest.mark.parametrize(
        "changes", [{"hidden_size": 0}, {"hidden_size": "wide"}, {"patch_size": 0}, {"hidden_act": "none"}, {"model_type": {}}]
    )
    def test_configurations_of_no_model(self, changes: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
        transformers = pytest.importorskip("transformers")
        values = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        status, found = as_json(capsys, "check", str(tmp_path))
        assert status == 1 and found["error"] in ("AdapterNotFoundError", "UnsupportedBackboneError")
        assert str(tmp_path) in found["message"]

    def test_code_that_comes_with_a_model_is_not_run(
        self, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("transformers")
        monkeypatch.setattr("builtins.input", lambda prompt="": "y")  # to Transformers' question whether it may
        ran = tmp_path / "ran"
        (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w')")
        values = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}}
        (tmp_path / "config.json").write_text(json.dumps(values))
        status, found = as_json(capsys, "check", str(tmp_path))
        assert (status, found["error"]) == (1, "AdapterNotFoundError") and "custom code" in found["message"]
        assert not ran.exists()


class TestShow:
    @pytest.fixture
    def streets(self, tmp_path: Path) -> list[str]:
        """Two images of one name, one of them grey and upright."""
        rng = np.random.default_rng(0)
        (tmp_path / "other").mkdir()
        paths = [tmp_path / "street.png", tmp_path / "other" / "street.png"]
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(paths[0])
        Image.fromarray(rng.integers(0, 256, (70, 50), dtype=np.uint8)).save(paths[1])
        return [str(path) for path in paths]

    @pytest.fixture
    def places(self, tmp_path: Path) -> list[str]:
        """Options: a small Transformers backbone and an adapter for it, with a head."""
        return self.save(tmp_path, SegmentationHead([32, 32], 4), classes=["sky", "road", "tree", "car"])

    @staticmethod
    def save(root: Path, head: Any, **training: Any) -> list[str]:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("matplotlib")
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 7}
        vit = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        vit.save_pretrained(root / "backbone")
        wrap_backbone(vit, MGFCConfig(rank=4))
        randomise(vit.calibration)
        vit.calibration.save_pretrained(root / "adapter", head=head, training=training)
        return ["--adapter", str(root / "adapter"), "--backbone", str(root / "backbone"), "--out", str(root / "shown")]

    def test_a_picture_for_each_image(self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture) -> None:
        assert main(["show", *streets, *places]) == 0
        printed = capsys.readouterr().out.splitlines()
        out = tmp_path / "shown"
        assert sorted(path.name for path in out.iterdir()) == ["street_2_calibration.png", "street_calibration.png"]
        assert printed[0].startswith(f"{out / 'street_calibration.png'}  56 x 84 pixels, distance from the source ")
        assert "  77 x 56 pixels" in printed[1]
        assert printed[2] == "prediction by the adapter's head, from blocks 1, 3, at even distances"
        with Image.open(out / "street_calibration.png") as wide, Image.open(out / "street_2_calibration.png") as tall:
            assert wide.width == tall.width and wide.height < tall.height

    def test_json_and_what_can_be_chosen(self, streets: list[str], places: list[str], capsys: Capture) -> None:
        options = ["--size", "28", "42", "--out-indices", "0", "1", *places]
        status, found = as_json(capsys, "show", streets[0], *options)
        assert status == 0 and found["prediction"].endswith("from blocks 0, 1, as named")
        (shown,) = found["images"]
        assert shown["size"] == [28, 42] and Path(shown["picture"]).exists() and shown["image"] == streets[0]
        vit = wrap_backbone(transformers_model(places[3]), places[1]).eval()
        image = as_tensor(read_image(streets[0]), (28, 42), *IMAGENET)
        vit(image)
        assert shown["distance"] == vit.calibration.distance().item()

    def test_no_two_images_share_a_picture(
        self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        third = tmp_path / "street_2.png"
        third.write_bytes(Path(streets[0]).read_bytes())
        status, found = as_json(capsys, "show", *streets, str(third), "--size", "28", "28", *places)
        assert status == 0
        names = [Path(image["picture"]).name for image in found["images"]]
        assert names == ["street_calibration.png", "street_2_calibration.png", "street_2_2_calibration.png"]

    @pytest.mark.parametrize(
        ("noted", "told"),
        [([0, 2], "0, 2, as noted in training"), ("all", "1, 3, at even distances"), (["0"], "1, 3, at even")],
    )
    def test_blocks_from_the_training_notes(
        self, noted: Any, told: str, streets: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        places = self.save(tmp_path, SegmentationHead([32, 32], 4), out_indices=noted, classes="none")
        status, found = as_json(capsys, "show", streets[0], "--size", "28", "28", *places)
        assert status == 0 and f"from blocks {told}" in found["prediction"]

    def test_without_a_head_there_is_no_prediction(self, streets: list[str], tmp_path: Path, capsys: Capture) -> None:
        places = self.save(tmp_path, None)
        assert main(["show", streets[0], *places]) == 0
        assert capsys.readouterr().out.splitlines()[1] == "no prediction: the adapter has no head"
        status, found = as_json(capsys, "show", streets[1], "--out-indices", "1", "--overwrite", *places)
        assert (status, found["error"]) == (1, "ConfigError") and "found no head beside the adapter" in found["message"]
        places = self.save(tmp_path / "other", torch.nn.Conv2d(32, 4, 1))
        status, found = as_json(capsys, "show", streets[1], *places)
        assert (
            status == 0
            and found["prediction"] == "no prediction: the adapter has a head of class Conv2d, not a SegmentationHead"
        )

    def test_pictures_that_are_there_stay_unless_told(
        self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        picture = tmp_path / "shown" / "street_calibration.png"
        picture.parent.mkdir()
        picture.write_text("mine")
        status, found = as_json(capsys, "show", *streets, *places)
        assert (status, found["error"]) == (1, "FileExistsError") and str(picture) in found["message"]
        assert picture.read_text() == "mine" and len(list(picture.parent.iterdir())) == 1
        assert main(["show", *streets, *places, "--overwrite"]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_picture_is_written_whole_or_not_at_all(
        self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from matplotlib.figure import Figure

        def interrupted(self: Figure, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        picture = tmp_path / "shown" / "street_calibration.png"
        picture.parent.mkdir()
        picture.write_text("mine")
        monkeypatch.setattr(Figure, "savefig", interrupted)
        status, found = as_json(capsys, "show", streets[0], *places, "--overwrite")
        assert (status, found["error"]) == (1, "OSError") and "No space" in found["message"]
        assert picture.read_text() == "mine" and list(picture.parent.iterdir()) == [picture]

    def test_what_cannot_be_shown(
        self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "file").write_text("")
        adapter, backbone, out = (places[index : index + 2] for index in (0, 2, 4))
        for words, error, message in [
            ([streets[0], str(tmp_path / "text.png"), *places], "OSError", "text.png: expected an image"),
            ([str(tmp_path / "missing.png"), *places], "OSError", "missing.png: expected an image"),
            ([streets[0], *adapter, *backbone, "--out", str(tmp_path / "file")], "NotADirectoryError", "found a file"),
            ([streets[0], "--adapter", "./nothing", *backbone, *out], "AdapterNotFoundError", "expected the directory"),
            ([streets[0], *adapter, *out], "AdapterNotFoundError", "Name one with --backbone"),
            ([streets[0], *adapter, "--backbone", "./nothing", *out], "AdapterNotFoundError", "expected the name of a timm"),
            ([streets[0], *places, "--out-indices", "1"], "AdapterMismatchError", "expected maps of widths [32, 32]"),
            ([streets[0], *places, "--size", "3", "3"], "CalibrationError", "Choose another size with --size"),
        ]:
            status, found = as_json(capsys, "show", *words)
            assert (status, found["error"]) == (1, error) and message in found["message"], found
            assert not list(tmp_path.glob("shown/*")), words
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        status, found = as_json(capsys, "show", streets[0], *places)
        assert (status, found["error"]) == (1, "ImportError") and 'pip install "mgfc[viz]"' in found["message"]

    @pytest.mark.parametrize("damage", ["cut", "other sizes"])
    def test_weights_that_cannot_be_read(
        self, damage: str, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        if damage == "cut":
            path = tmp_path / "backbone" / "model.safetensors"
            path.write_bytes(path.read_bytes()[:1000])
        else:
            path = tmp_path / "backbone" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))
        status, found = as_json(capsys, "show", streets[0], *places)
        assert status == 1 and found["error"] in ("AdapterNotFoundError", "UnsupportedBackboneError")
        assert str(tmp_path / "backbone") in found["message"] and not (tmp_path / "shown").exists()

    @pytest.mark.parametrize("values", [[], {"image_processor_type": 5}, {"image_mean": "abc", "image_std": [0, 0, 0]}])
    def test_an_image_processor_that_cannot_be_read(
        self, values: Any, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        if isinstance(values, dict):
            values = {"image_processor_type": "BitImageProcessor"} | values
        (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(values))
        named = build(str(tmp_path / "backbone"), pretrained=True)
        assert (named.mean, named.std) == IMAGENET

    def test_a_place_that_cannot_be_is_told_before_a_model_is_loaded(
        self, streets: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("matplotlib")
        (tmp_path / "file").write_text("")
        words = ["show", streets[0], "--adapter", "./nothing", "--out"]
        status, found = as_json(capsys, *words, str(tmp_path / "file" / "below"))
        assert (status, found["error"]) == (1, "NotADirectoryError") and "Name another with --out" in found["message"]
        monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
        status, found = as_json(capsys, *words, str(tmp_path / "new" / "below"))
        assert (status, found["error"]) == (1, "PermissionError") and "Name another with --out" in found["message"]

    def test_a_size_that_no_memory_holds(self, streets: list[str], places: list[str], capsys: Capture) -> None:
        status, found = as_json(capsys, "show", streets[0], *places, "--size", "999999999", "7")
        assert (status, found["error"]) == (1, "CalibrationError") and "Choose another size" in found["message"]

    def test_names_that_no_font_and_no_terminal_has(self, streets: list[str], tmp_path: Path, capsys: Capture) -> None:
        names = ["$\\frac$", "\x1b[2J"]
        places = self.save(tmp_path, SegmentationHead([32, 32], 2), classes=names)
        odd = [tmp_path / f"{name}.png" for name in (*names, os.fsdecode(b"street \xff"))]
        for path in odd:
            path.write_bytes(Path(streets[0]).read_bytes())
        assert main(["show", *map(str, odd), "--size", "28", "28", *places]) == 0
        printed = capsys.readouterr().out
        assert printed.encode() and "\x1b" not in printed
        assert len(list((tmp_path / "shown").iterdir())) == 3

    def test_an_adapter_of_nothing(self, streets: list[str], places: list[str], tmp_path: Path, capsys: Capture) -> None:
        vit = wrap_backbone(transformers_model(places[3]), MGFCConfig(rank=None, coarse=None, medium=None))
        vit.calibration.save_pretrained(tmp_path / "nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main(["show", streets[0], "--adapter", str(tmp_path / "nothing"), *places[2:]]) == 0

    def test_a_timm_model_by_its_name(self, streets: list[str], tmp_path: Path, hub: HubServer, capsys: Capture) -> None:
        pytest.importorskip("matplotlib")
        words = ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "shown"), "--size", "64", "96"]
        vit = timm.create_model("test_vit.r160_in1k")
        weights = save({name: value.contiguous() for name, value in vit.state_dict().items()})
        wrap_backbone(vit, MGFCConfig(rank=4))
        vit.calibration.save_pretrained(tmp_path / "adapter", head=SegmentationHead([64] * 2, 4))
        status, found = as_json(capsys, "show", streets[0], *words)
        assert (status, found["error"]) == (1, "AdapterNotFoundError") and "weights of this model" in found["message"]
        hub.put("timm/test_vit.r160_in1k", {"model.safetensors": weights, "config.json": b"{}"})
        status, found = as_json(capsys, "show", streets[0], *words)
        assert status == 0, found
        assert found["images"][0]["distance"] is None


def transformers_model(directory: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory)


def test_convert_rein(tmp_path: Path, capsys: Capture) -> None:
    from test_rein import checkpoint

    torch.save(checkpoint(True), tmp_path / "rein.pth")
    status, found = as_json(capsys, "convert-rein", str(tmp_path / "rein.pth"), str(tmp_path / "out"))
    assert status == 0
    assert found["calibration"] == {"num_tokens": 7, "token_rank": 4, "layers": "all", "use_softmax": True}
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "rein: num_tokens 7, token_rank 4" in capsys.readouterr().out
    assert main(["convert-rein", str(tmp_path / "nothing.pth"), str(tmp_path / "out")]) == 1
    assert "AdapterNotFoundError" in capsys.readouterr().err
    status, found = as_json(capsys, "convert-rein", str(tmp_path / "rein.pth"), str(tmp_path / "rein.pth"))
    assert (status, found["error"]) == (1, "AdapterNotFoundError")


@pytest.mark.parametrize("arguments", [[], ["info"], ["snow"], ["show", "street.png"], ["check", "test_vit", "--size", "3"]])
def test_wrong_commands(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: mgfc" in capsys.readouterr().err


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "mgfc", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"mgfc {__version__}\n"
