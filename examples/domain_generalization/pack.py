"""Writes all that runs at one scale need into one folder: scenes at their size, corrupted copies, the backbone.

Every run reads such a folder, so that a machine without a network, albumentations or the data sets does the same runs.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from backbone import load_dinov2_small
from data import find
from PIL import Image
from safetensors.torch import load_file
from streets import StreetScenes
from tqdm import tqdm

from domain_generalization.domains import SOURCES, Target, chosen, targets
from domain_generalization.scenes import compress, fit, folder_of


def write(
    out: Path, data: Path | None, backbone: Path | None, scale: dict[str, Any], split: str, sources: Sequence[str], quality: int
) -> None:
    """Writes the folder; it is there whole or not at all.

    Args:
        out: the folder, which must not be there yet.
        data: holds the data sets, or some of them; the others are where `data.find` looks.
        backbone: Transformers directory of the backbone; None for the Hub.
        scale: an entry of `plan.SCALES`.
        split: "development" or "test" frames of the unseen domains.
        sources: names in `SOURCES`.
        quality: of the images' WebP, up to 100.
    """
    if out.exists():
        raise SystemExit(f"{out} is there already.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        for target, count in wanted(sources, split, scale["count"]).items():
            write_target(folder, data, target, count, scale["size"][0], quality)
        write_backbone(folder / "backbone", backbone)
        about = {"split": split, "sources": sorted(sources), "size": scale["size"], "count": scale["count"], "webp": quality}
        (folder / "about.json").write_text(json.dumps(about) + "\n")
        folder.rename(out)


def wanted(sources: Sequence[str], split: str, count: int) -> dict[Target, int | None]:
    """The targets of these sources, and the images in each clean set; None for the sets to train on, which are whole."""
    found: dict[Target, int | None] = {}
    for source in (SOURCES[name] for name in sources):
        found |= dict.fromkeys(targets(source, split).values(), count)
        found[Target(source.train)] = None
    return found


def write_target(folder: Path, data: Path | None, target: Target, count: int | None, height: int, quality: int) -> None:
    """Writes one set: images no larger than they are read, labels of what is scored at their own resolution."""
    dataset, split = target.place.split(":")
    scenes = StreetScenes(find(dataset, data), split)
    place = {name: index for index, name in enumerate(scenes.names)}
    images = folder_of(folder, target)
    labels = images.parent / "labels"
    images.mkdir(parents=True)
    labels.mkdir(exist_ok=True)
    for name, strength in tqdm(chosen(scenes.names, target, count or len(scenes)), desc=str(images.relative_to(folder))):
        image, label = scenes[place[name]]
        if target.kind is not None:
            from domain_generalization.corruptions import corrupt

            image = corrupt(image, target.kind, strength, zlib.crc32(f"{name} {target.kind} {strength}".encode()))
        image = fit(image, height) if height < image.height else image
        if count is None:
            label = label.resize(image.size, Image.Resampling.NEAREST)
        image.save(images / f"{name}.webp", quality=quality, method=6)
        label.save(labels / f"{name}.png", optimize=True)


def write_backbone(folder: Path, backbone: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        load_dinov2_small(backbone).save_pretrained(temporary)
        state = load_file(Path(temporary) / "model.safetensors")
        config = (Path(temporary) / "config.json").read_text()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "weights.xz").write_bytes(compress(state))


def size_of(folder: Path) -> float:
    """MB of all files."""
    return float(np.sum([path.stat().st_size for path in folder.rglob("*") if path.is_file()]) / 1e6)
