"""Which images a run trains on, selects on and is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("fog", "night", "rain", "snow", "motion blur", "noise", "brightness", "contrast")
STRENGTHS = (0, 1, 2)


@dataclass(frozen=True)
class Source:
    """A source domain: what to train on, what to select on, and what it never sees.

    Sets are named `DATASET:SPLIT`. `development` are the frames that may settle a design, `test` those that the tables
    report; no frame is in both.
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
        development={"day": "camvid:seq_0006R0", "dusk": "camvid:train_dusk", "cities": "labelme_scenes:development"},
        test={"day": "camvid:test_day", "dusk": "camvid:test_dusk", "cities": "labelme_scenes:test"},
    ),
    "camvid_day": Source(
        train="camvid:train_day",
        val="camvid:val_day",
        in_domain="camvid:test_day",
        development={"dusk": "camvid:train_dusk", "cities": "labelme_scenes:development"},
        test={"dusk": "camvid:test_dusk", "cities": "labelme_scenes:test"},
    ),
}


@dataclass(frozen=True)
class Target:
    """Images that a model is scored on.

    Args:
        place: the set that they are from.
        kind: the corruption, or None.
    """

    place: str
    kind: str | None = None


def targets(source: Source, split: str) -> dict[str, Target]:
    """What a run is scored on: the source's validation, its in-domain test, each unseen set, clean and in each corruption.

    Args:
        source: the source domain.
        split: "development" or "test" frames, or "val" for the source's validation alone.

    Returns:
        Targets by name: "val", "in-domain", "dusk", "dusk, fog" and the like.
    """
    found = {"val": Target(source.val)}
    if split == "val":
        return found
    if split == "test" and source.in_domain != source.val:
        found["in-domain"] = Target(source.in_domain)
    unseen: dict[str, str] = getattr(source, split)
    found |= {name: Target(place) for name, place in unseen.items()}
    return found | {f"{name}, {kind}": Target(place, kind) for kind in KINDS for name, place in unseen.items()}


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread."""
    if count >= length:
        return list(range(length))
    return [round((i + 0.5) * length / count - 0.5) for i in range(count)]


def chosen(names: Sequence[str], target: Target, count: int) -> list[tuple[str, int]]:
    """The frames of a target and the strength of each one's corruption, which they take in turn.

    Args:
        names: all frames of the set.
        target: clean targets take `count` of them, corrupted ones a quarter of that.
        count: images in each clean set.
    """
    if target.kind is not None:
        count = max(len(STRENGTHS), count // 4 // len(STRENGTHS) * len(STRENGTHS))
    return [(names[index], STRENGTHS[place % len(STRENGTHS)]) for place, index in enumerate(spread(len(names), count))]
