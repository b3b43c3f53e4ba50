"""The experiments of the field: what is trained on, what is scored on, and at which size."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Experiment:
    """A benchmark of domain generalisation.

    Args:
        title: as papers write it.
        sources: names of data sets as `examples/data/prepare.py` makes them; their split `train` is trained on.
        targets: DATASET:SPLIT by the name in tables. The mean is over all of them.
    """

    title: str
    sources: tuple[str, ...]
    targets: dict[str, str]


CITIES = {"Cityscapes": "cityscapes:val", "BDD100K": "bdd100k:val", "Mapillary": "mapillary:val"}
EXPERIMENTS = {
    "gta5": Experiment("GTAV -> Cityscapes, BDD100K, Mapillary", ("gta5",), CITIES),
    "gta5_synthia": Experiment("GTAV + SYNTHIA -> Cityscapes, BDD100K, Mapillary", ("gta5", "synthia"), CITIES),
    "acdc": Experiment(
        "Cityscapes -> ACDC",
        ("cityscapes",),
        {name: f"acdc:{name}_val" for name in ("fog", "night", "rain", "snow")},
    ),
}
# (width, height) that images are scaled into for scoring, shape kept; "own": none, as they are. Labels stay as they are.
# "full": SoMA's configurations (github.com/ysj9909/SoMA, configs/_base_/datasets); "half": Rein's, for crops of 512
# (github.com/w1oves/Rein, likewise). GTAV's and SYNTHIA's are those of the whole images that calibration observes.
SIZES: dict[str, dict[str, Size]] = {
    "full": {
        "cityscapes": (2048, 1024),
        "bdd100k": (1280, 720),
        "mapillary": (2048, 1024),
        "acdc": (1920, 1080),
        "gta5": (1280, 720),
        "synthia": (1280, 760),
    },
    "half": {
        "cityscapes": (1024, 512),
        "bdd100k": (1280, 720),
        "mapillary": (1024, 512),
        "acdc": (960, 540),
        "gta5": (1280, 720),
        "synthia": (1280, 760),
    },
    "own": {},
}


def fitted(size: Size, into: Size | None) -> Size:
    """An image's (width, height), scaled so that its long side fits the longer length and its short side the shorter."""
    if into is None:
        return size
    factor = min(max(into) / max(size), min(into) / min(size))
    return round(size[0] * factor), round(size[1] * factor)
