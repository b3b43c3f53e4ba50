"""Which images a run trains on, selects on and is tested on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from streets import StreetScenes

from domain_generalization.corruptions import KINDS, STRENGTHS, corrupt

Pair = tuple[Image.Image, Image.Image]


@dataclass(frozen=True)
class Source:
    """A source domain: what to train on, what to select on, and what it never sees.

    `development` are the frames that settled mgfc's default configuration, `test` those that the tables report; no frame
    is in both.
    """

    train: str
    val: str
    in_domain: str
    development: dict[str, str]
    test: dict[str, str]


SOURCES = {
    "synth_town": Source(
        train="synth_town:train",
        val="synth_town:val",
        in_domain="synth_town:val",
        development={"day": "camvid:seq_0006R0", "dusk": "camvid:train_dusk"},
        test={"day": "camvid:test_day", "dusk": "camvid:test_dusk"},
    ),
    "camvid_day": Source(
        train="camvid:train_day",
        val="camvid:val_day",
        in_domain="camvid:test_day",
        development={"dusk": "camvid:train_dusk"},
        test={"dusk": "camvid:test_dusk"},
    ),
}


def open_split(data: Path, place: str) -> StreetScenes:
    """The scenes of `DATASET:SPLIT`."""
    dataset, split = place.split(":")
    return StreetScenes(data / dataset, split)


class Resized:
    """Scenes brought to one size and kept in memory."""

    def __init__(self, scenes: StreetScenes, size: tuple[int, int]) -> None:
        self.scenes, self.size = scenes, size[::-1]
        self.kept: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Pair:
        if index not in self.kept:
            image, label = self.scenes[index]
            self.kept[index] = (
                image.resize(self.size, Image.Resampling.BILINEAR),
                label.resize(self.size, Image.Resampling.NEAREST),
            )
        return self.kept[index]


def spread(length: int, count: int | None) -> list[int]:
    """At most `count` indices, evenly spread."""
    if count is None or count >= length:
        return list(range(length))
    return [round((i + 0.5) * length / count - 0.5) for i in range(count)]


@dataclass(frozen=True)
class Target:
    """Images of one unseen domain, clean or corrupted.

    Args:
        scenes: where they are from.
        count: how many of them, evenly spread; None for all.
        kind: the corruption, or None. Each image then comes in one strength, in turn, if `count` is given, else in all.
    """

    scenes: tuple[StreetScenes, ...]
    count: int | None
    kind: str | None = None

    def __iter__(self) -> Iterator[Pair]:
        for scenes in self.scenes:
            for place, index in enumerate(spread(len(scenes), self.count)):
                image, label = scenes[index]
                if self.kind is None:
                    yield image, label
                    continue
                strengths = STRENGTHS if self.count is None else (STRENGTHS[place % len(STRENGTHS)],)
                for strength in strengths:
                    seed = zlib.crc32(f"{scenes.names[index]} {self.kind} {strength}".encode())
                    yield corrupt(image, self.kind, strength, seed), label


def targets(data: Path, source: Source, split: str, count: int | None) -> dict[str, Target]:
    """The unseen domains of a source: the clean sets, then one target for each corruption, over all sets and strengths.

    Args:
        data: holds the data sets.
        source: the source domain.
        split: "development" or "test".
        count: images in each clean set; corrupted targets take a quarter of it from each set. None for all.
    """
    sets = {name: open_split(data, place) for name, place in getattr(source, split).items()}
    clean = {name: Target((scenes,), count) for name, scenes in sets.items()}
    fewer = None if count is None else max(len(STRENGTHS), count // 4 // len(STRENGTHS) * len(STRENGTHS))
    return clean | {kind: Target(tuple(sets.values()), fewer, kind) for kind in KINDS}
