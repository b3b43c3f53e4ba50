"""The field's benchmark on miniatures: its parts against what is published, and whole runs on one and two processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import leaving
import numpy as np
import pytest
import timm
import torch
from helpers import same
from PIL import Image
from safetensors.torch import load_file
from test_data import OFFICIAL, Official, picture, png, write_files
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("scipy")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from data import prepare  # noqa: E402
from street_benchmark import __main__ as command  # noqa: E402
from street_benchmark import augment, cost, heads, published, scoring, settings, table, windows  # noqa: E402
from street_benchmark.backbones import blocks_of, checkpoint_activations, load_backbone  # noqa: E402
from street_benchmark.crops import Crops, batches, observed, sources  # noqa: E402
from street_benchmark.experiments import EXPERIMENTS, SIZES, fitted  # noqa: E402
from street_benchmark.methods import METHODS  # noqa: E402
from street_benchmark.model import BLOCKS, Segmenter  # noqa: E402
from street_benchmark.optimizer import build_optimizer, set_rates  # noqa: E402
from street_benchmark.sampling import RareClasses, Uniform, class_counts  # noqa: E402
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

    @pytest.mark.parametrize("library", ["backbone", "timm_backbone"])
    def test_checkpointing_computes_blocks_twice_and_changes_nothing(
        self, library: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        run = made(request.getfixturevalue(library))
        command.main(words(run, tmp_path / "kept", data))
        command.main(words(run, tmp_path / "again", data, "--checkpointing"))
        again = weights(tmp_path / "again")
        for name, value in weights(tmp_path / "kept").items():
            torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)
        model, calls = Segmenter(run).train(), []
        checkpoint_activations(model.maps.backbone)
        blocks_of(model.maps.backbone)[2].norm1.register_forward_hook(lambda *_: calls.append(1))
        model(torch.randn(1, 3, CROP, CROP), torch.zeros(1, CROP, CROP, dtype=torch.long)).backward()
        assert len(calls) == 2

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
        with pytest.raises(FileNotFoundError, match=r"No data set gta5: .*prepare\.py"):
            command.main(words(made(backbone), tmp_path, tmp_path))

    def test_names_a_target_that_is_missing_before_it_trains(self, data: Path, backbone: str, tmp_path: Path) -> None:
        shutil.copytree(data / "gta5", tmp_path / "gta5")
        with pytest.raises(FileNotFoundError, match="No data set cityscapes"):
            command.main(words(made(backbone), tmp_path, tmp_path))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("option", ["steps", "batch-size", "crop", "patch", "observe", "save-every", "stop-at"])
    @pytest.mark.parametrize("value", ["0", "-1", "many"])
    def test_refuses_numbers_that_are_none(self, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            command.main(["run", "gta5", f"--{option}={value}"])
        assert f"--{option}: expected a whole number above 0, found '{value}'" in capsys.readouterr().err

    def test_refuses_a_crop_of_parts_of_patches(self, data: Path, backbone: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="crop of whole patches of 16 pixels, found one of 60"):
            command.main(words(made(backbone, crop=60), tmp_path, data))

    def test_stops_at_a_loss_that_is_not_finite(self, data: Path, backbone: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="The loss is nan after 2 steps"):
            command.main(words(made(backbone, head_lr=float("inf")), tmp_path, data))
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


DRIVER = """
import json, sys, time
import torch.distributed as dist
from street_benchmark import checkpoint
from street_benchmark.__main__ import main
dist.init_process_group("gloo")  # once for all runs
read = checkpoint.read
def read_later(*arguments):  # the second process is slow where the first one could hurry on and delete what it reads
    time.sleep(0.3 * dist.get_rank())
    return read(*arguments)
checkpoint.read = read_later
for arguments in json.loads(sys.argv[1]):
    main(arguments)
    dist.barrier()
dist.destroy_process_group()
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
        run, options = made(backbone, method, head="mask2former", batch_size=2), ["--engine", engine, "--checkpointing"]
        runs.append(words(run, folder / f"{engine} whole", data, *options))
        runs.append(words(run, folder / f"{engine} halved", data, *options, "--stop-at", "1"))
        runs.append(words(run, folder / f"{engine} halved", data, *options))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", leaving.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    done = subprocess.run(
        [*launcher, str(folder / "driver.py"), json.dumps(runs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
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
        run = made(backbone, "lora", head="mask2former", batch_size=2)
        shutil.copytree(two_processes / "fsdp whole" / "run", tmp_path / "run")
        command.main(words(run, tmp_path, data))
        pairs = list(zip(results(tmp_path), results(two_processes / "fsdp whole"), strict=True))
        assert [(record["processes"], other["processes"]) for record, other in pairs] == [(1, 2)] * 3
        assert [record["iou"] for record, _ in pairs] == [other["iou"] for _, other in pairs]


class TestAugmentation:
    @pytest.fixture
    def scene(self) -> tuple[np.ndarray, np.ndarray]:
        """A wide image whose left half is of class 0, with four others at its right."""
        draw = np.random.default_rng(0)
        label = np.zeros((100, 400), np.uint8)
        label[:, 200:] = np.repeat(np.arange(10) % 4 + 1, 20)
        return draw.integers(0, 256, (100, 400, 3), dtype=np.uint8), label

    def test_sizes_are_those_of_the_protocol(self, scene: tuple[np.ndarray, np.ndarray]) -> None:
        found = {augment.resized(*scene, 64, random.Random(seed))[1].shape for seed in range(300)}
        # 0.5 to 2 times the crop, but no side longer than four crops.
        wanted = {min(int(64 * x * 0.1), 64) for x in range(5, 21)}
        assert {height for height, _ in found} == wanted
        assert all(width == 4 * height for height, width in found)

    def test_no_class_fills_a_crop_where_another_one_is_there(
        self, scene: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def largest() -> float:
            labels = [augment.cropped(*scene, 60, random.Random(seed))[1] for seed in range(100)]
            return max(np.bincount(label.ravel()).max() / label.size for label in labels)

        assert largest() < 0.75
        monkeypatch.setattr(augment, "TRIES", 1)
        assert largest() == 1

    def test_distortion_has_the_published_ranges(self) -> None:
        grey = np.full((2, 2, 3), 100, np.uint8)
        values = np.array([augment.distorted(grey, random.Random(seed))[0, 0].astype(int) for seed in range(2000)])
        assert (values.max(axis=1) == values.min(axis=1)).all(), "grey stays grey: saturation and hue do nothing to it"
        assert values.max() in range(190, 199) and values.min() in range(34, 38)  # (100 + 32) * 1.5, (100 - 32) * 0.5
        assert 0.2 < (values[:, 0] == 100).mean() < 0.3  # neither brightness nor contrast

    def test_hue_turns_and_saturation_stays_within_its_range(self) -> None:
        red = np.full((2, 2, 3), (100, 60, 60), np.uint8)
        found = np.concatenate([augment.distorted(red, random.Random(seed))[:1, :1] for seed in range(500)])
        hues = cv2.cvtColor(found, cv2.COLOR_RGB2HSV)[..., 0].astype(int).ravel()
        turned = np.minimum(hues, 180 - hues)
        assert (
            17 <= turned.max() <= 21 and (hues > 90).any() and ((hues > 0) & (hues < 90)).any()
        )  # 18, in whole levels of grey

    def test_an_item_depends_on_the_seed_and_its_number_alone(self, data: Path, backbone: str, tmp_path: Path) -> None:
        run = made(backbone, steps=6)
        crops = Crops(run, sources(run, data), tmp_path)
        images, labels = crops[5]
        assert (images.shape, labels.shape, labels.dtype) == ((3, CROP, CROP), (CROP, CROP), torch.int64)
        assert same(crops[5], Crops(run, sources(run, data), tmp_path)[5])
        assert not torch.equal(images, crops[8][0]), "three items on it is the same scene, augmented anew"
        other = made(backbone, steps=6, seed=1)
        assert not torch.equal(images, Crops(other, sources(other, data), tmp_path)[5][0])
        late = list(batches(crops, 4, 0))
        assert len(late) == 2 and torch.equal(late[0][0], torch.stack([crops[item][0] for item in range(16, 20)]))

    def test_what_is_smaller_than_a_crop_is_padded(self, data: Path, backbone: str, tmp_path: Path) -> None:
        run = made(backbone, steps=10)
        crops = Crops(run, sources(run, data), tmp_path)
        small = [(image, label) for image, label in (crops[item] for item in range(40)) if (label[-1] == IGNORE).all()]
        assert small, "the short side is half of a crop in some"
        assert all((image[:, -1] == 0).all() for image, _ in small)

    def test_whole_images_are_observed(self, data: Path, backbone: str) -> None:
        run = made(backbone, experiment="gta5_synthia", observe=5)
        images = list(observed(run, sources(run, data)))
        assert len(images) == 5 and len({float(image.sum()) for image in images}) == 5
        assert {tuple(image.shape) for image in images} <= {(1, 3, 720, 960), (1, 3, 768, 1008), (1, 3, 768, 1024)}


class TestSampling:
    def test_uniform_takes_each_scene_once_an_epoch(self) -> None:
        sampler = Uniform(7, seed=0)
        epochs = [[sampler.choose(item)[0] for item in range(7 * n, 7 * n + 7)] for n in range(3)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_rare_classes_follow_the_equation(self) -> None:
        counts = np.zeros((4, 19), np.int64)
        counts[:, 0], counts[1, 5], counts[2, 5], counts[3, 7] = 500_000, 40_000, 3000, 20_000
        sampler = RareClasses(counts, seed=0)
        share = np.array([2_000_000, 43_000, 20_000]) / 2_063_000
        expected = np.exp((1 - share) / 0.01) / np.exp((1 - share) / 0.01).sum()
        np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-9)
        drawn = [sampler.choose(item) for item in range(4000)]
        assert {scene for scene, wanted in drawn if wanted == 5} == {1}, "3000 pixels are not more than 3000"
        assert abs(np.mean([wanted == 7 for _, wanted in drawn]) - expected[2]) < 0.03
        assert drawn[:50] == [RareClasses(counts, seed=0).choose(item) for item in range(50)]
        with pytest.raises(ValueError, match="more than 3000 pixels of a class, found none"):
            RareClasses(counts[:, 1:2], seed=0)

    def test_crops_are_drawn_again_until_they_hold_the_class(self, tmp_path: Path, backbone: str) -> None:
        """A class in a corner of every image: a crop at random seldom has enough of it."""
        label = np.zeros((300, 600), np.uint8)
        label[:, 300:] = 2
        label[-150:, -150:] = 17
        contents = {f"images/{i}.png": picture(i, size=(600, 300)) for i in range(2)}
        contents |= {f"labels/{i}.png": png(label) for i in range(2)} | {"splits/train.txt": b"0 1"}
        write_files(tmp_path / "data" / "gta5", contents)
        share = {}
        for sampling in ("uniform", "rare"):
            run = made(backbone, steps=15, crop=128, sampling=sampling)
            crops = Crops(run, sources(run, tmp_path / "data"), tmp_path)
            share[sampling] = np.mean([(crops[item][1] == 17).sum() > 1500 for item in range(60)])
        assert share["rare"] > 2 * share["uniform"] > 0, share

    def test_counts_are_kept_and_belong_to_their_scenes(self, data: Path, tmp_path: Path) -> None:
        scenes, cache = StreetScenes(data / "gta5", "train"), tmp_path / "gta5.npy"
        counts = class_counts(scenes, cache)
        labels = [np.asarray(label) for _, label in scenes]
        assert counts.tolist() == [[int((label == k).sum()) for k in range(19)] for label in labels]
        before = cache.stat().st_mtime_ns
        assert np.array_equal(class_counts(scenes, cache), counts) and cache.stat().st_mtime_ns == before
        with pytest.raises(ValueError, match=r"expected counts of 2 scenes, found \(3, 19\)"):
            class_counts(StreetScenes(data / "cityscapes", "val"), cache)


class Ramp(nn.Module):
    """Stands for a model: the scores of a pixel are its own values. Keeps the windows that it saw."""

    calibration = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen += list(images)
        return images


class TestWindows:
    def test_are_those_of_the_protocol(self) -> None:
        assert windows.starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]
        assert windows.starts(1024, 512, 341) == [0, 341, 512]
        assert windows.starts(512, 512, 341) == [0]

    @pytest.mark.parametrize("size", [(64, 64), (64, 150), (20, 90), (130, 7), (171, 200)])
    def test_give_each_pixel_its_own_score(self, size: tuple[int, int]) -> None:
        image, model = torch.randn(1, 3, *size), Ramp()
        torch.testing.assert_close(windows.slide(model, image, 64, batch_size=3), image)
        assert {tuple(window.shape) for window in model.seen} == {(3, 64, 64)}

    def test_are_calibrated_by_the_whole_image(self, data: Path, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Segmenter(made(backbone)).eval()
        with model.calibration.observing():
            for _ in range(3):
                model.features(torch.randn(1, 3, 64, 64) * 0.1)
        image = torch.cat([torch.randn(1, 3, 64, 64), 5 + torch.randn(1, 3, 64, 64)], dim=3)
        found = windows.slide(model, image, 64)
        with model.calibration.scene(image):
            expected = model(image[..., :64])
        stride = int(64 * windows.OVERLAP)
        torch.testing.assert_close(found[..., :stride], expected[..., :stride])
        monkeypatch.setattr(type(model.calibration), "scene", lambda self, images: nullcontext())
        assert not torch.allclose(windows.slide(model, image, 64), found, atol=1e-3)

    def test_images_are_scaled_as_published(self) -> None:
        assert fitted((4032, 3024), SIZES["full"]["mapillary"]) == (1365, 1024)
        assert fitted((3024, 4032), SIZES["full"]["mapillary"]) == (1024, 1365)
        assert fitted((2048, 1024), SIZES["full"]["cityscapes"]) == (2048, 1024)
        assert fitted((1920, 1080), SIZES["half"]["acdc"]) == (960, 540)
        assert fitted((1914, 1052), None) == (1914, 1052)

    def test_a_perfect_model_has_100(self, data: Path) -> None:
        """And a class that is found where the labels have none counts with 0."""
        scenes = StreetScenes(data / "cityscapes", "val")
        labels = {index: torch.from_numpy(np.array(label)) for index, (_, label) in enumerate(scenes)}

        class Oracle(Ramp):
            wrong = False

            def __init__(self) -> None:
                super().__init__()
                self.weight, self.number = nn.Parameter(torch.zeros(())), -1

            def forward(self, images: Tensor) -> Tensor:
                self.number += 1
                label = labels[self.number].clone()
                label[label == IGNORE] = 0
                scores = F.one_hot(label.long(), 19).permute(2, 0, 1).unsqueeze(0).float()
                return F.pad(scores, (0, 64 - scores.shape[3], 0, 64 - scores.shape[2]))

        assert set(scoring.score(Oracle(), scenes, None, 64).values()) == {100.0}
        held = [k for k in range(19) if k != 16]
        for label in labels.values():
            label[0, 0] = 16
        with monkeypatched_labels(scenes, without=16):
            iou = scoring.score(Oracle(), scenes, None, 64)
        assert iou["train"] == 0 and len(iou) == len(held) + 1


@contextmanager
def monkeypatched_labels(scenes: StreetScenes, without: int) -> Iterator[None]:
    """Within it, the labels of scenes ignore a class."""
    original = StreetScenes.__getitem__

    def changed(self: StreetScenes, index: int) -> Any:
        image, label = original(self, index)
        values = np.array(label)
        values[values == without] = IGNORE
        values[0, 0] = 0
        return image, Image.fromarray(values)

    StreetScenes.__getitem__ = changed
    try:
        yield
    finally:
        StreetScenes.__getitem__ = original


class TestHeads:
    @pytest.fixture
    def maps(self) -> list[Tensor]:
        return [torch.randn(2, 48, 16, 24), *(torch.randn(2, 48, *size) for size in ((8, 12), (4, 6), (2, 3)))]

    def test_mask2former_is_that_of_transformers_without_its_backbone(self) -> None:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        swin = SwinConfig(
            embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        whole = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=19)).train()
        whole.criterion.num_points = whole.criterion.matcher.num_points = 256
        head = heads.Mask2FormerHead([24, 48, 96, 192], 64)
        head.pixel_decoder.load_state_dict(whole.model.pixel_level_module.decoder.state_dict())
        head.transformer.load_state_dict(whole.model.transformer_module.state_dict())
        head.classify.load_state_dict(whole.class_predictor.state_dict())
        images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
        labels[:, :9] = IGNORE
        masks = [torch.stack([image == k for k in range(5)]).float() for image in labels]
        for dropped in whole.modules():
            if "DropPath" in type(dropped).__name__ or isinstance(dropped, nn.Dropout):
                dropped.eval()
        torch.manual_seed(0)
        expected = whole(images, mask_labels=masks, class_labels=[torch.arange(5)] * 2)
        maps = whole.model.pixel_level_module.encoder(images).feature_maps
        torch.manual_seed(0)
        torch.testing.assert_close(head.loss(maps, labels), expected.loss.squeeze(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(head(maps)[-1]["masks_queries_logits"], expected.masks_queries_logits)
        probabilities = expected.class_queries_logits.softmax(-1)[..., :-1]
        upscaled = F.interpolate(expected.masks_queries_logits, (64, 64), mode="bilinear").sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", probabilities, upscaled)
        torch.testing.assert_close(head.scores(maps, (64, 64)), scores)

    @pytest.mark.parametrize("name", heads.HEADS)
    def test_every_parameter_learns(self, name: str, maps: list[Tensor]) -> None:
        head = heads.HEADS[name]([48] * 4, 64)
        labels = torch.randint(0, 4, (2, 64, 96))
        head.loss(maps, labels).backward()
        assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        assert head.scores(maps, (64, 96)).shape == (2, 19, 64, 96)

    @pytest.mark.parametrize("name", heads.HEADS)
    @pytest.mark.parametrize("images", [[0], [0, 1]])
    def test_labels_that_are_all_ignored(self, name: str, images: list[int], maps: list[Tensor]) -> None:
        head = heads.HEADS[name]([48] * 4, 64)
        labels = torch.randint(0, 4, (2, 64, 96))
        labels[images] = IGNORE
        loss = head.loss(maps, labels)
        loss.backward()
        assert loss.isfinite()
        # DDP waits for every parameter's gradient.
        assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


class TestBackbones:
    def test_are_resized_as_published(self, backbone: str, timm_backbone: str) -> None:
        from transformers import AutoModel

        trained = AutoModel.from_pretrained(backbone)
        found = load_backbone(backbone, 16, 96)
        weight = trained.embeddings.patch_embeddings.projection.weight
        expected = F.interpolate(weight, (16, 16), mode="bicubic")
        torch.testing.assert_close(found.embeddings.patch_embeddings.projection.weight, expected)
        before, after = trained.embeddings.position_embeddings, found.embeddings.position_embeddings
        assert torch.equal(after[:, 0], before[:, 0])
        grid = F.interpolate(before[:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2), (6, 6), mode="bicubic")
        torch.testing.assert_close(after[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 36, 32))
        assert load_backbone(timm_backbone, 16, 96).pos_embed.shape == (1, 37, 32)

    def test_of_their_own_size_are_unchanged(self, backbone: str, timm_backbone: str) -> None:
        from transformers import AutoModel

        images = torch.randn(1, 3, 56, 56)
        expected = AutoModel.from_pretrained(backbone).eval()(images).last_hidden_state
        assert torch.equal(load_backbone(backbone, 14, 56).eval()(images).last_hidden_state, expected)
        trained = timm.create_model(timm_backbone.removeprefix("timm:"), pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(load_backbone(timm_backbone, 14, 56).eval()(images), trained(images))

    @pytest.mark.parametrize("method", METHODS)
    def test_methods_train_what_a_head_sees_and_nothing_else(self, method: str, backbone: str, timm_backbone: str) -> None:
        for name in (backbone, timm_backbone):
            model = Segmenter(made(name, method)).train()
            assert model.maps.out_indices == (0, 1, 1, 3)
            for _ in range(2):  # what is behind a zero matrix gets its gradient later
                model(torch.randn(2, 3, CROP, CROP), torch.randint(0, 19, (2, CROP, CROP))).backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter -= 0.1 * parameter.grad.sign()
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained
            assert any(n.startswith("maps.") for n in trained) == (method != "frozen")


class TestOptimizer:
    def test_rates_and_decay(self, backbone: str) -> None:
        run = made(backbone, "full", head="mask2former", lr=0.5)
        model = Segmenter(run)
        groups = build_optimizer(model, run).param_groups
        of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        found = {name: of.get(id(p)) for name, p in model.named_parameters()}
        assert found["maps.backbone.encoder.layer.0.norm1.weight"] == (0.5, 0)
        assert found["maps.backbone.encoder.layer.0.mlp.fc1.weight"] == (0.5, 0.05)
        assert found["maps.backbone.layernorm.weight"] is None
        assert found["head.transformer.queries_embedder.weight"] == found["head.pixel_decoder.level_embed"] == (1e-4, 0)
        assert found["head.classify.weight"] == found["head.classify.bias"] == (1e-4, 0.05)
        assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())

    def test_the_schedule(self) -> None:
        optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0, "initial_lr": 2.0}])
        rates = []
        for step in (0, 1, 2, 3):
            set_rates(optimizer, step, 4)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([2, 2 * 0.75**0.9, 2 * 0.5**0.9, 2 * 0.25**0.9])


class TestProtocol:
    def test_is_the_published_one(self) -> None:
        run = settings.published("gta5", "rein")
        assert (run.steps, run.batch_size, run.crop, run.patch, run.lr, run.head_lr) == (40_000, 4, 512, 16, 1e-4, 1e-4)
        assert (settings.WEIGHT_DECAY, settings.POWER, run.sampling) == (0.05, 0.9, "uniform")
        assert [24 * block // 24 - 1 for block in BLOCKS] == [7, 11, 15, 23]
        assert heads.Mask2FormerHead.scales == (4, 2, 1, 0.5)
        config = heads.Mask2FormerHead([32] * 4, 512).config
        assert (config.num_queries, config.encoder_layers, config.decoder_layers - 1, config.train_num_points) == (
            *(100, 6, 9),
            12544,
        )
        assert (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight) == (2, 5, 5, 0.1)

    def test_every_figure_has_a_source_and_ours_are_not_run(self) -> None:
        for row in published.PUBLISHED:
            assert row.experiment in EXPERIMENTS and row.miou.keys() <= EXPERIMENTS[row.experiment].targets.keys()
            assert re.search(r"\]\(https://(arxiv\.org/abs|github\.com)/", row.source)
            if len(row.miou) == 3 and row.mean is not None:
                assert sum(row.miou.values()) / 3 == pytest.approx(row.mean, abs=0.06)
        text = table.tables([])
        ours = [line for line in text.splitlines() if table.HERE in line]
        assert len(ours) == len(METHODS) * len(EXPERIMENTS)
        assert all(len(re.findall("not run", line)) == line.count("|") - 4 for line in ours)

    def test_runs_unlike_the_protocol_have_a_row_of_their_own(self) -> None:
        runs = [settings.published("acdc", "mgfc", seed=seed) for seed in (0, 1)]
        runs.append(settings.published("acdc", "mgfc", sampling="rare"))
        targets = EXPERIMENTS["acdc"].targets
        records = [
            {"settings": asdict(run), "target": name, "sizes": "full", "miou": 50.0 + 2 * number}
            for number, run in enumerate(runs)
            for name in targets
        ]
        records.append(records[0] | {"sizes": "half"})
        rows = [line for line in table.table("acdc", records).splitlines() if line.startswith("| mgfc |")]
        assert rows == [
            "| mgfc | 51.00 | 51.00 | 51.00 | 51.00 | 51.00 | **here**, 2 seeds |  |",
            "| mgfc | 50.00 | not run | not run | not run | not run | **here** | images of half size |",
            "| mgfc | 54.00 | 54.00 | 54.00 | 54.00 | 54.00 | **here** | sampling rare |",
        ]

    def test_seeds_that_are_not_scored_on_all_targets_do_not_count(self) -> None:
        def record(seed: int, target: str, miou: float) -> dict[str, Any]:
            run = settings.published("gta5", "mgfc", seed=seed)
            return {"settings": asdict(run), "target": target, "sizes": "full", "miou": miou}

        def row(records: list[dict[str, Any]]) -> str:
            (found,) = (line for line in table.table("gta5", records).splitlines() if line.startswith("| mgfc |"))
            return found

        whole = [record(0, name, 40.0) for name in EXPERIMENTS["gta5"].targets]
        part = [record(1, "Cityscapes", 60.0)]
        assert row(part) == "| mgfc | 60.00 | not run | not run | not run | **here** |  |"
        assert row(whole + part) == row(part + whole) == "| mgfc | 40.00 | 40.00 | 40.00 | 40.00 | **here** |  |"
        assert row(whole + whole) == row(whole), "a record that stands there twice is one seed's"
        assert row(whole[:2] + part) == "| mgfc | 40.00 | 40.00 | not run | not run | **here** |  |"


class TestCost:
    def test_operations_are_those_that_a_counter_finds(self) -> None:
        head, crop = heads.Mask2FormerHead([96] * 4, 128), 128
        maps = [torch.randn(1, 96, crop // stride, crop // stride) for stride in (4, 8, 16, 32)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            head(maps)
        assert cost.head_forward(crop, width=96) == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert sum(p.numel() for p in heads.Mask2FormerHead([1024] * 4, crop).parameters()) == pytest.approx(
            cost.HEAD_PARAMETERS, rel=0.01
        )
        vit = tiny_vit(embed_dim=96, depth=3, img_size=128, patch_size=16)
        # Fused attention is not counted on a CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            vit(torch.randn(1, 3, 128, 128))
        patches = 2 * 64 * 96 * 3 * 16**2  # left out
        expected = cost.Backbone(96, 3, 0).forward(65) + patches
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)

    def test_trained_parameters_are_those_of_the_methods(self) -> None:
        for name, method in METHODS.items():
            with torch.device("meta"):
                vit = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=512, patch_size=16)
                method(vit)
            trained = sum(p.numel() for p in vit.parameters() if p.requires_grad)
            assert trained == pytest.approx(cost.METHODS[name].parameters, rel=0.02), name
        assert sum(p.numel() for p in vit.parameters()) == pytest.approx(cost.Backbone().parameters, rel=0.01)

    def test_what_the_head_keeps_for_the_backward_pass(self) -> None:
        crop, kept = 256, {}
        head = heads.Mask2FormerHead([96] * 4, crop)
        own = {p.untyped_storage()._cdata for p in head.parameters()}

        def keep(value: Tensor) -> Tensor:
            if value.untyped_storage()._cdata not in own:
                kept[value.untyped_storage()._cdata] = value
            return value

        maps = [torch.randn(1, 96, crop // stride, crop // stride) for stride in (4, 8, 16, 32)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = head.loss(maps, torch.randint(0, 10, (1, crop, crop)))
        assert loss.isfinite()
        number = sum(value.untyped_storage().nbytes() for value in kept.values()) / crop**2
        assert number == pytest.approx(cost.KEPT_BY_THE_HEAD, rel=0.15)

    def test_more_work_takes_longer_and_less_kept_needs_less(self) -> None:
        rate = 312e12
        hours = [cost.expect(method, rate).hours for method in ("frozen", "lora", "full")]
        assert hours == sorted(hours) and len(set(hours)) == 3
        plain, again = cost.expect("mgfc", rate), cost.expect("mgfc", rate, checkpointing=True)
        assert again.hours > plain.hours and again.memory < plain.memory
        assert cost.expect("mgfc", rate, processes=4).memory < plain.memory

    def test_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        command.main(["expect"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in METHODS]
