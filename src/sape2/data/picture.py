"""Loads an image file as input of a model, and compares it with the images that the model was trained on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from sape2.config import DataConfig, ModelConfig
from sape2.data.base import plain_name
from sape2.data.decoding import Crop, to_array
from sape2.data.pixels import is_grey, named, opened, to_8_bits, upright_size

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, the size that it had, and the share of its pixels whose colour the model does not see.

    `notes` say what was done to the file to get there.
    """

    pixels: UInt8[Tensor, "channels height width"]
    size: Size
    lost_colour: float
    notes: str = ""


def read_picture(path: Path, model: ModelConfig, crop: Crop | None = None) -> Picture:
    """Any image file in the channels and the size of the model, read by the rule of `data.pixels`, with notes.

    Raises ValueError that names the file if it is no image, damaged, or so large that it may be an attack on memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused
        picture = take_picture(path, model, crop)
        with named(plain_name(path)):
            stored = _stored(path)
    (height, width), (y, x) = model.image_size, picture.size
    notes = f"{x}x{y} pixels ({stored})"
    if crop is not None:
        notes += f", its middle cut out at the model's {width}x{height}"
    elif (y, x) != (height, width):
        stretched = ", which changes its proportions" if x * height != y * width else ""
        notes += f", resized to the model's {width}x{height}{stretched}"
    return replace(picture, notes=notes)


def take_picture(path: Path, model: ModelConfig, crop: Crop | None = None) -> Picture:
    """The same without notes, with no word of Pillow's silenced: that is for whoever has threads. Raises ValueError only."""
    with named(plain_name(path)):
        if not path.is_file():
            what = "it is a folder" if path.is_dir() else "it is no ordinary file"
            raise ValueError(what if path.exists() else "there is no such file")
        with opened(path) as image:
            size = upright_size(image)
            taken = to_8_bits(image, model.in_channels)
            lost = 0.0 if model.in_channels == 3 or is_grey(image) else _share_of_colour(to_8_bits(image, 3))
        pixels = to_array(taken, model, crop)
    return Picture(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), size, lost)


def _stored(path: Path) -> str:
    """The kind of pixels in the file, and how many frames if there are several."""
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        return f"{image.mode}, first of {frames} frames" if frames > 1 else image.mode


def _share_of_colour(image: Image.Image) -> float:
    """The share of pixels that are not grey by more than `COLOUR` of 255; of a large image, on a grid of at most 256x256."""
    values = np.asarray(image)[:: max(1, image.height // 256), :: max(1, image.width // 256)]
    return float((values.max(-1).astype(int) - values.min(-1) > COLOUR).mean())


# --- unlike the training images --------------------------------------------------------------------------------------

COLOUR = 24  # of 255 between the channels of a pixel; what JPEG makes of a grey image stays below
FEW = 0.01  # of the pixels
SMALLER, LARGER = 4.0, 16.0  # times the smallest, the largest of the training images, in the mean of both sides
STRETCHED = 2.0  # width to height, against the nearest of the training images
FAR = 1.75  # of a channel's mean, in standard deviations of the training pixels
FLAT = 0.25  # of every channel's deviation, against that of the training pixels


@dataclass(frozen=True)
class Unlike:
    """One thing in which an image is unlike the training images: a number, its limit, and a sentence for people."""

    name: str
    value: float
    unit: str
    limit: str
    kind: str
    sentence: str


def unlike(picture: Picture, data: DataConfig, trained: list[Size]) -> list[Unlike]:
    """In what a picture is far from images whose files have the sizes `trained`, and pixels the run's mean and std."""
    return [*_colour(picture), *_size(picture, trained), *_brightness(picture, data)]


def _colour(picture: Picture) -> Iterator[Unlike]:
    share = picture.lost_colour
    if share > FEW:
        sentence = f"{share:.0%} of its pixels are coloured, and this model sees grey only"
        yield Unlike("colour", share, "fraction", f"at most {FEW:.0%} of the pixels", "in colour", sentence)


def _size(picture: Picture, trained: list[Size]) -> Iterator[Unlike]:
    height, width = picture.size
    (least, smallest), (most, largest) = (pick((math.sqrt(y * x), (y, x)) for y, x in trained) for pick in (min, max))
    side, here = math.sqrt(height * width), f"it has {width}x{height} pixels, the training images"
    limit = f"1/{SMALLER:g} of the smallest to {LARGER:g} times the largest training image"
    if (times := side / most) > LARGER:
        sentence = f"{here} at most {largest[1]}x{largest[0]}: {times:.0f} times larger"
        yield Unlike("size", times, "times", limit, "far larger", sentence)
    if (times := side / least) < 1 / SMALLER:
        sentence = f"{here} at least {smallest[1]}x{smallest[0]}: {1 / times:.0f} times smaller"
        yield Unlike("size", times, "times", limit, "far smaller", sentence)
    stretch, near = min((max(ratio, 1 / ratio), (y, x)) for y, x in trained for ratio in [width * y / (height * x)])
    if stretch > STRETCHED:
        sentence = f"{here} {near[1]}x{near[0]} and such: its proportions differ {stretch:.1f} times"
        limit = f"{STRETCHED:g} times from the nearest training image"
        yield Unlike("proportions", stretch, "times", limit, "of other proportions", sentence)


def _brightness(picture: Picture, data: DataConfig) -> Iterator[Unlike]:
    pixels = picture.pixels.double().flatten(1) / 255
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (data.mean, data.std))
    means, stds = (pixels.mean(1) - mean) / std, pixels.std(1, correction=0) / std
    far = means[means.abs().argmax()].item()
    if abs(far) > FAR:
        kind, limit = ("bright" if far > 0 else "dark"), f"-{FAR:g} to {FAR:g} standard deviations"
        sentence = f"it is far {kind}er than the training images: its mean is {abs(far):.1f} standard deviations away"
        yield Unlike("brightness", far, "standard deviations", limit, f"far {kind}er", sentence)
    if (widest := stds.max().item()) < FLAT:
        sentence = f"it is nearly flat: its pixels vary {widest:.2f} times as much as those of the training images"
        yield Unlike("contrast", widest, "times", f"at least {FLAT:g} times the training images", "nearly flat", sentence)
