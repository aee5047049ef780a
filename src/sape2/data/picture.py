"""An image file of any kind, as a model takes it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from sape2.config import ModelConfig


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, what was done to the file to get there, and the (height, width) that it had."""

    pixels: UInt8[Tensor, "channels height width"]
    notes: str
    size: tuple[int, int]


def read_picture(path: Path, model: ModelConfig) -> Picture:
    """Any image file in the channels and the size of the model, turned as its EXIF says, the first frame of several.

    Transparency is laid on white, 16 bits and floats are scaled to 8. Raises ValueError that names the file if it is no
    image, damaged, or so large that it may be an attack on memory.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one image file")
    if model.in_channels not in (1, 3):
        raise ValueError(f"images are read with 1 or 3 channels; the model takes {model.in_channels}")
    image, found = _decode(path, "RGB" if model.in_channels == 3 else "L")
    height, width = model.image_size
    size = image.size
    if size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image).reshape(height, width, model.in_channels)).permute(2, 0, 1)
    notes = f"{size[0]}x{size[1]} pixels ({found})"
    if size != (width, height):
        stretched = ", which changes its proportions" if size[0] * height != size[1] * width else ""
        notes += f", resized to the model's {width}x{height}{stretched}"
    return Picture(pixels.contiguous(), notes, (size[1], size[0]))


def _decode(path: Path, mode: str) -> tuple[Image.Image, str]:
    """The image in "RGB" or "L", and what was in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below what Pillow refuses
            with Image.open(path) as file:
                frames = getattr(file, "n_frames", 1)
                image = ImageOps.exif_transpose(file)
                found = f"{image.mode}, first of {frames} frames" if frames > 1 else image.mode
                return _eight_bits(image).convert(mode), found
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to be read safely ({error}); make it smaller first") from error
    except Exception as error:  # Pillow raises many kinds; all mean that the file cannot be decoded
        reason = _what_it_is(path) or str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def _what_it_is(path: Path) -> str:
    """In words, for files that are often taken for images."""
    with path.open("rb") as file:
        start = file.read(4096).lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in start:
        return "it is SVG, which describes shapes; save it as PNG first"
    return ""


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep pixels scaled to 0..255, transparent ones laid on white; everything else as it is."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
        return Image.fromarray((values * (255 / _white(image.mode, values.max()))).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _white(mode: str, largest: float) -> float:
    """The value that stands for white: 65535 for 16 bits; for wider pixels the usual one that holds the largest."""
    if mode.startswith("I;16"):
        return 65535.0
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if largest <= white), largest)
