"""Fits the recipe `images` to a folder of images. The same folder always gives the same settings.

Image size: the one of 32, 64, 96, 224 that is nearest, by ratio, to the median of the shorter sides. Channels: one if every
image looked at is grey, else three. Mean and std: over the pixels of the training images looked at, at that size. Test set:
where there is none, a fifth of each class. Batch: the largest power of two from 2 to 128 with 8 updates an epoch.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sape2.config import DataConfig, ModelConfig, RunConfig
from sape2.data import allowed_unreadable, data_folder, find_layout, folder, keep_in_memory, open_sources
from sape2.data.base import Source, Subset, plain_name
from sape2.data.decoding import decode, file_in
from sape2.data.images import size_of_part
from sape2.data.labels import first_of
from sape2.data.pixels import is_grey, named, opened, upright_size
from sape2.data.splits import files_by_split
from sape2.data.walk import Files, walk

PATCHES = {32: 4, 64: 8, 96: 8, 224: 16}  # image size -> patch: grids of 8, 8, 12 and 14
TEST_FRACTION = 0.2
ENDINGS = {"parquet": ".parquet", "webdataset": ".tar"}
LOOKED_AT = 256  # images, drawn with data.split_seed
UPDATES = 8  # an epoch, at least, where the images allow it
FEWEST_STD = 0.01  # for images that are all of one colour


def fit(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The recipe for the images in `data.source`, and what was filled in, in words.

    Raises ValueError or OSError in one line for a folder that is not there, has no images, or one class only.
    """
    data = find_data(config.data)
    sources: Any = open_sources(data, config.model)
    train = sources["train"]
    classes = _check_classes(train, sources["test"])
    looked = _sample(train, data.split_seed)
    sizes, grey = _look(train, looked)
    side = statistics.median(map(min, sizes))
    size = min(PATCHES, key=lambda known: abs(math.log(known / side)))
    about = {"image_size": (size, size), "patch_size": PATCHES[size], "in_channels": 1 if grey else 3}
    model = replace(config.model, **about, num_classes=len(classes))
    mean, std = _statistics(train, looked, model)
    bad = max(1, len(train.labels) // 20, allowed_unreadable(len(train.labels), data))
    data = replace(data, mean=mean, std=std, max_bad_samples=bad)
    rest = len(train.labels) - sum(size_of_part(n, data.validation_fraction) for n in Counter(train.labels).values())
    batch = 2 ** min(7, max(1, int(math.log2(max(2, rest // UPDATES)))))
    workers = 0 if keep_in_memory(len(train.labels) + len(sources["test"].labels), data, model) else 4
    training = replace(config.train, batch_size=batch, workers=workers)
    augment = replace(config.augment, crop_padding=model.image_size[0] // 8)
    fitted = replace(config, model=model, data=data, augment=augment, train=training)
    return fitted, _in_words(fitted, sources, classes, sizes, rest)


def find_data(data: DataConfig) -> DataConfig:
    """Finds the images, their layout, and whether a test set must be split off; the name is that of the folder."""
    source = data.source
    if source is None:
        raise ValueError("images needs --data: a folder with a folder of images for each class, DIR/CLASS/*.jpg")
    path = data_folder(source)
    if path is None:
        raise FileNotFoundError(f"--data {plain_name(source)}: there is no such folder")
    name, files = plain_name(path.resolve().name) or "images", walk(path)
    layout = data.layout or find_layout(files, data)
    fraction = TEST_FRACTION if data.test_fraction is None and _lacks_test(files, layout) else data.test_fraction
    return replace(data, name=name, layout=layout, test_fraction=fraction)


def _lacks_test(files: Files, layout: str) -> bool:
    """True if there are images to train on, and no others."""
    if layout == "folder":
        return {*folder.split_folders(files)} <= {"train"}
    ending = ENDINGS[layout]
    return bool(files.ending(ending)) and {*files_by_split(files, ending, to_draw=True)} == {"train"}


def _check_classes(train: Source, test: Source) -> tuple[str, ...]:
    """Names of the classes. Raises ValueError if there are too few, or a class has too few images to be split."""
    counts, own = Counter(train.labels), not isinstance(test, Subset)
    known = counts if own else counts + Counter(test.labels)  # a drawn test set may have taken the one image of a class
    classes = tuple(train.classes) or tuple(map(str, range(min(max(known, default=-1) + 1, known.total()))))
    if not known:
        raise ValueError(f"{train.where} holds no images")
    if len(classes) < 2:
        raise ValueError(f"{train.where} has the one class {classes[0]!r}; at least two are needed, a folder for each")
    for label, name in enumerate(classes):
        if counts[label] < 2:
            n = known[label]
            sets, least = ("training and validation", 2) if own else ("training, validation and test", 3)
            raise ValueError(
                f"{train.where}: the class {name!r} has {n} image{'s' * (n != 1)}; {sets} need one each, at least {least}"
            )
    return classes


def _sample(source: Source, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(source.labels), generator=generator)[:LOOKED_AT].sort().values.tolist()


def _look(source: Source, looked: list[int]) -> tuple[list[tuple[int, int]], bool]:
    """(height, width) of each by its header, and whether all are grey. Raises ValueError if none of them is an image."""
    sizes, grey, reason = [], True, ""
    for index in looked:
        try:
            name = source.name(index)
            with named(name), opened(file_in(source.read(index), name)) as image:
                sizes.append(upright_size(image))
                grey = grey and is_grey(image)
        except ValueError as error:
            reason = reason or str(error)
    if not sizes:
        raise ValueError(f"{source.where}: none of the {len(looked)} images looked at can be read; the first: {reason}")
    return sizes, grey


def _statistics(source: Source, looked: list[int], model: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of every channel in 0..1, to four digits."""
    total, squares, pixels = np.zeros(model.in_channels), np.zeros(model.in_channels), 0
    for index in looked:
        try:
            image = decode(source.read(index), model, source.name(index)).astype(np.float64) / 255
        except ValueError:
            continue
        total += image.sum((0, 1))
        squares += (image**2).sum((0, 1))
        pixels += image.shape[0] * image.shape[1]
    if not pixels:
        raise ValueError(f"{source.where}: none of the {len(looked)} images looked at can be decoded")
    mean = total / pixels
    std = np.sqrt((squares / pixels - mean**2).clip(0)).clip(FEWEST_STD)
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def _in_words(config: RunConfig, sources: Any, classes: tuple[str, ...], sizes: list[tuple[int, int]], rest: int) -> list[str]:
    data, model, n = config.data, config.model, len(sources["train"].labels)
    height, width = (round(statistics.median(sides)) for sides in zip(*sizes, strict=True))
    drawn = data.test_fraction is not None
    names = first_of(classes, 8)
    kind = "grey" if model.in_channels == 1 else "colour"
    where = f"{data.test_fraction:.0%} of each class, drawn with seed {data.split_seed}" if drawn else sources["test"].where
    return [
        f"{data.name}: {len(classes)} classes ({names}), {kind}, median image {width}x{height} of {len(sizes)} looked at",
        f"{rest} images to train, {n - rest} to validate "
        f"({data.validation_fraction:.0%} of each class, seed {data.split_seed}) "
        f"and {len(sources['test'].labels)} to test ({where})",
    ]


def settings_in_words(config: RunConfig) -> str:
    """Describes the settings of the model, after `--set` has changed those that `fit` filled in."""
    model, data = config.model, config.data
    return (
        f"resized to {model.image_size[1]}x{model.image_size[0]} in patches of {model.patch_size}; "
        f"mean {list(data.mean)}, std {list(data.std)}; {config.train.batch_size} images a batch"
    )
