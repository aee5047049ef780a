"""What the tests of measurements share: images held in memory, models whose answers are known by construction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sape2 import create_model
from sape2.data import ImageData
from sape2.evaluation.base import Row
from sape2.models.vit import ViT

SMALL = {"image_size": 8, "patch_size": 2, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2, "pool": "mean"}


class Images:
    """Images and labels as a measurement takes them, in the dtype they have."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, num_classes: int = 5) -> None:
        self.images = images
        self.labels = torch.arange(len(images)) % num_classes if labels is None else labels
        self.classes = tuple(str(label) for label in range(num_classes))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


def random_images(count: int, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float64) -> Images:
    return Images(torch.randn(count, 3, height, width, dtype=dtype))


def labelled_images(number: int, size: int = 16) -> ImageData:
    """Random pixels of 8 bits with labels of five classes in turn."""
    pixels = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
    return ImageData(pixels, torch.arange(number) % 5, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)


def random_vit(encoding: str, dtype: torch.dtype = torch.float64, **changes: Any) -> ViT:
    """A small model with random parameters, tables that start at zero included, whose predictions vary."""
    model = create_model("vit_nano", encoding=encoding, **(SMALL | changes)).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "encoding" in name:
            parameter.normal_(std=0.5)
    return model


class CircularConvolution(nn.Module):
    """Convolutions around the torus, then the largest value of all places: invariant to every whole shift by construction."""

    patch_size = 1

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(8, num_classes, bias=False)
        for weight in (self.first.weight, self.second.weight, self.head.weight):
            nn.init.normal_(weight)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images).relu()).amax((-1, -2)))


class PixelReadout(nn.Module):
    """Logits that are linear in the pixels, each with weights of its own: no place is like another, no other size fits."""

    patch_size = 2

    def __init__(self, height: int = 8, width: int = 8, num_classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * height * width, num_classes, bias=False, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class Constant(nn.Module):
    """Says class 1 whatever it sees."""

    patch_size = 2

    def forward(self, images: Tensor) -> Tensor:
        return images.new_tensor([0.0, 1.0, 0.0]).expand(len(images), 3) + 0 * images.mean((1, 2, 3))[:, None]


class CentrePixel(nn.Module):
    """Logits are the channels of the pixel in the middle: blind to the canvas, not to scale or shifts."""

    patch_size = 2

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, images.shape[-2] // 2, images.shape[-1] // 2]


def select(rows: list[Row], name: str, **conditions: Any) -> list[Row]:
    """The rows of a name that were measured at the given conditions."""
    return [row for row in rows if row["name"] == name and all(row.get(key) == value for key, value in conditions.items())]


def values(rows: list[Row], name: str, **conditions: Any) -> list[float]:
    """Their values; raises AssertionError if there is none, so that nothing is true of nothing."""
    found = [row["value"] for row in select(rows, name, **conditions)]
    assert found, f"no row {name} at {conditions}"
    return found
