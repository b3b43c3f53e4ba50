"""Where the official archives of each data set keep images and labels, and what their label ids mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from data.classes import (
    CAMVID,
    CAMVID_IDS,
    CAMVID_PACKED,
    CITYSCAPES,
    CITYSCAPES_IDS,
    GTA5_IDS,
    SYNTHIA_IDS,
    TRAIN_IDS,
)
from data.files import Files
from data.mapillary import V1_2, V1_2_IDS, V2_0, V2_0_IDS

TRAINING = {"training": "train", "validation": "val"}


@dataclass(frozen=True)
class Pair:
    """An image and its labels in the archives.

    Args:
        name: of both in the data set that is made.
        image: path of the image.
        label: path of the labels.
        splits: that it belongs to.
    """

    name: str
    image: str
    label: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A form in which a data set is distributed.

    Args:
        image: path of an image, with fields such as `{split}`.
        label: path of its labels, with the same fields.
        archives: what the files come in, for error messages.
        ids: class of each label id.
        fields: regular expressions of the fields; others are part of a file's name.
        name: of an image and its labels in the data set that is made.
        splits: that an image with some fields belongs to.
        colours: labels are colours, packed as `pack_colour` does.
        size: (width, height) that all is brought to, if it has another one.
        classes: that ids are mapped to.
        config: a JSON file in which `labels` lists the names of the ids, and those names.
    """

    image: str
    label: str
    archives: str
    ids: Mapping[int, int]
    fields: Mapping[str, str] = field(default_factory=lambda: {"split": "train|val"})
    name: str = "{name}"
    splits: Callable[[Mapping[str, str]], tuple[str, ...]] = lambda fields: (fields["split"],)
    colours: bool = False
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] = CITYSCAPES
    config: tuple[str, list[str]] | None = None

    def pattern(self, template: str) -> re.Pattern[str]:
        """A template as a regular expression for paths that end so."""
        parts = re.split(r"\{(\w+)\}", template)
        found = set[str]()
        for place, part in enumerate(parts):
            if place % 2 == 0:
                parts[place] = re.escape(part)
            elif part in found:
                parts[place] = f"(?P={part})"
            else:
                found.add(part)
                parts[place] = f"(?P<{part}>{self.fields.get(part, '[^/]+')})"
        return re.compile("(?:.*/)?" + "".join(parts))

    def pairs(self, files: Files) -> list[Pair]:
        """All images with their labels, by name.

        Raises:
            SystemExit: if a file is missing.
        """
        images, labels = files.match(self.pattern(self.image)), files.match(self.pattern(self.label))
        for found, others, template in ((images, labels, self.label), (labels, images, self.image)):
            if not others:
                raise SystemExit(f"No file {template} in {files}. It comes with {self.archives}.")
            if missing := [key for key in found if key not in others]:
                expected = sorted(template.format(**dict(key)) for key in missing)[0]
                more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise SystemExit(f"{expected} is missing in {files}{more}. It comes with {self.archives}.")
        pairs = []
        for key, image in images.items():
            fields = dict(key)
            pairs.append(Pair(self.name.format(**fields), image, labels[key], self.splits(fields)))
        return sorted(pairs, key=lambda pair: pair.name)


def camvid_splits(fields: Mapping[str, str]) -> tuple[str, ...]:
    """The official split of a frame, its light, both, and its sequence."""
    sequence, number = fields["name"].rsplit("_", 1)
    frame = int(number.lstrip("f"))
    light = "dusk" if sequence == "0001TP" else "day"
    match sequence:
        case "0001TP":
            split = "train" if frame <= 8520 else "test"
        case "0016E5":
            split = "val" if 7959 <= frame <= 8159 else "train"
        case _:
            split = "train" if sequence == "0006R0" else "test"
    return split, light, f"{split}_{light}", f"seq_{sequence}"


CAMVID_FRAME = {"name": r"(?:0001TP|0006R0|0016E5|Seq05VD)_f?\d+"}
ACDC = {"split": "train|val", "condition": "fog|night|rain|snow"}

# The first layout of a data set whose labels are found is taken.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "camvid": (
        Layout(
            "{split}/{name}.png",
            "{split}annot/{name}.png",
            "CamVid/ of the SegNet tutorial",
            CAMVID_IDS,
            fields={"split": "train|val|test", **CAMVID_FRAME},
            splits=camvid_splits,
            size=(480, 360),
            classes=CAMVID,
        ),
        Layout(
            "{name}.png",
            "{name}_L.png",
            "701_StillsRaw_full.zip and LabeledApproved_full.zip",
            CAMVID_PACKED,
            fields=CAMVID_FRAME,
            splits=camvid_splits,
            colours=True,
            size=(480, 360),
            classes=CAMVID,
        ),
    ),
    "cityscapes": (
        Layout(
            "leftImg8bit/{split}/{city}/{name}_leftImg8bit.png",
            "gtFine/{split}/{city}/{name}_gtFine_labelIds.png",
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
            CITYSCAPES_IDS,
        ),
    ),
    "gta5": (
        Layout(
            "images/{name}.png",
            "labels/{name}.png",
            "01_images.zip to 10_images.zip and 01_labels.zip to 10_labels.zip",
            GTA5_IDS,
            fields={"name": r"\d{5}"},
            splits=lambda fields: ("train",),
        ),
    ),
    "synthia": (
        Layout(
            "RGB/{name}.png",
            "GT/LABELS/{name}.png",
            "SYNTHIA_RAND_CITYSCAPES.rar, unpacked",
            SYNTHIA_IDS,
            fields={"name": r"\d{7}"},
            splits=lambda fields: ("train",),
        ),
    ),
    "bdd100k": (
        Layout(
            "images/10k/{split}/{name}.jpg",
            "labels/sem_seg/masks/{split}/{name}.png",
            "bdd100k_images_10k.zip and bdd100k_sem_seg_labels_trainval.zip",
            TRAIN_IDS,
        ),
        Layout("seg/images/{split}/{name}.jpg", "seg/labels/{split}/{name}_train_id.png", "bdd100k_seg.zip", TRAIN_IDS),
    ),
    "mapillary": tuple(
        Layout(
            "{split}/images/{name}.jpg",
            label,
            "the archive of Mapillary Vistas",
            V1_2_IDS,
            fields={"split": "training|validation"},
            splits=lambda fields: (TRAINING[fields["split"]],),
            config=(config, V1_2),
        )
        for label, config in (
            ("{split}/labels/{name}.png", "config.json"),
            ("{split}/v1.2/labels/{name}.png", "config_v1.2.json"),
        )
    ),
    "mapillary_v2": (
        Layout(
            "{split}/images/{name}.jpg",
            "{split}/v2.0/labels/{name}.png",
            "the archive of Mapillary Vistas 2.0",
            V2_0_IDS,
            fields={"split": "training|validation"},
            splits=lambda fields: (TRAINING[fields["split"]],),
            config=("config_v2.0.json", V2_0),
        ),
    ),
    "acdc": (
        Layout(
            "rgb_anon/{condition}/{split}/{sequence}/{name}_rgb_anon.png",
            "gt/{condition}/{split}/{sequence}/{name}_gt_labelTrainIds.png",
            "rgb_anon_trainvaltest.zip and gt_trainval.zip",
            TRAIN_IDS,
            fields=ACDC,
            name="{condition}_{name}",
            splits=lambda fields: (fields["split"], f"{fields['condition']}_{fields['split']}"),
        ),
    ),
    "dark_zurich": (
        Layout(
            "rgb_anon/{split}/night/{sequence}/{name}_rgb_anon.png",
            "gt/{split}/night/{sequence}/{name}_gt_labelTrainIds.png",
            "Dark_Zurich_val_anon.zip",
            TRAIN_IDS,
            fields={"split": "val"},
        ),
    ),
}


def layout_of(dataset: str, files: Files) -> Layout:
    """The layout in which files hold a data set: the first one whose labels are there, else the first one."""
    layouts = LAYOUTS[dataset]
    return next((layout for layout in layouts if files.match(layout.pattern(layout.label))), layouts[0])
