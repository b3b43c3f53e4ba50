"""Trains calibrators and a head with several processes, by DDP or FSDP2, on random images.

torchrun --nproc_per_node 2 examples/train_distributed.py --engine fsdp
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mgfc import FeatureMaps, SegmentationHead, get_calibration, wrap_backbone

NUM_CLASSES = 19


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m", help="timm name; random weights are used")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(70, 98), metavar=("H", "W"))
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)  # the same calibrators and head everywhere
    vit = wrap_backbone(timm.create_model(args.model, dynamic_img_size=True))
    calibration, blocks = get_calibration(vit), vit.get_submodule("blocks")
    depth = len(list(blocks.children()))
    maps = FeatureMaps(vit, (depth // 2, depth - 1))
    model: nn.Module = nn.Sequential(maps, SegmentationHead(maps.channels, NUM_CLASSES)).to(device)
    if args.engine == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
        for block in blocks.children():  # the calibrators belong to the root
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    draw = torch.Generator().manual_seed(dist.get_rank())  # other images in each process
    for step in range(args.steps):
        images = torch.randn(2, 3, *args.size, generator=draw).to(device)
        labels = torch.randint(NUM_CLASSES, (2, *args.size), generator=draw).to(device)
        logits = F.interpolate(model(images), size=args.size, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels) + calibration.loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: {loss.item():.3f}")
    calibration.save_pretrained(args.out)  # on all processes; the first one writes
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
