"""Which class each label id of each data set is: the 19 evaluation classes of Cityscapes, or CamVid's 11.

A table gives the class of each id by place; 255 is ignored. What is no id of the data set is in no table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IGNORE = 255
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain"),
    *("sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CAMVID = ("sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def table(ids: Mapping[str, Sequence[int]], count: int, classes: Sequence[str] = CITYSCAPES) -> dict[int, int]:
    """The class of each id from 0 to `count`, exclusive; ids that no class names are ignored."""
    found = dict.fromkeys(range(count), IGNORE)
    for name, members in ids.items():
        found |= dict.fromkeys(members, classes.index(name))
    return found


_NUMBERS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# `labels` in cityscapesscripts/helpers/labels.py: ids 0 to 33; licence plates (-1) are not drawn.
CITYSCAPES_IDS = table({name: [number] for name, number in zip(CITYSCAPES, _NUMBERS, strict=True)}, 34)
# GTA5 ("Playing for Data") takes Cityscapes' ids, with 34 for licence plates: `classes` in its read_mapping.zip.
GTA5_IDS = CITYSCAPES_IDS | {34: IGNORE}
# Already the evaluation classes: BDD100K's masks, and `_gt_labelTrainIds.png` of ACDC and Dark Zurich.
TRAIN_IDS = {**{index: index for index in range(19)}, IGNORE: IGNORE}
# README.txt of SYNTHIA-RAND-CITYSCAPES: 0 void, 13 parking slot, 14 road works and 22 lane marking are ignored.
SYNTHIA_IDS = table(
    {
        "road": [3],
        "sidewalk": [4],
        "building": [2],
        "wall": [21],
        "fence": [5],
        "pole": [7],
        "traffic light": [15],
        "traffic sign": [9],
        "vegetation": [6],
        "terrain": [16],
        "sky": [1],
        "person": [10],
        "rider": [17],
        "car": [8],
        "truck": [18],
        "bus": [19],
        "train": [20],
        "motorcycle": [12],
        "bicycle": [11],
    },
    23,
)
# CamVid/*annot of the SegNet tutorial: the 11 classes in this order, and 11 for what is not labelled.
CAMVID_IDS = {**{index: index for index in range(11)}, 11: IGNORE}
# label_colors.txt of CamVid, its 32 classes grouped as the SegNet tutorial does; Void (0, 0, 0) is ignored.
CAMVID_COLOURS: dict[str, dict[str, tuple[int, int, int]]] = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Archway": (192, 0, 128),
        "Bridge": (0, 128, 64),
        "Building": (128, 0, 0),
        "Tunnel": (64, 0, 64),
        "Wall": (64, 192, 0),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {"LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64), "Road": (128, 64, 128)},
    "sidewalk": {"ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192), "Sidewalk": (0, 0, 192)},
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign": {"Misc_Text": (128, 128, 64), "SignSymbol": (192, 128, 128), "TrafficLight": (0, 64, 64)},
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128),
        "OtherMoving": (128, 64, 64),
        "SUVPickupTruck": (64, 128, 192),
        "Train": (192, 64, 128),
        "Truck_Bus": (192, 128, 192),
    },
    "pedestrian": {
        "Animal": (64, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Child": (192, 128, 64),
        "Pedestrian": (64, 64, 0),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}


def pack_colour(red: Any, green: Any, blue: Any) -> Any:
    """One number for a colour, or for each colour of three arrays."""
    return red << 16 | green << 8 | blue


CAMVID_PACKED = {0: IGNORE} | {
    pack_colour(*colour): CAMVID.index(name) for name, group in CAMVID_COLOURS.items() for colour in group.values()
}
