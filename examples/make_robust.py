"""Gives a trained segmenter calibration in one pass over its training images, and scores it as it was and calibrated.

python examples/make_robust.py --head examples/bare_head --out runs/robust     # needs pip install -e ".[benchmark]"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from backbone import HUB_ID, load_dinov2_small
from domain_generalization.corruptions import corrupt
from domain_generalization.domains import KINDS
from PIL import Image, ImageOps
from segment import PATCH, colour, compose
from streets import SIZE, SPOT, Pair, StreetScenes, evaluate, load_bare_head, normalise, observed, some
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mgfc import FeatureMaps, MGFCConfig, get_calibration, wrap_backbone
from mgfc.viz.files import model_size, read_image

HERE = Path(__file__).parent
STRENGTH = 1  # the middle one of the benchmark's three


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", type=Path, default=HERE / "bare_head", help="what train_minimal.py --bare wrote")
    parser.add_argument("--data", type=Path, default=Path("synth_town"), help="path or name of what it was trained on")
    parser.add_argument("--backbone", type=Path, help="Transformers directory of a DINOv2 (default: from the Hub)")
    parser.add_argument("--out", type=Path, default=Path("runs/robust"))
    parser.add_argument("--observe", type=int, default=240, help="training images to gather the statistics from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", type=Path, default=HERE / "images" / "trier_basilica_parked_cars.jpg", help="to show in fog"
    )
    return parser.parse_args(arguments)


def conditions(scenes: StreetScenes) -> Iterator[tuple[str, list[Pair]]]:
    """The scenes as they are, and some of them in each corruption."""
    yield "", list(scenes)
    few = some(scenes, SPOT)
    for kind in KINDS:
        yield f", {kind}", [(corrupt(image, kind, STRENGTH, seed), label) for seed, (image, label) in enumerate(few)]


def draw_in_fog(model: nn.Sequential, vit: nn.Module, picture: Path, target: Path) -> None:
    """A photograph in fog, segmented without and with calibration."""
    image = corrupt(read_image(picture), "fog", 2, 0)
    pixels = normalise(image.resize(model_size(image.size, 392, PATCH), Image.Resampling.BICUBIC)).unsqueeze(0)
    small = ImageOps.contain(image, (480, 480))

    def segmented() -> Image.Image:
        logits = F.interpolate(model(pixels), size=small.size[::-1], mode="bilinear", align_corners=False)
        return colour(small, logits[0].argmax(dim=0).numpy())

    with torch.inference_mode():
        panels = {"in fog": small, "calibrated": segmented()}
        with get_calibration(vit).disabled():
            panels["as trained"] = segmented()
    compose(panels).save(target, quality=90)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_arguments(arguments)
    vit = wrap_backbone(load_dinov2_small(args.backbone), MGFCConfig(rank=None))  # calibration alone: nothing is learnt
    head = load_bare_head(args.head)
    model = nn.Sequential(FeatureMaps(vit, out_indices=(2, 5, 8, 11)), head).eval()
    with get_calibration(vit).observing():
        for image in tqdm(observed(StreetScenes(args.data, "train"), args.observe, SIZE, args.seed), desc="observing"):
            model[0](image)

    calibrated, before = {}, {}
    for name, scenes in conditions(StreetScenes(args.data, "val")):
        place = f"{args.data.name}/val{name}"
        calibrated[f"{place} mIoU"] = round(evaluate(model, scenes, title=place).miou, 2)
        with get_calibration(vit).disabled():
            before[f"{place} mIoU"] = round(evaluate(model, scenes, title=f"{place}, as trained").miou, 2)
        print(f"{place}: mIoU {before[f'{place} mIoU']} as trained, {calibrated[f'{place} mIoU']} calibrated")

    trained = json.loads((args.head / "config.json").read_text())["training"]
    training = {
        "metrics": calibrated,
        "without calibration": "; ".join(f"{name} {value:.2f}" for name, value in before.items()),
        "datasets": [args.data.name],
        "recipe": f"a head on the frozen backbone ({trained['recipe']}), then statistics of {args.observe} whole images",
        "command": f"python examples/make_robust.py --data {args.data.name} --observe {args.observe} --seed {args.seed}",
        "backbone weights": vit.weights_source,
        "evaluation": f"images at {SIZE[0]} x {SIZE[1]}, IoU at the labels' own resolution; corruptions: {SPOT} images each",
        **{key: trained[key] for key in ("note",) if key in trained},
    }
    get_calibration(vit).save_pretrained(args.out, head=head, training=training, base_model=HUB_ID)
    draw_in_fog(model, vit, args.picture, args.out / "thumbnail.jpg")
    print(f"Written: {args.out}")
    return calibrated


if __name__ == "__main__":
    main()
