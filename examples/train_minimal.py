"""Trains calibrators and a segmentation head on one domain and scores them on others, in plain PyTorch.

python examples/train_minimal.py --out runs/adapter --test camvid:day camvid:dusk
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from backbone import HUB_ID, load_dinov2_small
from streets import CLASSES, IGNORE, SIZE, StreetScenes, TrainingCrops, observed, save_bare_head, save_checkpoint, score, spot
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from mgfc import FeatureMaps, SegmentationHead, get_calibration, wrap_backbone


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("synth_town"), help="path or name of a data set with a split `train`")
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2 (default: from the Hub)")
    parser.add_argument("--out", type=Path, default=Path("runs/adapter"))
    parser.add_argument("--bare", action="store_true", help="no calibrators: the same head on the frozen backbone")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the calibrators")
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, nargs=2, default=(196, 266), metavar=("H", "W"), help="of a crop")
    parser.add_argument("--observe", type=int, default=240, help="training images to gather the statistics from afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    parser.add_argument("--val", metavar="ROOT:SPLIT", help="data of the source domain to score (default: DATA:val)")
    parser.add_argument("--test", nargs="*", default=[], metavar="ROOT:SPLIT", help="data of unseen domains to score")
    parser.add_argument("--note", help="a line for the model card, such as the origin of the data")
    return parser.parse_args(arguments)


def build_model(backbone: Path | None, bare: bool) -> tuple[nn.Module, SegmentationHead, nn.Sequential]:
    vit = load_dinov2_small(backbone)
    if bare:
        vit.requires_grad_(False)
    else:
        wrap_backbone(vit)
    maps = FeatureMaps(vit, out_indices=(2, 5, 8, 11))
    head = SegmentationHead(maps.channels, len(CLASSES))
    return vit, head, nn.Sequential(maps, head)


def build_optimizer(model: nn.Sequential, lr: float, head_lr: float, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    groups = []
    for module, rate in zip(model, (lr, head_lr), strict=True):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups.append({"params": [p for p in trained if p.ndim > 1], "lr": rate, "weight_decay": 0.05})
        groups.append({"params": [p for p in trained if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    warmup = max(1, steps // 20)
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / steps) ** 0.9))


def train(model: nn.Sequential, vit: nn.Module, args: argparse.Namespace, checkpoint: Path) -> None:
    optimizer, schedule = build_optimizer(model, args.lr, args.head_lr, args.steps)
    run = [args.steps, args.batch_size, args.lr, args.head_lr, *args.size, args.seed, args.bare]
    step = 0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{checkpoint} belongs to a run with other settings: {saved['run']}, now {run}.")
        step = saved["step"]
        model.load_state_dict(saved["trained"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])
    scenes = StreetScenes(args.data, "train")
    crops = TrainingCrops(scenes, tuple(args.size), args.seed, step * args.batch_size, args.steps * args.batch_size)
    batches = DataLoader(crops, args.batch_size, num_workers=args.workers)
    progress = tqdm(batches, desc=f"training {args.out.name}", initial=step, total=args.steps, mininterval=5)
    model.train()
    for images, labels in progress:
        logits = F.interpolate(model(images), size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        if not args.bare:
            loss = loss + get_calibration(vit).loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.save_every == 0 or step == args.steps:
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            trained = {name: value for name, value in model.state_dict().items() if name not in frozen}
            state = {"run": run, "step": step, "trained": trained, "rng": torch.get_rng_state()}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save_checkpoint(state, checkpoint)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    vit, head, model = build_model(args.backbone, args.bare)
    print(f"Trained parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad):,}")
    checkpoint = args.out.with_name(args.out.name + ".checkpoint.pt")
    start = time.perf_counter()
    train(model, vit, args, checkpoint)
    if not args.bare:
        with get_calibration(vit).observing():  # the source's statistics, of whole images and by the model as it is now
            for image in tqdm(observed(StreetScenes(args.data, "train"), args.observe, SIZE, args.seed), desc="observing"):
                model[0](image)
    minutes = (time.perf_counter() - start) / 60

    val = args.val or f"{args.data}:val"
    metrics = score(model, [val, *args.test])
    training = {
        "metrics": metrics,
        "datasets": [args.data.name],
        "classes": list(CLASSES),
        "recipe": f"{args.steps} steps of {args.batch_size} crops of {args.size[0]} x {args.size[1]}, AdamW, "
        f"learning rate {args.lr:g} (head {args.head_lr:g}), seed {args.seed}"
        + ("" if args.bare else f", then statistics of {args.observe} whole images"),
        "command": f"python examples/train_minimal.py --data {args.data.name} --steps {args.steps} "
        f"--batch-size {args.batch_size} --size {args.size[0]} {args.size[1]} --lr {args.lr:g} --head-lr {args.head_lr:g} "
        f"--seed {args.seed} " + ("--bare" if args.bare else f"--observe {args.observe}"),
        "backbone weights": vit.weights_source,
        "evaluation": "images at 336 x 448, IoU at the labels' own resolution",
        **spot(model, val),
        "minutes": round(minutes, 1),
        **({"note": args.note} if args.note else {}),
    }
    if args.bare:
        save_bare_head(head, args.out, training)
    else:
        get_calibration(vit).save_pretrained(args.out, head=head, training=training, base_model=HUB_ID)
    checkpoint.unlink()
    print(f"Written: {args.out}")
    return metrics


if __name__ == "__main__":
    main()
