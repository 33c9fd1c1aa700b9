"""Light augmentation of images, drawn from the run's seed, the position in the run and the row alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fsdp_qlora.config.objective import Augmentation

if TYPE_CHECKING:
    from PIL.Image import Image

_LEAST_AREA = 0.5
"""Share of an image's area that a crop keeps, at least."""
_RATIO = math.log(4 / 3)
"""Logarithm of the largest ratio of width to height of a crop, relative to the image's; the smallest is its inverse."""
_TRIES = 10


def augmented(image: Image, kind: Augmentation, draw: np.random.Generator) -> Image:
    """Return an image as ``objective.augmentation`` changes it.

    The crop is that of Inception's training (https://arxiv.org/abs/1409.4842, section 6) with larger areas; the image
    processor resizes it.
    """
    from PIL.Image import Transpose

    if kind in ("crop", "flip_crop"):
        image = image.crop(_box(image.width, image.height, draw))
    if kind in ("flip", "flip_crop") and draw.random() < 0.5:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    return image


def _box(width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a crop; the whole image if none of a few tries lies within it."""
    for _ in range(_TRIES):
        area, ratio = draw.uniform(_LEAST_AREA, 1.0), math.exp(draw.uniform(-_RATIO, _RATIO))
        wide, high = round(width * math.sqrt(area * ratio)), round(height * math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(0, width - wide + 1)), int(draw.integers(0, height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height
