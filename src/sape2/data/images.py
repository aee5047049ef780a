"""Labelled images in memory, their normalisation, and splits drawn with a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sape2.data.base import digest, log
from sape2.progress import one_line


@dataclass(frozen=True)
class ImageData:
    """Decoded images with their labels, and how they are normalised for a model."""

    images: UInt8[Tensor, "images channels height width"]
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: dict[str, Any] | None = field(default=None, compare=False)  # of the whole source, see data/fingerprint.py

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> ImageData:
        return replace(self, images=self.images[index], labels=self.labels[index])

    def name(self, place: int) -> str:
        return f"image {place}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return tuple(self.images.shape[1:])

    def kept_on(self, device: torch.device) -> ImageData:
        """The images on a CUDA device if they take at most a quarter of its free memory; else unchanged."""
        if device.type != "cuda" or self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor, crop_area: float | None = None, seeds: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """The images and labels at `index`. Raises ValueError for a crop, which needs the files."""
        if crop_area is not None:
            raise ValueError(
                "augment.crop_area cuts boxes from image files as they are decoded, but these images are decoded already; "
                "use --set data.in_memory=false with image files, or --set augment.crop_area=None"
            )
        return self.images[index], self.labels[index]

    def batches(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Tensor]]:
        """Normalised images and their labels, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield normalize(images, self.mean, self.std), labels


def normalize(
    images: UInt8[Tensor, "batch channels height width"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "batch channels height width"]:
    """(x / 255 - mean) / std per channel, in float32."""
    mean_, std_ = (_of_channels(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - mean_) / std_


@cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "channels 1 1"]:
    """Kept, since a device is waited for when it is sent something."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


# --- splits ----------------------------------------------------------------------------------------------------------


def tell_twins(
    what: str,
    splits: Mapping[str, Iterable[bytes]],
    name: Callable[[str, int], str],
    class_of: Callable[[str, int], str],
) -> None:
    """Warns where a later split has images with the pixels, or bytes, of an earlier one, as the test set of what is trained on,
    and where one image is in two classes.

    Images of no bytes, which cannot be read, are like no other.
    """
    known: dict[str, tuple[str, int]] = {}
    seen: dict[str, tuple[str, int]] = {}
    unlike: list[tuple[tuple[str, int], tuple[str, int]]] = []
    for split, images in splits.items():
        digests = [digest(data) if data else "" for data in images]
        own = {key: (split, place) for place, key in enumerate(digests) if key}
        both = [key for key in own if key in known]
        if both:
            first = one_line(f"{name(*own[both[0]])} is {name(*known[both[0]])}")
            count = f"{len(both)} of {len(digests)} images"
            log.warning("%s: %s have the %s of an image that is trained or validated on: %s", split, count, what, first)
        known = own | known
        pairs = [(seen.setdefault(key, (split, place)), (split, place)) for place, key in enumerate(digests) if key]
        unlike += [(one, two) for one, two in pairs if one != two and class_of(*one) != class_of(*two)]
    if unlike:
        both = " is ".join(f"{name(*each)} ({class_of(*each)})" for each in unlike[0][::-1])
        log.warning("%d images have the %s of an image of another class: %s", len(unlike), what, one_line(both))


def draw_by_class(labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices of `size` images drawn by class, ascending; a smaller draw with the same seed is part of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)  # of an image in a random order of its class, from 0 to 1
    for members in _members(labels):
        place[members[torch.randperm(len(members), generator=generator)]] = (
            torch.arange(len(members), dtype=torch.float64) + 0.5
        ) / len(members)
    return place.argsort(stable=True)[:size].sort().values


def class_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, part): `part` holds the `size_of_part` of every class, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    rest, part = [], []
    for members in _members(labels):
        members = members[torch.randperm(len(members), generator=generator)]
        size = size_of_part(len(members), fraction)
        part.append(members[:size])
        rest.append(members[size:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


def size_of_part(images: int, fraction: float) -> int:
    """That fraction of the images of a class, at least one; of two and more at least one is left."""
    return max(1, min(round(fraction * images), images - 1))


def _members(labels: Tensor) -> Sequence[Tensor]:
    """The indices of each class, ascending; one sort, so that many classes cost no more than few."""
    return labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
