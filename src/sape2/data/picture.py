"""An image file of any kind, as a model takes it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from sape2.config import ModelConfig
from sape2.data.decoding import to_array
from sape2.data.pixels import named, read_image


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, what was done to the file to get there, and the (height, width) that it had."""

    pixels: UInt8[Tensor, "channels height width"]
    notes: str
    size: tuple[int, int]


def read_picture(path: Path, model: ModelConfig) -> Picture:
    """Any image file in the channels and the size of the model, read by the rule of `data.pixels`.

    Raises ValueError that names the file if it is no image, damaged, or so large that it may be an attack on memory.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one image file")
    height, width = model.image_size
    with named(str(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused
        image = read_image(path, model.in_channels)
        size, pixels = image.size, to_array(image, model)
        notes = f"{size[0]}x{size[1]} pixels ({_stored(path)})"
    if size != (width, height):
        stretched = ", which changes its proportions" if size[0] * height != size[1] * width else ""
        notes += f", resized to the model's {width}x{height}{stretched}"
    return Picture(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), notes, (size[1], size[0]))


def _stored(path: Path) -> str:
    """The kind of pixels in the file, and how many frames if there are several."""
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        return f"{image.mode}, first of {frames} frames" if frames > 1 else image.mode
