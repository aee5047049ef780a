"""Groups the images of a batch by size, and augments training images.

Images of a batch are padded to the largest of them, and the padding is seen by attention and counted by encodings that
count. So images with the same padded size are batched together: always in evaluation, and preferably in training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from sape2.config.detection import DetectionConfig, ImagesConfig
from sape2.data.augment import derive_seed, epoch_order, leave_signals_to_the_main_process
from sape2.detection.coco import CocoImages
from sape2.encodings.grid import Grid

Sample = tuple[Tensor, dict[str, Any]]


def padded_size(size: Grid, image_size: Grid, divisor: int) -> Grid:
    """(height, width) that the model sees of an image: fitted into `image_size` (either way up), sides then rounded up.

    Raises ValueError if a side is rounded to no pixel.
    """
    height, width = (math.ceil(side / divisor) * divisor for side in fitted_size(size, image_size))
    return height, width


def fitted_size(size: Grid, image_size: Grid) -> Grid:
    """(height, width) to which torchvision's detectors resize an image. Raises ValueError if a side is rounded to no pixel."""
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]}x{size[1]} has no pixels")
    scale = min(min(image_size) / min(size), max(image_size) / max(size))
    return _some_pixels(size, scale, f"fitted into {image_size[0]}x{image_size[1]}")


def check_jitter(size: Grid, image_size: Grid, low: float) -> None:
    """Raises ValueError if scale jitter by the factor `low` leaves no pixel of a side."""
    scale = min(image_size[0] / size[0], image_size[1] / size[1]) * low * (1 - 1e-6)  # it is computed in float32
    _some_pixels(size, scale, f"scaled by {low:g} (images.scale_jitter) of what fits into {image_size[0]}x{image_size[1]}")


def _some_pixels(size: Grid, scale: float, how: str) -> Grid:
    height, width = (int(side * scale) for side in size)
    if not (height and width):
        raise ValueError(
            f"{size[0]}x{size[1]} pixels are too thin: {how}, a side has {min(size) * scale:.2f} pixels; cut the image into "
            "parts, or leave it out"
        )
    return height, width


def one_size_batches(sizes: list[Grid], batch_size: int) -> list[list[int]]:
    """All numbers, in batches of one size each; the last of each size may be smaller."""
    groups = _groups(sizes, range(len(sizes)))
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def epoch_batches(sizes: list[Grid], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch in random order: of one size as far as these fill batches, the rest by aspect ratio.

    Every epoch has len(sizes) // batch_size batches; what is left over is dropped, others in every epoch.
    Raises ValueError if there are fewer images than one batch.
    """
    if len(sizes) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs that many training images; there are {len(sizes)}")
    groups = _groups(sizes, epoch_order(len(sizes), seed, epoch).tolist())
    batches, rest = [], []
    for group in groups.values():
        whole = len(group) - len(group) % batch_size
        batches += [group[i : i + batch_size] for i in range(0, whole, batch_size)]
        rest += group[whole:]
    rest = rest[len(rest) % batch_size :]
    rest.sort(key=lambda index: sizes[index][0] / sizes[index][1])
    batches += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches", epoch))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _groups(sizes: list[Grid], order: Any) -> dict[Grid, list[int]]:
    groups: dict[Grid, list[int]] = defaultdict(list)
    for index in order:
        groups[sizes[index]].append(index)
    return groups


# --- augmentation ----------------------------------------------------------------------------------------------------


def make_transform(images: ImagesConfig, image_size: Grid) -> v2.Transform:
    """Flip and scale jitter of an image with its boxes and masks; boxes that are cropped away go, with all they had."""
    steps: list[Any] = [v2.RandomHorizontalFlip()] if images.flip else []
    if images.scale_jitter:
        low, high = images.scale_jitter
        width_height = (image_size[1], image_size[0])  # torchvision 0.29 reads target_size[1] as the height
        steps.append(v2.ScaleJitter(width_height, (low, high)))
        steps += [v2.RandomCrop(image_size, pad_if_needed=True), tighten]
    steps.append(v2.ClampBoundingBoxes())
    steps.append(
        v2.SanitizeBoundingBoxes(labels_getter=lambda sample: [sample[1][key] for key in ("labels", "iscrowd", "area")])
    )
    return v2.Compose(steps)


def tighten(image: Tensor, target: dict[str, Any]) -> Sample:
    """Shrinks boxes to what a crop left of each mask, and removes objects of which nothing is left."""
    if "masks" not in target:
        return image, target
    left = target["masks"].flatten(1).any(1).bool()
    kept = select(target, left)
    boxes = masks_to_boxes(kept["masks"].as_subclass(Tensor)) + torch.tensor([0, 0, 1, 1])  # the far edges of the last pixels
    return image, kept | {"boxes": tv_tensors.wrap(boxes, like=kept["boxes"])}


def select(target: dict[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Some of the objects of an image."""
    kept = {key: value[chosen] if isinstance(value, Tensor) else value for key, value in target.items()}
    for key in ("boxes", "masks"):
        if key in target:  # indexing gives a plain tensor
            kept[key] = tv_tensors.wrap(kept[key], like=target[key])
    return kept


class TrainBatches:
    """All batches of a training, epoch after epoch; sides of images are padded to multiples of `divisor`."""

    def __init__(self, images: CocoImages, config: DetectionConfig, divisor: int) -> None:
        self.images, self.config = images, config
        self.sizes = [padded_size(size, config.model.image_size, divisor) for size in images.sizes]
        self.transform = make_transform(config.images, config.model.image_size)
        self.steps_per_epoch = len(self._of_epoch(0))
        self.total_steps = config.training.epochs * self.steps_per_epoch

    def batches(self, start: int) -> Iterator[list[Sample]]:
        """From step `start` to the end, prepared ahead by worker processes."""
        first, skipped = divmod(start, self.steps_per_epoch)
        for epoch in range(first, self.config.training.epochs):
            yield from DataLoader(
                TrainView(self.images, self.transform, self.config.seed, epoch),
                batch_sampler=self._of_epoch(epoch)[skipped if epoch == first else 0 :],
                collate_fn=list,
                num_workers=self.config.training.workers,
                worker_init_fn=leave_signals_to_the_main_process,
            )

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        return epoch_batches(self.sizes, self.config.training.batch_size, self.config.seed, epoch)


class TrainView(Dataset):
    """The images of one epoch as a step sees them: pixels in [0, 1], no crowds, augmented by (seed, epoch, number)."""

    def __init__(self, images: CocoImages, transform: v2.Transform, seed: int, epoch: int) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image, target = self.images[index]
        target = select(target, target["iscrowd"] == 0)  # a crowd is one box around many
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augment", self.epoch, index))
            image, target = self.transform(image, target)
        return to_unit(image), target


def to_unit(image: Tensor) -> Tensor:
    """uint8 pixels as a plain tensor of floats in [0, 1]."""
    return image.as_subclass(Tensor) / 255
