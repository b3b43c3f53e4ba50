"""How far images lie from the source of the demo adapter: each set as it is, and in drawn fog and night.

python examples/distances.py --sets synth_town:val camvid:test_day camvid:test_dusk
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from backbone import load_dinov2_small
from domain_generalization.corruptions import corrupt
from domain_generalization.domains import STRENGTHS, spread
from PIL import Image
from streets import SIZE, StreetScenes, normalise

from mgfc import CoarseCalib, get_calibration, wrap_backbone

HERE = Path(__file__).parent
CONDITIONS = [(None, 0), *((kind, strength) for kind in ("fog", "night") for strength in STRENGTHS)]


def load_coarse(backbone: Path | None) -> CoarseCalib:
    """The coarse stage of the demo adapter, which alone decides the distance."""
    coarse = get_calibration(wrap_backbone(load_dinov2_small(backbone), HERE / "adapter")).eval().adapter.coarse
    assert isinstance(coarse, CoarseCalib)
    return coarse


def distances(coarse: CoarseCalib, place: str, kind: str | None, strength: int, count: int) -> Iterator[float]:
    """Of some frames of a set ROOT:SPLIT, evenly spread, at the size that the adapter was evaluated at."""
    scenes = StreetScenes(*place.rsplit(":", 1))
    for index in spread(len(scenes), count):
        image = scenes[index][0].resize(SIZE[::-1], Image.Resampling.BILINEAR)
        image = image if kind is None else corrupt(image, kind, strength, index)
        yield coarse.distance(coarse.statistics(normalise(image).unsqueeze(0))).item()


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["synth_town:val"], metavar="ROOT:SPLIT")
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2-S (default: from the Hub)")
    parser.add_argument("--count", type=int, default=24, help="frames of each set")
    args = parser.parse_args(arguments)
    coarse = load_coarse(args.backbone)
    names = ["as it is", *(f"{kind} {strength + 1}" for kind, strength in CONDITIONS[1:])]
    rows = [" | ".join(["| median (least to greatest)", *names]) + " |", "| --- " * (len(names) + 1) + "|"]
    for place in args.sets:
        cells = []
        for kind, strength in CONDITIONS:
            found = list(distances(coarse, place, kind, strength, args.count))
            cells.append(f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        rows.append(" | ".join([f"| {place}", *cells]) + " |")
    print("\n".join(rows))
    return rows


if __name__ == "__main__":
    main()
