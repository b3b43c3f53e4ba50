"""Reading what `pack` wrote: scenes brought to one size, decoded once a process, and the backbone."""

from __future__ import annotations

import copy
import lzma
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from domain_generalization.domains import Target, spread

Pixels = NDArray[np.uint8]
PATCH = 14


@dataclass(frozen=True)
class Scenes:
    """Scenes of one size, in memory.

    Args:
        images: (N, H, W, 3), at the size that a run asks for.
        labels: (N, h, w) class ids, at their own resolution.
    """

    images: Pixels
    labels: Pixels

    def __len__(self) -> int:
        return len(self.images)

    def pairs(self) -> list[tuple[Image.Image, Image.Image]]:
        """As PIL images, for augmentation."""
        return [(Image.fromarray(i), Image.fromarray(k)) for i, k in zip(self.images, self.labels, strict=True)]

    def some(self, count: int) -> Scenes:
        """At most so many of them, evenly spread."""
        index = spread(len(self), count)
        return Scenes(self.images[index], self.labels[index])


def folder_of(packed: Path, target: Target) -> Path:
    """Where the images of a target are; their labels are beside them, in `labels`."""
    return packed / target.place.replace(":", ".") / (target.kind or "clean").replace(" ", "_")


def fit(image: Image.Image, height: int) -> Image.Image:
    """Brought to a height, with the width that keeps its shape, in whole patches."""
    width = max(1, round(image.width / image.height * height / PATCH)) * PATCH
    return image.resize((width, height), Image.Resampling.BILINEAR)


@cache
def read(packed: Path, target: Target, height: int) -> Scenes:
    """The scenes of a target at a height.

    Raises:
        SystemExit: if they are not in the folder.
    """
    folder = folder_of(packed, target)
    if not folder.exists():
        raise SystemExit(f"No images in {folder}: write them with `python -m domain_generalization pack`.")
    images, labels = [], []
    for path in sorted(folder.glob("*.webp")):
        with Image.open(path) as image:
            images.append(np.asarray(fit(image.convert("RGB"), height)))
        with Image.open(folder.parent / "labels" / f"{path.stem}.png") as label:
            labels.append(np.asarray(label))
    return Scenes(np.stack(images), np.stack(labels))


def read_training(packed: Path, place: str, size: tuple[int, int]) -> Scenes:
    """The scenes to train on: labels, too, at the size."""
    scenes = read(packed, Target(place), size[0])
    height, width = size
    labels = [Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST) for label in scenes.labels]
    return Scenes(scenes.images, np.stack([np.asarray(label) for label in labels]))


def compress(state: dict[str, torch.Tensor]) -> bytes:
    """Weights in bfloat16; the bytes of signs and exponents, which repeat, come first and those of mantissas after."""
    raw = safetensors.torch.save({name: value.to(torch.bfloat16) for name, value in state.items()})
    return lzma.compress(np.frombuffer(raw, np.uint8).reshape(-1, 2).T.tobytes())


def decompress(data: bytes) -> dict[str, torch.Tensor]:
    """The inverse of `compress`, in float32."""
    raw = np.frombuffer(lzma.decompress(data), np.uint8).reshape(2, -1).T.tobytes()
    return {name: value.float() for name, value in safetensors.torch.load(raw).items()}


@lru_cache(maxsize=1)
def _backbone(packed: Path) -> Dinov2Model:
    config = Dinov2Config.from_pretrained(packed / "backbone")
    state = decompress((packed / "backbone" / "weights.xz").read_bytes())
    # Not load_state_dict: Transformers translates the names, which differ between its versions.
    return Dinov2Model.from_pretrained(None, config=config, state_dict=state)


def load_backbone(packed: Path) -> Dinov2Model:
    """A fresh copy of the packed backbone."""
    return copy.deepcopy(_backbone(packed))
