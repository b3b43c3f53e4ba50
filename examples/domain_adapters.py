"""One backbone and one head, and a set of calibrators for each domain: tunes, switches and merges the sets.

python examples/domain_adapters.py --steps 100 --out runs/domains \
    --domain day camvid train_day val_day --domain dusk camvid train_dusk test_dusk
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from backbone import load_dinov2_small
from streets import IGNORE, StreetScenes, TrainingCrops, evaluate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from train_minimal import build_optimizer

from mgfc import FeatureMaps, get_calibration, load_head, wrap_backbone

ADAPTER = Path(__file__).parent / "adapter"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("NAME", "ROOT", "TRAIN", "TEST")
    parser.add_argument("--domain", nargs=4, action="append", required=True, metavar=names, help="once for each domain")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="from which every domain's adapter starts, with its head")
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2 (default: from the Hub)")
    parser.add_argument("--out", type=Path, help="where to save a directory for each adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--size", type=int, nargs=2, default=(196, 266), metavar=("H", "W"), help="of a crop")
    parser.add_argument("--count", type=int, help="score this many images of each domain (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def tune(model: nn.Sequential, scenes: StreetScenes, args: argparse.Namespace) -> None:
    """Trains the active adapter; the head is shared and stays as it is."""
    optimizer, schedule = build_optimizer(model, args.lr, 0.0, args.steps)
    crops = TrainingCrops(scenes, tuple(args.size), args.seed, 0, args.steps * args.batch_size)
    model.train()
    for images, labels in DataLoader(crops, args.batch_size):
        logits = F.interpolate(model(images), size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    vit = wrap_backbone(load_dinov2_small(args.backbone), args.adapter)
    calibration = get_calibration(vit)
    head = load_head(args.adapter).requires_grad_(False)
    model = nn.Sequential(FeatureMaps(vit, out_indices=(2, 5, 8, 11)), head)

    names = [name for name, *_ in args.domain]
    for name, root, train, _ in args.domain:
        calibration.add_adapter(name, args.adapter)
        calibration.set_adapter(name)
        tune(model, StreetScenes(root, train), args)
    calibration.merge_adapters(names)

    scores: dict[str, dict[str, float]] = {}
    for adapter in calibration.adapters:
        with calibration.using(adapter):
            scores[adapter] = {
                name: round(evaluate(model, islice(StreetScenes(root, test), args.count), title=name).miou, 2)
                for name, root, _, test in args.domain
            }
            if args.out:
                calibration.save_pretrained(args.out / adapter, head=head)
    print(" ".join(f"{column:>10}" for column in ("mIoU", *names)))
    for adapter, row in scores.items():
        print(" ".join([f"{adapter:>10}", *(f"{value:>10.2f}" for value in row.values())]))
    return scores


if __name__ == "__main__":
    main()
