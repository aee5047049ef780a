"""The images of a run and all data that training and evaluation need of both splits, checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sape2.config.detection import DetectionConfig
from sape2.data.base import at_home
from sape2.data.files import threads
from sape2.data.fingerprint import digest
from sape2.data.pixels import RULE
from sape2.data.walk import listed
from sape2.detection.batches import check_jitter, padded_size
from sape2.detection.coco import CocoImages, open_split
from sape2.detection.composed import compose
from sape2.encodings.grid import Grid
from sape2.tables import Row

COMPOSED = "runs/data/coco_digits"


def open_images(config: DetectionConfig) -> tuple[CocoImages, CocoImages]:
    """Training and test images; the composed set is made if it does not exist. No image file is opened yet.

    Raises ValueError if the splits share a file, have other categories than the model, or no object that counts.
    """
    images = config.images
    if images.name == "coco_digits":
        source = compose(Path(images.source or COMPOSED), images.train_images or 0, images.test_images or 0)
    elif images.source is None:
        raise ValueError("coco needs --data: a folder in COCO format, with annotations/, train2017/ and val2017/")
    elif not images.source.strip():
        raise ValueError("--data is empty; give a folder in COCO format")
    else:
        source = at_home(images.source)
    masks = config.detector.masks
    train, test = open_split(source, "train", masks, images.train_images), open_split(source, "test", masks, images.test_images)
    test.match_classes(train)
    for split in (train, test):
        if len(split.classes) != config.model.num_classes:
            raise ValueError(
                f"{split.where} has {len(split.classes)} categories, {', '.join(split.classes[:3])}, …; wanted those of "
                f"{train.where}, as many as --set model.num_classes={len(train.classes)}, got {config.model.num_classes}"
            )
        split.check_measurable()
    check_apart(train, test)
    return train, test


def check_apart(train: CocoImages, test: CocoImages) -> None:
    """Raises ValueError if a file is an image of both splits, by whatever path or link."""
    own = {file: entry["id"] for file, entry in zip(train.files, train.images, strict=True)}
    shared = [(file, entry["id"]) for file, entry in zip(test.files, test.images, strict=True) if file in own]
    if shared:
        file, image = shared[0]
        raise ValueError(
            f"{len(shared)} of {len(test)} test images are training images too, the first: image {image} of {test.where} is "
            f"the file of image {own[file]} of {train.where}, {file}; an image belongs to one split"
        )


def check_sizes(images: CocoImages, image_size: Grid, divisor: int, low: float | None = None) -> None:
    """Raises ValueError naming file and id of an image that the model, or scale jitter down to `low`, leaves no pixel of."""
    for entry, size in zip(images.images, images.sizes, strict=True):
        try:
            padded_size(size, image_size, divisor)
            if low is not None:
                check_jitter(size, image_size, low)
        except ValueError as error:
            raise ValueError(f"{images.where}: image {entry['id']} ({entry['file_name']}): {error}") from error


def read_all(images: CocoImages, watch: Callable[[int], None] = lambda done: None) -> tuple[list[str], list[str]]:
    """Reads every image once; a digest of each file, and notes. Raises ValueError naming file and id of what cannot be read."""
    digests, turned = [], []
    with ThreadPoolExecutor(threads()) as pool:
        for found, stays in pool.map(images.check_pixels, range(len(images))):  # cancels what waits where one fails
            turned += [images.images[len(digests)]["file_name"]] if stays else []
            digests.append(found)
            watch(len(digests))
    note = (
        f"{images.where}: images that EXIF would turn, left as they are stored, of which the annotations have the size: "
        f"{len(turned)}, {listed(turned)}; boxes that were drawn on the turned images need files without EXIF orientation"
    )
    return digests, [note] if turned else []


def same_content(train: CocoImages, of_train: list[str], test: CocoImages, of_test: list[str]) -> list[str]:
    """A note if files of both splits hold the same bytes, by the digests that `read_all` gives."""
    own = dict(zip(of_train, train.images, strict=True))
    shared = [(entry, own[found]) for found, entry in zip(of_test, test.images, strict=True) if found in own]
    if not shared:
        return []
    (there, here), number = shared[0], len(shared)
    return [
        f"{number} of {len(test)} test images are copies of training images, the first: image {there['id']} "
        f"({there['file_name']}) of {test.where} and image {here['id']} ({here['file_name']}) of {train.where}"
    ]


def fingerprint(config: DetectionConfig, train: CocoImages, test: CocoImages) -> Row:
    """For data.json: number of images and digest of the annotations of each split, and the rule of reading if it matters.

    It does not for JPEG files, which are neither deep nor transparent and are left as they are stored, nor for our own.
    """
    splits = {"train": train, "test": test}
    names = [entry["file_name"].lower() for images in splits.values() for entry in images.images]
    plain = config.images.name == "coco_digits" or all(name.endswith((".jpg", ".jpeg")) for name in names)
    described = {name: {"images": len(images), "labels": digest(images.where.read_bytes())} for name, images in splits.items()}
    return {"layout": "coco"} | ({} if plain else {"reading_rule": RULE}) | described
