"""Segments a large set of images with Ray Data: one replica of the model on each GPU, or several on the cores.

pip install -e ".[demo]" "ray[data]"
python examples/segment_many.py PHOTOGRAPHS --out labels --replicas 8        # from a folder or bucket, to Parquet files
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
import torch
from backbone import load_dinov2_small
from PIL import Image
from streets import normalise
from torch import nn
from torch.nn import functional as F

from mgfc import FeatureMaps, load_head, wrap_backbone

HERE = Path(__file__).resolve().parent


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="a folder or a bucket that holds them")
    parser.add_argument("--adapter", default=str(HERE / "adapter"), help="directory or Hub repository with a head")
    parser.add_argument("--backbone", help="Transformers directory of a DINOv2-S (default: from the Hub)")
    parser.add_argument("--size", type=int, nargs=2, default=(392, 532), metavar=("H", "W"), help="to which images are resized")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1, help="of the model, each on a GPU if there are any")
    parser.add_argument("--out", required=True, help="folder or bucket for Parquet files: paths, and label maps as PNG")
    return parser.parse_args(arguments)


class Segmenter:
    """A replica of the model, which Ray creates once and calls for many batches."""

    def __init__(self, adapter: str, backbone: str | None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        maps = FeatureMaps(wrap_backbone(load_dinov2_small(backbone), adapter), out_indices=(2, 5, 8, 11))
        self.model = nn.Sequential(maps, load_head(adapter)).to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = torch.stack([normalise(Image.fromarray(image)) for image in batch["image"]])
        logits = F.interpolate(self.model(pixels.to(self.device)), size=pixels.shape[2:], mode="bilinear")
        labels = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return {"path": batch["path"], "labels": np.array([as_png(classes) for classes in labels], dtype=object)}


def as_png(classes: np.ndarray) -> bytes:
    """An image of class ids as a PNG file of a few kilobytes."""
    file = io.BytesIO()
    Image.fromarray(classes).save(file, format="png")
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    images = ray.data.read_images(args.images, size=tuple(args.size), mode="RGB", include_paths=True)
    labels = images.map_batches(
        Segmenter,
        fn_constructor_args=(args.adapter, args.backbone),
        batch_size=args.batch_size,
        concurrency=args.replicas,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    labels.write_parquet(args.out)


if __name__ == "__main__":
    main()
