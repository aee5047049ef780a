"""Augmentation of normalised batches on their device: random erasing, mixup, cutmix, soft targets. timm draws on the CPU.

The draws come from the global generators of torch, numpy and random, which the training loop seeds before every step. So a
batch is the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sape2.config import AugmentConfig
from sape2.data.policies import sent

Area = tuple[int, slice, slice, Tensor]  # image, rows, columns, the pixels for them (C, height, width)


class BatchMixer:
    """Random erasing, mixup and cutmix of a batch, and its soft targets.

    Given the share of a process (see `share_of`) and the size of the whole batch, it draws for the whole batch.
    """

    def __init__(self, config: AugmentConfig, label_smoothing: float, num_classes: int) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.erase = RandomErasing(config.erase, mode="pixel", max_area=0.4, device="cpu") if config.erase else None
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = None
        if config.mixes:
            options = {"prob": config.mix_probability, "label_smoothing": label_smoothing, "num_classes": num_classes}
            self.mix = Mixup(config.mixup, config.cutmix, **options)

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        places: Int[Tensor, " batch"] | None = None,
        size: int | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        """Changes `images` in place."""
        if self.erase is not None:
            if places is None or size is None:
                places, size = torch.arange(len(images)), len(images)
            erase_areas(self.erase, images, places, size)
        if self.mix is not None:
            return self.mix(images, labels)
        targets = torch.full((len(labels), self.num_classes), self.label_smoothing / self.num_classes, device=labels.device)
        return images, targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + self.label_smoothing / self.num_classes)


def erase_areas(erase: Callable[[Any], Any], images: Tensor, places: Int[Tensor, " batch"], size: int) -> None:
    """In place. For an image of another process it is drawn as well, and nothing is done."""
    blank = _Blank(images)
    for place in range(size):
        blank.place = place
        erase(blank)
    number_at = {place: number for number, place in enumerate(places.tolist())}
    areas: list[Area] = [(number_at[area[0]], *area[1:]) for area in blank.areas if area[0] in number_at]
    if areas:
        write(images, areas)


class _Blank:
    """A stand-in for the image at `place` in timm's RandomErasing, which records what it would write, and where."""

    def __init__(self, images: Tensor) -> None:
        self.place, self.shape, self.dtype = 0, images.shape[1:], images.dtype
        self.areas: list[Area] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: Tensor) -> None:
        self.areas.append((self.place, where[1], where[2], pixels))


def write(images: Tensor, areas: list[Area]) -> None:
    """In one call on the device of the images, which costs less on an accelerator than one for each area."""
    boxes = [(image, rows.start, columns.start, *pixels.shape[1:]) for image, rows, columns, pixels in areas]
    index = sent(_pixels_of(torch.tensor(boxes)), images.device)
    values = sent(torch.cat([pixels.flatten(1) for *_, pixels in areas], 1), images.device)  # (C, pixels)
    images.permute(0, 2, 3, 1)[index[0], index[1], index[2]] = values.T


def _pixels_of(boxes: Int[Tensor, "areas 5"]) -> Int[Tensor, "3 pixels"]:
    """Image, row and column of every pixel of (image, top, left, height, width), row by row."""
    image, top, left, height, width = boxes.T
    count = height * width
    area = torch.arange(len(boxes)).repeat_interleave(count)
    place = torch.arange(len(area)) - (count.cumsum(0) - count)[area]
    return torch.stack([image[area], top[area] + place // width[area], left[area] + place % width[area]])
