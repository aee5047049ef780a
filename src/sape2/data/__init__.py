"""Reads, splits, augments and batches images, with one file for each layout in which they can be stored.

Images are kept decoded in memory if they fit.

A new layout is a file with a class like `base.Source`, functions to find and read it, a line in `LAYOUTS` and its
name in `DataConfig.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sape2.config import HUB_IDS, DataConfig, ModelConfig
from sape2.data import folder, parquet, webdataset
from sape2.data.arrays import TORCHVISION_FOLDERS, ArrayImages, read_digits, read_torchvision
from sape2.data.base import Source, Subset, UnreadableImages, at_home, plain_name, tell
from sape2.data.decoding import decode
from sape2.data.files import ImageFiles, Splits
from sape2.data.fingerprint import fingerprint
from sape2.data.images import ImageData, class_split, draw_by_class, normalize, tell_twins
from sape2.data.labels import as_numbers, first_of, match_classes, match_model
from sape2.data.splits import split_of
from sape2.data.walk import Files, is_image, walk

__all__ = [
    "LAYOUTS", "ImageData", "ImageFiles", "Source", "Splits", "decode", "fingerprint", "load_data", "normalize",
    "open_sources",
]  # fmt: skip

# name: (whether these files are of it, its splits)
LAYOUTS: dict[str, tuple[Callable[[Files], bool], Callable[[Files, DataConfig], Any]]] = {
    "folder": (folder.find, lambda files, config: folder.read(files, config.test_fraction, config.split_seed)),
    "parquet": (parquet.find, parquet.read),
    "webdataset": (webdataset.find, lambda files, config: webdataset.read(files, config.test_fraction, config.split_seed)),
}
MEMORY_BYTES = 4 * 2**30  # decoded images above this stay in their files, unless data.in_memory says otherwise
COMPARED = 10_000  # images of which the files are compared where they are not decoded: some seconds


def load_data(config: DataConfig, model: ModelConfig, classes: Sequence[str] = ()) -> Splits:
    """The three splits, as the model takes them. Raises ValueError or OSError naming file, row and reason.

    `classes` are those of a model that learned from other images: labels are numbered as they are, by name, and some of
    them may be missing here.

    Only labels are read to make the splits; images are decoded here where they are kept in memory, else when asked for.
    """
    sources = open_sources(config, model)
    if classes:
        match_model(sources.values(), classes)
    if config.test_fraction is not None and not isinstance(sources["test"], Subset):
        raise ValueError(f"data.test_fraction is for images without a test set; --data {config.source} has one")
    print_ = fingerprint(sources)
    if config.source is not None and not at_home(config.source).exists():
        print_ |= {"hub_id": config.source}
    train, test = (as_images(source, config, model, split, print_) for split, source in sources.items())
    _check_counts(train, sources["train"].where)
    if not classes:
        _check_trained(train, test, sources["test"])
    rest, part = class_split(train.labels, config.validation_fraction, config.split_seed)
    train, validation = train[rest], train[part]
    if config.train_limit is not None and config.train_limit < len(train):
        limited = train[draw_by_class(train.labels, config.train_limit, config.split_seed)]
        _tell_lost(limited, {*train.labels.tolist()}, sources["train"].where)
        train = limited
    splits = {"train": train, "validation": validation, "test": test}
    number = sum(map(len, splits.values()))

    def name(split: str, place: int) -> str:
        return splits[split].name(place)

    def class_of(split: str, place: int) -> str:
        return splits[split].classes[int(splits[split].labels[place])]

    if not keep_in_memory(number, config, model):
        if number <= COMPARED:
            files = {split: images.encoded() for split, images in splits.items() if isinstance(images, ImageFiles)}
            tell_twins("bytes", files, name, class_of)
        return Splits(**splits)
    decoded = {split: images.decoded() if isinstance(images, ImageFiles) else images for split, images in splits.items()}
    pixels = {split: (image.tobytes() for image in data.images.numpy()) for split, data in decoded.items()}
    tell_twins("pixels", pixels, name, class_of)
    return Splits(**decoded)


def _check_counts(train: ImageFiles | ImageData, where: str) -> None:
    """Raises ValueError naming a class with one image, which would be taken to validate, so that none were left to train."""
    alone = (train.labels.bincount() == 1).nonzero()
    if len(alone):
        name = train.classes[int(alone[0])]
        raise ValueError(f"{where}: the class {name!r} has 1 image; training and validation need one each, at least 2")


def _check_trained(train: ImageFiles | ImageData, test: ImageFiles | ImageData, source: Source | ArrayImages) -> None:
    """Names classes of the test set that have no image to train on. Raises ValueError where the test set was drawn."""
    untrained = [test.classes[label] for label in sorted({*test.labels.tolist()} - {*train.labels.tolist()})]
    if not untrained:
        return
    line = f"{source.where} has images of classes of which none is there to train on: {first_of(untrained)}"
    if isinstance(source, Subset):
        raise ValueError(f"{line}; training, validation and test need one each, at least 3")
    tell(line)


def _tell_lost(train: ImageFiles | ImageData, known: set[int], where: str) -> None:
    """Names the classes of which `data.train_limit` leaves no image."""
    lost = [train.classes[label] for label in sorted(known - {*train.labels.tolist()})]
    if lost:
        tell(f"{where}: data.train_limit={len(train)} leaves no image of {len(lost)} of {len(known)} classes: {first_of(lost)}")


def keep_in_memory(images: int, config: DataConfig, model: ModelConfig) -> bool:
    """True if that many images are decoded once and kept in memory; the choice does not change a result."""
    if config.in_memory is not None:
        return config.in_memory
    height, width = model.image_size
    return images * model.in_channels * height * width <= MEMORY_BYTES


def open_sources(config: DataConfig, model: ModelConfig) -> dict[str, Source] | dict[str, ArrayImages]:
    """{"train": ..., "test": ...} from wherever the config points."""
    if config.name == "digits" and config.layout is None:  # a folder of that name has a layout
        if config.source is not None:
            raise ValueError(f"digits come with scikit-learn and need no --data; got {config.source!r}")
        return read_digits(model)
    if config.source is None:
        raise ValueError(
            f"{config.name} needs --data: a folder in hub parquet layout, a folder that holds torchvision's "
            f"{TORCHVISION_FOLDERS.get(config.name, 'files')}, an image folder (train/CLASS/*.jpg), webdataset shards (*.tar), "
            f"or a hub id such as {HUB_IDS.get(config.name, 'owner/name')}"
        )
    path = data_folder(config.source)
    if path is None:
        return _matched(parquet.read_hub(config.source, config))
    files = walk(path)
    if config.layout is None and (path / TORCHVISION_FOLDERS.get(config.name, "-")).is_dir():
        return read_torchvision(config, model, files)
    _, read = LAYOUTS[config.layout or find_layout(files, config)]
    return _matched(read(files, config))


def data_folder(source: str) -> Path | None:
    """The folder that --data names, whole; None where there is no such folder. Raises NotADirectoryError for a file."""
    if not source.strip():
        raise ValueError("--data is empty; give a folder or a hub id")
    path = at_home(source).absolute()
    if path.is_file():
        raise NotADirectoryError(f"--data {plain_name(source)} is a file; give the folder that holds it")
    return path if path.is_dir() else None


def _matched(sources: dict[str, Source]) -> dict[str, Source]:
    for source in sources.values():
        as_numbers(source)
    match_classes(sources["train"], sources["test"])
    return sources


def moved(config: DataConfig, source: str) -> DataConfig:
    """The settings for the same images in another place, where they may lie in another layout."""
    path = data_folder(source)
    config = replace(config, source=source)
    if config.layout is None or path is None:
        return config
    files, (holds, _) = walk(path), LAYOUTS[config.layout]
    if holds(files) or (config.layout == "folder" and folder.find_classes(files)):
        return config
    return replace(config, layout=find_layout(files, config))


def find_layout(files: Files, config: DataConfig) -> Any:
    """The layout of a folder; raises an error if there is none, or more than one. Folders of splits and classes go first."""
    if folder.find(files) and not (parquet.find(files) and parquet.holds_paths(files, config)):
        return "folder"
    found = [name for name, (holds, _) in LAYOUTS.items() if name != "folder" and holds(files)]
    where = plain_name(files.root)
    if folder.find_classes(files) and not any(map(split_of, files.ending(".parquet", ".tar", "readme.md"))):
        found.insert(0, "folder")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"--data {where} holds {' and '.join(found)}; choose with --set data.layout={found[0]}")
    if any(map(is_image, files.real)):
        raise ValueError(
            f"--data {where} holds images but no folder for each class: put them into DIR/CLASS/*.jpg and give DIR"
        )
    there = first_of(sorted(map(plain_name, {name.partition("/")[0] for name in (*files.real, *files.folders)})), 5)
    known = TORCHVISION_FOLDERS.get(config.name)
    wanted = f"parquet file and no {known}" if known else "images"
    raise FileNotFoundError(
        f"--data {where} holds no {wanted}; found {there or 'nothing'}. Known: image folders (train/CLASS/*.jpg), parquet, "
        "webdataset shards (*.tar)"
    )


def as_images(
    source: Source | ArrayImages,
    config: DataConfig,
    model: ModelConfig,
    split: str = "train",
    fingerprint: dict[str, Any] | None = None,
) -> ImageFiles | ImageData:
    """The source, whose labels are whole numbers, as images of the model's classes; nothing is decoded."""
    if not source.labels:
        raise ValueError(f"{source.where} holds no rows")
    if source.classes and len(source.classes) != model.num_classes:
        raise ValueError(
            f"{source.where} has {len(source.classes)} classes but the model has {model.num_classes}; "
            f"use --set model.num_classes={len(source.classes)}"
        )
    for row, label in enumerate(source.labels):
        if not 0 <= label < model.num_classes:
            raise ValueError(f"{source.name(row)}: label {label} is not in 0..{model.num_classes - 1}")
    labels = torch.tensor(source.labels)
    classes = source.classes or tuple(str(label) for label in range(model.num_classes))
    if isinstance(source, ArrayImages):
        images = torch.from_numpy(source.images).permute(0, 3, 1, 2).contiguous()
        return ImageData(images, labels, classes, config.mean, config.std, fingerprint)
    unreadable = UnreadableImages(allowed_unreadable(len(labels), config), split)
    return ImageFiles(source, labels, classes, config, model, unreadable, fingerprint)


def allowed_unreadable(images: int, config: DataConfig) -> int:
    """data.max_bad_samples, by default one image in a thousand of a split and at most 100."""
    return min(100, images // 1000) if config.max_bad_samples is None else config.max_bad_samples
