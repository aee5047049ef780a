"""How much position there is in the tokens of a backbone: rows, a table, charts by layer, attention maps of one image.

The linear probe of `evaluation.position` and the equivariance errors of `evaluation.equivariance`, on any images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sape2.config import ModelConfig
from sape2.data.arrays import read_digits
from sape2.data.base import plain_name
from sape2.data.decoding import center_crop, to_array
from sape2.data.images import ImageData
from sape2.data.picture import take_picture
from sape2.data.pixels import to_8_bits
from sape2.data.walk import image_files
from sape2.evaluation.base import Row
from sape2.evaluation.equivariance import equivariance
from sape2.evaluation.layers import layers_of
from sape2.evaluation.position import position_content
from sape2.inspect.backbone import Backbone
from sape2.inspect.drawing import Drawing
from sape2.inspect.figures import as_one, named_marks
from sape2.inspect.look import of_head
from sape2.inspect.panels import Over, image_panel
from sape2.inspect.watched import Watched
from sape2.viz.curves import Notes, by_layer, plot_rows

LIMIT, MOVED = 200, 20  # images of the probe, and of the equivariance errors


# --- images ----------------------------------------------------------------------------------------------------------


def read_images(backbone: Backbone, folder: Path | None, limit: int = LIMIT) -> tuple[ImageData, list[str]]:
    """At most `limit` images at the size of the model, spread over those of the folder; and why some could not be read.

    Of a folder the images below it, resized and cut out in the middle; without one the digits that come with scikit-learn.
    """
    if folder is None:
        digits = read_digits(ModelConfig(image_size=(8, 8), in_channels=1, patch_size=8))["test"].images[:limit]
        images = (to_8_bits(Image.fromarray(digit[..., 0]), backbone.reading.in_channels) for digit in digits)
        arrays = (to_array(image, backbone.reading).copy() for image in images)
        return _as_data(backbone, [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]), []
    if not folder.is_dir():
        raise NotADirectoryError(f"--data must be a folder of images; got {plain_name(folder)}")
    files, pixels, unreadable = image_files(folder), [], []
    for at in torch.linspace(0, len(files) - 1, min(limit, len(files))).long().tolist():
        try:
            pixels.append(take_picture(files[at], backbone.reading, partial(center_crop, share=1.0)).pixels)
        except ValueError as error:
            unreadable.append(str(error))
    if len(pixels) < 2:
        raise ValueError(f"the probe needs at least 2 images; {plain_name(folder)} has {len(pixels)} that can be read")
    return _as_data(backbone, pixels), unreadable


def _as_data(backbone: Backbone, pixels: list[Tensor]) -> ImageData:
    labels = torch.zeros(len(pixels), dtype=torch.long)
    return ImageData(torch.stack(pixels), labels, ("image",), backbone.mean, backbone.std)


# --- rows ------------------------------------------------------------------------------------------------------------


def inspected(backbone: Backbone, data: ImageData, source: str) -> Iterator[Row]:
    """Rows position_r2 and position_error (`evaluation.position`), and *_equivariance_error, for every layer."""
    about = {"model": backbone.name, "data": source}
    for row in position_content("inspect", backbone.model, data, batch_size=16):
        yield row | about
    for row in equivariance(backbone.model, data[:MOVED]):
        yield row | about


LINES = {  # heading -> name and conditions of its rows
    "row": ("position_r2", {"axis": "y", "patches": "in place"}),
    "column": ("position_r2", {"axis": "x", "patches": "in place"}),
    "row, shuffled": ("position_r2", {"axis": "y", "patches": "shuffled"}),
    "column, shuffled": ("position_r2", {"axis": "x", "patches": "shuffled"}),
    "moved down": ("feature_equivariance_error", {"axis": "y"}),
    "moved right": ("feature_equivariance_error", {"axis": "x"}),
}


def by_line(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each heading; of the moves those by one patch."""
    nearest = min((row["shift_px"] for row in rows if "shift_px" in row), default=None)
    return {
        heading: [
            row
            for row in rows
            if row["name"] == name and conditions.items() <= row.items() and row.get("shift_px") in (None, nearest)
        ]
        for heading, (name, conditions) in LINES.items()
    }


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each layer, 0 for what enters the first block."""
    found: dict[int, dict[str, Any]] = {}
    for heading, some in by_line(rows).items():
        for row in some:
            found.setdefault(row["layer"], {"layer": row["layer"]})[heading] = row["value"]
    return [found[layer] for layer in sorted(found)]


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_layers(rows: list[Row], path: Path, about: str) -> Path:
    """R² of the probe, and the error when the image moves by one patch around the torus, by layer."""
    panels = [
        by_layer("position_r2", "R²", "linear probe of tokens for row and column"),
        by_layer("feature_equivariance_error", "relative error", "tokens of an image moved by one patch"),
    ]
    plot_rows(by_line(rows), panels, path, Notes(about=about))
    return path


def attention_figure(backbone: Backbone, data: ImageData, about: str) -> Drawing | None:
    """What the middle patch of the first image attends to in every layer, mean of heads; None if the model hides it."""
    if isinstance(backbone.model, Watched) and not backbone.model.has_attention:
        return None
    images, _ = next(data.batches(1))
    layers = list(layers_of(backbone.model, images))
    (height, width), pixels = layers[0].grid, data.images[0].numpy()
    y, x = height // 2, width // 2
    marks, _ = named_marks({"the middle": (y, x)})

    def panel(title: str, note: str, over: Over | None = None) -> Drawing:
        return image_panel(pixels, (height, width), marks, title, note, over=over)

    maps = [of_head(layer.attention[:, :, y * width + x].cpu(), None).reshape(height, width) for layer in layers]
    shown = [panel(f"Layer {at}", "attention weight", Over(values, "attention weight")) for at, values in enumerate(maps, 1)]
    return as_one(f"{backbone.name}: attention from patch a", about, [panel("Image", f"{height}x{width} patches")], shown)


def note_of_few(backbone: Backbone, data: ImageData) -> str | None:
    """A note where half of the images hold fewer than ten tokens for each feature, on which a probe fits noise."""
    tokens = next(layers_of(backbone.model, next(data.batches(1))[0])).entering
    wanted = -(-20 * tokens.shape[2] // tokens.shape[1])
    if len(data) >= wanted:
        return None
    return f"{len(data)} images are few for a probe of {tokens.shape[2]} features; {wanted} or more give steady numbers"
