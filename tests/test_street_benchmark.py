"""The field's benchmark on miniatures: its parts against what is published, and whole runs on one and two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_data import OFFICIAL, Official, write_files
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("scipy")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from data import prepare  # noqa: E402
from street_benchmark import __main__ as command  # noqa: E402
from street_benchmark import augment, checkpoint, cost, heads, published, scoring, settings, table, training, windows  # noqa: E402
from street_benchmark.backbones import blocks_of, load_backbone  # noqa: E402
from street_benchmark.crops import Crops, batches, observed, sources  # noqa: E402
from street_benchmark.experiments import EXPERIMENTS, SIZES, fitted  # noqa: E402
from street_benchmark.methods import METHODS  # noqa: E402
from street_benchmark.model import Segmenter  # noqa: E402
from street_benchmark.optimizer import build_optimizer, set_rates  # noqa: E402
from street_benchmark.sampling import PIXELS, RareClasses, Uniform, class_counts  # noqa: E402
from streets import IGNORE, StreetScenes  # noqa: E402
from tiny import tiny_dinov2, tiny_vit  # noqa: E402

from mgfc import wrap_backbone  # noqa: E402

CROP = 64
SMALL = {"head": "small", "steps": 2, "batch_size": 4, "crop": CROP, "observe": 3, "bf16": False}


def acdc() -> Official:
    """All four conditions; the miniature of the layout has two."""
    names = {f"{name}_GOPR0475_frame_0": name for name in ("fog", "night", "rain", "snow")}
    files = {
        made: (
            f"rgb_anon/{name}/val/GOPR0475/GOPR0475_frame_0_rgb_anon.png",
            f"gt/{name}/val/GOPR0475/GOPR0475_frame_0_gt_labelTrainIds.png",
        )
        for made, name in names.items()
    }
    return replace(OFFICIAL["acdc"], files=files, splits={}, extra=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set of the experiments, prepared from a miniature of its official layout."""
    folder = tmp_path_factory.mktemp("miniatures")
    for name in ("gta5", "synthia", "cityscapes", "bdd100k", "mapillary", "acdc"):
        official = acdc() if name == "acdc" else OFFICIAL[name]
        place = write_files(folder / "official" / name, official.contents())
        prepare.main([name, "--from", str(place), "--to", str(folder / "data" / name), "--jobs", "1"])
    return folder / "data"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny DINOv2 as Transformers keeps it."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    tiny_dinov2(num_hidden_layers=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def timm_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny DINOv2 as timm keeps it: patches of 14 pixels."""
    folder = tmp_path_factory.mktemp("timm_backbone")
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "init_values": 1e-5}
    vit = tiny_vit(**options)
    vit.pretrained_cfg["architecture"] = "vit_tiny_patch16_224"
    timm.models.save_for_hf(vit, folder, model_args=options)
    return f"timm:local-dir:{folder}"


def made(backbone: str, method: str = "mgfc", experiment: str = "gta5", **changes: Any) -> settings.Settings:
    return settings.published(experiment, method, backbone=backbone, **{**SMALL, **changes})


def words(run: settings.Settings, folder: Path, data: Path, *more: str) -> list[str]:
    """The command of a run."""
    values = {name: value for name, value in asdict(run).items() if name not in ("experiment", "bf16")}
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    place = ["--data", str(data), "--out", str(folder / "run"), "--results", str(folder / "results.jsonl")]
    float32 = [] if run.bf16 else ["--float32"]
    return ["run", run.experiment, *options, *float32, *place, "--workers", "0", "--sizes", "own", *more]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "weights.safetensors")


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class TestOneProcess:
    @pytest.mark.parametrize("method", METHODS)
    def test_trains_scores_and_tells(
        self, method: str, data: Path, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = made(backbone, method)
        command.main(words(run, tmp_path, data))
        records = results(tmp_path)
        assert [(record["target"], record["images"]) for record in records] == [
            ("Cityscapes", 2),
            ("BDD100K", 1),
            ("Mapillary", 1),
        ]
        assert all(record["settings"] == asdict(run) and 0 <= record["miou"] <= 100 for record in records)
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        command.main(words(run, tmp_path, data))
        assert results(tmp_path) == records, "what has a record is not scored again"
        capsys.readouterr()
        command.main(["table", "--results", str(tmp_path / "results.jsonl")])
        lines = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {method} |") and "crop 64" in line
        ]
        figures = [f"{record['miou']:.2f}" for record in records]
        (row,) = lines
        assert row.split(" | ")[1:4] == figures

    @pytest.mark.parametrize("method", ["mgfc", "full"])
    def test_resumes_exactly(self, method: str, data: Path, backbone: str, tmp_path: Path) -> None:
        run = made(backbone, method, head="mask2former", batch_size=2, bf16=True)
        whole, halved = tmp_path / "whole", tmp_path / "halved"
        command.main(words(run, whole, data))
        command.main(words(run, halved, data, "--stop-at", "1"))
        assert (halved / "run" / "checkpoint.pt").exists() and not (halved / "run" / "weights.safetensors").exists()
        command.main(words(run, halved, data))
        assert_equal(weights(whole), weights(halved))
        assert [record["iou"] for record in results(whole)] == [record["iou"] for record in results(halved)]

    def test_checkpointing_changes_nothing(self, data: Path, backbone: str, timm_backbone: str, tmp_path: Path) -> None:
        for name in (backbone, timm_backbone):
            run, (kept, again) = made(name), (tmp_path / name[:4] / "kept", tmp_path / name[:4] / "again")
            command.main(words(run, kept, data))
            command.main(words(run, again, data, "--checkpointing"))
            for name, value in weights(kept).items():
                torch.testing.assert_close(weights(again)[name], value, rtol=1e-4, atol=1e-6)

    def test_the_adapter_loads_and_holds_statistics_of_whole_images(self, data: Path, backbone: str, tmp_path: Path) -> None:
        command.main(words(made(backbone), tmp_path, data))
        vit = wrap_backbone(load_backbone(backbone, 16, CROP), tmp_path / "run" / "adapter")
        assert "gathered after training" in vit.calibration.summary()
        assert vit.calibration.adapter.coarse.source.count == 3

    @pytest.mark.parametrize(("experiment", "targets"), [("gta5_synthia", 3), ("acdc", 4)])
    def test_the_other_experiments(self, experiment: str, targets: int, data: Path, timm_backbone: str, tmp_path: Path) -> None:
        command.main(words(made(timm_backbone, "frozen", experiment), tmp_path, data))
        assert [record["target"] for record in results(tmp_path)] == list(EXPERIMENTS[experiment].targets)
        assert len(results(tmp_path)) == targets

    def test_refuses_a_folder_of_another_run(self, data: Path, backbone: str, tmp_path: Path) -> None:
        command.main(words(made(backbone), tmp_path, data, "--stop-at", "1"))
        with pytest.raises(SystemExit, match=r"other settings: lr 0.0001, now 0.5\. Name another folder"):
            command.main(words(made(backbone, lr=0.5), tmp_path, data))
        command.main(words(made(backbone), tmp_path, data))
        with pytest.raises(SystemExit, match="other settings: seed 0, now 1"):
            command.main(words(made(backbone, seed=1), tmp_path, data))

    def test_names_a_data_set_that_is_missing(self, backbone: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"No data set gta5: .* prepare\.py"):
            command.main(words(made(backbone), tmp_path, tmp_path))

    def test_stops_at_a_loss_that_is_not_finite(self, data: Path, backbone: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="The loss is nan after 2 steps"):
            command.main(words(made(backbone, head_lr=float("inf")), tmp_path, data))
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


DRIVER = """
import json, sys
from street_benchmark.__main__ import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""


@pytest.fixture(scope="module")
def two_processes(data: Path, backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that two processes of torchrun did, by name; starting them takes longer than they do."""
    folder = tmp_path_factory.mktemp("two_processes")
    (folder / "driver.py").write_text(DRIVER)
    runs = [
        words(made(backbone), folder / "ddp", data),
        words(made(backbone), folder / "fsdp", data, "--engine", "fsdp"),
    ]
    for engine, method in (("ddp", "full"), ("fsdp", "lora")):
        run, options = made(backbone, method, head="mask2former"), ["--engine", engine, "--checkpointing"]
        runs.append(words(run, folder / f"{engine} whole", data, *options))
        runs.append(words(run, folder / f"{engine} halved", data, *options, "--stop-at", "1"))
        runs.append(words(run, folder / f"{engine} halved", data, *options))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    done = subprocess.run(
        [*launcher, str(folder / "driver.py"), json.dumps(runs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
class TestTwoProcesses:
    @pytest.mark.parametrize("engine", ["ddp", "fsdp"])
    def test_train_as_one_does(self, engine: str, two_processes: Path, data: Path, backbone: str, tmp_path: Path) -> None:
        command.main(words(made(backbone), tmp_path, data))
        alone, together = weights(tmp_path), weights(two_processes / engine)
        assert alone.keys() == together.keys()
        trained = [name for name in alone if ".source." not in name]
        assert len(trained) > 10
        for name in trained:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-6)
        # Three images make a pair, whose halves the two processes see at once.
        count = "maps.backbone.calibration.adapter_default.coarse.source.count"
        assert (alone[count], together[count]) == (3, 1)

    @pytest.mark.parametrize("engine", ["ddp", "fsdp"])
    def test_resume_exactly(self, engine: str, two_processes: Path) -> None:
        whole, halved = two_processes / f"{engine} whole", two_processes / f"{engine} halved"
        assert_equal(weights(whole), weights(halved))
        assert [record["iou"] for record in results(whole)] == [record["iou"] for record in results(halved)]

    def test_share_out_the_scenes_in_scoring(self, two_processes: Path, data: Path, backbone: str, tmp_path: Path) -> None:
        run = made(backbone, "lora", head="mask2former")
        shutil.copytree(two_processes / "fsdp whole" / "run", tmp_path / "run")
        command.main(words(run, tmp_path, data))
        pairs = list(zip(results(tmp_path), results(two_processes / "fsdp whole"), strict=True))
        assert [(record["processes"], other["processes"]) for record, other in pairs] == [(1, 2)] * 3
        assert [record["iou"] for record, _ in pairs] == [other["iou"] for _, other in pairs]
