"""Weather, light and sensor faults, in three strengths, drawn by albumentations from a seed."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from domain_generalization.domains import KINDS

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


def corruption(kind: str, strength: int) -> list[A.ImageOnlyTransform]:
    """The transforms of one corruption.

    Args:
        kind: one of `domains.KINDS`.
        strength: 0, 1 or 2.
    """

    def level(low: float, middle: float, high: float) -> tuple[float, float]:
        value = (low, middle, high)[strength]
        return value, value

    def brighten(by: tuple[float, float]) -> A.ImageOnlyTransform:
        return A.RandomBrightnessContrast(brightness_limit=by, contrast_limit=(0, 0), p=1)

    def flatten(to: tuple[float, float]) -> A.ImageOnlyTransform:
        return A.ColorJitter(brightness=(1, 1), contrast=to, saturation=(1, 1), hue=(0, 0), p=1)

    match kind:
        case "fog":
            veil = A.RandomFog(fog_coef_range=level(0.2, 0.35, 0.5), alpha_coef=0.1, p=1)
            return [flatten(level(0.7, 0.5, 0.35)), brighten(level(0.1, 0.2, 0.25)), veil]
        case "night":
            dark = A.RandomGamma(gamma_limit=level(130, 160, 200), p=1)
            blue = A.RGBShift(level(-12, -16, -20), level(-8, -10, -12), level(5, 8, 10), p=1)
            return [dark, brighten(level(-0.05, -0.08, -0.1)), blue, A.ISONoise(intensity=level(0.1, 0.15, 0.2), p=1)]
        case "rain":
            drops = ("drizzle", "heavy", "torrential")[strength]
            blur, light = (1, 3, 3)[strength], level(0.9, 0.8, 0.7)[0]
            return [A.RandomRain(rain_type=drops, blur_value=blur, brightness_coefficient=light, p=1)]
        case "snow":
            cover = A.RandomSnow(snow_point_range=level(0.1, 0.3, 0.5), method="bleach", p=1)
            flakes = A.RandomRain(
                slant_range=(-5, 5), drop_length=3, drop_width=2, drop_color=(245, 245, 250), blur_value=1,
                brightness_coefficient=1, p=1,
            )  # fmt: skip
            return [cover, *[flakes] * (1, 3, 6)[strength]]
        case "motion blur":
            side = (7, 11, 17)[strength]
            return [A.MotionBlur(blur_limit=(side, side), p=1)]
        case "noise":
            return [A.GaussNoise(std_range=level(0.08, 0.14, 0.22), p=1)]
        case "brightness":
            return [brighten(level(0.2, 0.35, 0.5))]
        case "contrast":
            return [flatten(level(0.5, 0.35, 0.2))]
    raise ValueError(f"Expected one of {', '.join(KINDS)}, found {kind!r}.")


def corrupt(image: Image.Image, kind: str, strength: int, seed: int) -> Image.Image:
    """A corrupted copy of an RGB image; the same arguments give the same copy."""
    pixels = A.Compose(corruption(kind, strength), seed=seed)(image=np.array(image))["image"]
    return Image.fromarray(pixels)
