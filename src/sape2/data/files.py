"""Images that stay in their files and are decoded on demand.

In a labelled set an image that cannot be read is skipped: the next one of its class takes its place. So labels, sizes and
the order of a run do not depend on which images are damaged, nor on when the damage is found. Files without a class have
no replacement: such an image is left out and named.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import get_worker_info

from sape2.config import DataConfig, ModelConfig
from sape2.data.base import Source, UnreadableImages, encoded
from sape2.data.decoding import Crop, decode, evaluation_crop, random_crop
from sape2.data.images import ImageData, normalize
from sape2.data.picture import Picture, take_picture

MAX_THREADS = 16
Taken = TypeVar("Taken")


class ImageFiles:
    """The images `rows` of a source as a model takes them, with labels known before any image is opened."""

    def __init__(
        self,
        source: Source,
        labels: Int[Tensor, " images"],
        classes: tuple[str, ...],
        config: DataConfig,
        model: ModelConfig,
        unreadable: UnreadableImages,
        fingerprint: dict[str, Any] | None,
    ) -> None:
        self.source, self.labels, self.classes, self.model, self.unreadable = source, labels, classes, model, unreadable
        self.rows = torch.arange(len(labels))
        self.mean, self.std = config.mean, config.std
        self.center = evaluation_crop(config)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> ImageFiles:
        part = copy.copy(self)
        part.rows, part.labels = self.rows[index], self.labels[index]
        return part

    def name(self, place: int) -> str:
        return self.source.name(int(self.rows[place]))

    def encoded(self) -> Iterator[bytes]:
        """The bytes of each file, in order; none of what cannot be read."""
        return (encoded(self.source, row) for row in self.rows.tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return (self.model.in_channels, *self.model.image_size)

    def kept_on(self, device: torch.device) -> ImageFiles:
        """Returns the images unchanged, since they stay in their files."""
        return self

    @property
    def images(self) -> Tensor:
        """All of them, decoded now: for a few."""
        return self.take(torch.arange(len(self)))[0]

    def take(self, index: Tensor, crop_area: float | None = None, seeds: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """uint8 images and labels at `index`; with `crop_area`, of each a random box drawn with its seed."""
        crops: list[Crop | None] = [self.center] * len(index)
        if crop_area is not None:
            crops = [partial(random_crop, area=crop_area, seed=seed) for seed in seeds]
        images = _in_threads(self.pixels, index.tolist(), crops)
        if not images:
            return torch.empty(0, *self.shape, dtype=torch.uint8), self.labels[index]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), self.labels[index]

    def pixels(self, place: int, crop: Crop | None) -> np.ndarray:
        """The image at `place`, or the next readable one of its class."""
        for candidate in self._stand_ins(place):
            row = int(self.rows[candidate])
            name = self.source.name(row)
            if name in self.unreadable.reasons:
                continue
            try:
                return decode(self.source.read(row), self.model, name, crop)
            except ValueError as error:
                self.unreadable.add(name, str(error))
        same = self.rows[self.labels == self.labels[place]].tolist()
        reason = self.unreadable.reasons[self.source.name(same[0])]
        raise ValueError(
            f"{self.source.where}: no image of the class {self.classes[int(self.labels[place])]!r} in one of the splits can be "
            f"read ({len(same)} tried): {reason}; put a good file in its place, or remove it"
        )

    def _stand_ins(self, place: int) -> Iterator[int]:
        yield place
        members = (self.labels == self.labels[place]).nonzero().squeeze(1)
        own = int((members == place).nonzero())
        yield from members.roll(-own)[1:].tolist()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and their labels, in order; the next batch is decoded while one is used."""
        for images, labels in _ahead(self.take, torch.arange(len(self)).split(batch_size)):
            yield normalize(images, self.mean, self.std), labels

    def decoded(self, batch_size: int = 1000) -> ImageData:
        """The same images in memory."""
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for part in torch.arange(len(self)).split(batch_size):
            images[part] = self.take(part)[0]
        return ImageData(images, self.labels, self.classes, self.mean, self.std, self.fingerprint)


class LooseFiles:
    """Image files without labels, as a model takes test images. What cannot be read is left out: `unreadable` says why.

    `look` sees every image that could be read (in a thread of its own), `watch` how many files were tried so far.
    """

    classes = ()

    def __init__(
        self,
        files: Sequence[Path],
        config: DataConfig,
        model: ModelConfig,
        look: Callable[[Path, Picture], None],
        watch: Callable[[int], None],
    ) -> None:
        self.files, self.config, self.model, self.look, self.watch = files, config, model, look, watch
        self.labels = torch.full((len(files),), -1)
        self.unreadable: dict[Path, str] = {}

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and -1 for each, in order; the next batch is decoded while one is used."""
        tried = 0
        for part in _ahead(
            partial(_in_threads, self._pixels), [self.files[i : i + batch_size] for i in range(0, len(self.files), batch_size)]
        ):
            tried += len(part)
            if images := [image for image in part if image is not None]:
                yield normalize(torch.stack(images), self.config.mean, self.config.std), self.labels[: len(images)]
            self.watch(tried)

    def _pixels(self, file: Path) -> Tensor | None:
        try:
            picture = take_picture(file, self.model, evaluation_crop(self.config))
        except ValueError as error:
            self.unreadable[file] = str(error)
            return None
        self.look(file, picture)
        return picture.pixels


@dataclass(frozen=True)
class Splits:
    train: ImageData | ImageFiles
    validation: ImageData | ImageFiles
    test: ImageData | ImageFiles


def _ahead(take: Callable[[Any], Taken], parts: Sequence[Any]) -> Iterator[Taken]:
    """Yields `take` of each part; the next part is taken while the current one is used."""
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(take, parts[0])
        for following in (*parts[1:], None):
            taken = waiting.result()
            if following is not None:
                waiting = ahead.submit(take, following)
            yield taken


def _in_threads(function: Callable[..., Taken], *parts: Sequence[Any]) -> list[Taken]:
    """`function` of each, in threads, since Pillow works outside Python's lock; a data worker has one."""
    number = 1 if get_worker_info() else threads()
    if number == 1:
        return list(map(function, *parts))
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, *parts))  # cancels what waits where one fails


def threads() -> int:
    """One for each processor that this process may use, at most MAX_THREADS."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
