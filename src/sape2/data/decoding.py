"""Turns one image into the input of a model: reads it with `pixels`, crops and resizes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sape2.config import DataConfig, ModelConfig
from sape2.data.pixels import MAX_PIXELS, named, read_image

# The part of an image that a model sees. Without a crop the whole image is resized, which may change its proportions.
Crop = Callable[[Image.Image, ModelConfig], Image.Image]
SIDES = (3 / 4, 4 / 3)  # of a random box, width to height: torchvision's and timm's


def decode(entry: Any, model: ModelConfig, where: str, crop: Crop | None = None) -> np.ndarray:
    """One image file as (height, width, C) uint8; raises ValueError that names it if it is missing, damaged or a bomb."""
    file = file_in(entry, where)
    with named(where):
        return to_array(read_image(file, model.in_channels), model, crop)


def file_in(entry: Any, where: str) -> Path | bytes:
    """Path or bytes of the image in a row; raises ValueError that names the row if it has none."""
    data = entry.get("bytes") if isinstance(entry, dict) else None
    path = entry.get("path") if isinstance(entry, dict) else None
    if data is None and path is None:
        raise ValueError(f"{where}: there is no image in it")
    return data if data is not None else Path(str(path))


def random_crop(image: Image.Image, model: ModelConfig, area: float, seed: int) -> Image.Image:
    """A box of `area` to 1 of the image with sides 3:4 to 4:3, drawn with `seed`: torchvision's RandomResizedCrop."""
    top, left, height, width = random_box(image.height, image.width, area, seed)
    return image.crop((left, top, left + width, top + height))


def random_box(height: int, width: int, area: float, seed: int) -> tuple[int, int, int, int]:
    """(top, left, height, width), draw for draw as RandomResizedCrop.get_params, but from a generator of its own.

    torchvision draws from the global generator, which threads that decode at the same time would share.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.log(torch.tensor(SIDES, dtype=torch.float32)).tolist()
    draws = (area, 1.0), (low, high)
    for _ in range(10):
        share, side = (torch.empty(1, dtype=torch.float32).uniform_(*ends, generator=generator) for ends in draws)
        target, ratio = height * width * share.item(), torch.exp(side).item()
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return top, left, h, w
    w = min(width, round(height * SIDES[1]))  # ten draws did not fit: the middle
    h = min(height, round(width / SIDES[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(image: Image.Image, model: ModelConfig, share: float) -> Image.Image:
    """The middle `share` of the shorter side: resized to size / share, then cut (timm's and DeiT's test view)."""
    height, width = model.image_size
    scale = max(height / image.height, width / image.width) / share
    if image.height * image.width * scale**2 > MAX_PIXELS:  # one row of pixels would need gigabytes
        image = _middle(image, model)
    sides = [max(side, int(length * scale + 1e-6)) for side, length in ((height, image.height), (width, image.width))]
    resized = image.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
    top, left = (round((side - cut) / 2) for side, cut in zip(sides, (height, width), strict=True))
    return resized.crop((left, top, left + width, top + height))


def _middle(image: Image.Image, model: ModelConfig) -> Image.Image:
    """The image without its far ends: at most 16 times as long as the model's, so that all of the test view is in it."""
    height, width = model.image_size
    longest = [16 * math.ceil(side) for side in (image.width * height / width, image.height * width / height)]
    top, left = (max(0, (side - most) // 2) for side, most in zip((image.height, image.width), longest, strict=True))
    return image.crop((left, top, image.width - left, image.height - top))


def evaluation_crop(config: DataConfig) -> Crop | None:
    """The crop for images that are not trained on: `data.center_crop`, or None."""
    return None if config.center_crop is None else partial(center_crop, share=config.center_crop)


def in_words(config: DataConfig, model: ModelConfig) -> str:
    """Describes the preprocessing of evaluation images up to normalisation, for people who do it in other programs."""
    height, width = model.image_size
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}.get(model.in_channels, f"{model.in_channels} channels")
    size = f"{width}x{height} pixels (width x height)"
    if config.center_crop is None:
        return f"{channels}, 8 bits; the whole image resized to {size}, bicubic with antialiasing, its proportions not kept"
    return (
        f"{channels}, 8 bits; resized, bicubic with antialiasing and its proportions kept, so that {config.center_crop:g} of "
        f"the shorter side is the size of the model, then the middle {size} cut out"
    )


def to_array(image: Image.Image, model: ModelConfig, crop: Crop | None = None) -> np.ndarray:
    """An image in the model's channels, at its size (bicubic where the size differs)."""
    height, width = model.image_size
    if crop is not None:
        image = crop(image, model)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, model.in_channels)
