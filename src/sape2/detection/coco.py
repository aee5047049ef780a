"""Images, boxes and masks in COCO format.

A folder holds either SPLIT/annotations.json with SPLIT/images, or, as COCO is published, annotations/instances_train2017.json
with train2017 and instances_val2017.json with val2017 (the labels of its test images are not public: test reads val).
What the fields of the annotations may be is in `detection.annotations`.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sape2.config.names import unknown
from sape2.data.fingerprint import digest
from sape2.data.labels import near_name
from sape2.data.pixels import named, read_image, stays_turned
from sape2.data.walk import is_image, listed, walk
from sape2.detection.annotations import Annotations, Entry
from sape2.detection.masks import decode_run_lengths
from sape2.encodings.grid import Grid

Target = dict[str, Any]
Split = Literal["train", "test"]
PUBLISHED: dict[str, str] = {"train": "train2017", "test": "val2017"}


def open_split(folder: Path | str, split: Split, masks: bool = False, limit: int | None = None) -> CocoImages:
    """The first `limit` (None: all) images of "train" or "test". Raises FileNotFoundError saying what was looked for."""
    if split not in PUBLISHED:
        raise unknown("split", split, PUBLISHED)
    folder = Path(folder)
    own = (folder / split / "annotations.json", folder / split / "images")
    published = (folder / "annotations" / f"instances_{PUBLISHED[split]}.json", folder / PUBLISHED[split])
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; --data takes a folder in COCO format")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --data takes one in COCO format")
    there = [layout for layout in (own, published) if layout[0].is_file()]
    if len(there) > 1:
        raise ValueError(f"{own[0]} and {published[0]} are both there; only one of them can be the {split} split")
    for labels, images in there:
        return CocoImages(labels, images, masks, limit)
    raise FileNotFoundError(
        f"{folder} is not in COCO format: looked for {own[0].relative_to(folder)} and {published[0].relative_to(folder)}"
    )


class CocoImages(Dataset):
    """(image, target) by number: a uint8 image (3, height, width), and as torchvision's detectors take it

    boxes (n, 4) as x1, y1, x2, y2 in pixels, labels 1..C in the order of the category ids, iscrowd, area, image_id, and with
    `masks` masks (n, height, width). `sizes` are (height, width), `classes` the names of labels 1..C, `files` the real paths,
    `notes` what the annotations hold that was changed or left out.
    """

    def __init__(self, annotations: Path, images: Path, masks: bool = False, limit: int | None = None) -> None:
        self.where, self.folder, self.masks = annotations, images, masks
        read = Annotations(annotations, masks, limit)
        self.images, self.objects, self.notes = read.images, read.objects, read.notes
        self.classes = tuple(read.categories.values())
        self.labels = {category: label for label, category in enumerate(read.categories, start=1)}
        self.sizes: list[Grid] = [(entry["height"], entry["width"]) for entry in self.images]
        self.files = self._find_files()
        if limit is None or len(self) < limit:
            self.notes = [*self.notes, *self._unlisted()]

    def match_classes(self, train: CocoImages) -> None:
        """Labels in the order of the training names, whatever the ids. Raises ValueError if the names are not the same."""
        for name in sorted({*self.classes} ^ {*train.classes}):
            has, lacks = (self, train) if name in self.classes else (train, self)
            near = near_name(name, lacks.classes)
            raise ValueError(f"{has.where} has the category {name!r}, which {lacks.where} has not{near}")
        self.labels = {number: train.classes.index(self.classes[label - 1]) + 1 for number, label in self.labels.items()}
        self.classes = train.classes

    def check_measurable(self) -> None:
        """Raises ValueError if no image has an object that counts: there would be nothing to learn or to measure."""
        if not sum(count_objects(self).values()):
            raise ValueError(
                f"{self.where} has no object but crowds in its {len(self)} images, so there is nothing to learn or to measure; "
                "annotate some, or take more images (images.train_images, images.test_images)"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        entry, size = self.images[index], self.sizes[index]
        pixels = self._decode(index)
        objects = self.objects[entry["id"]]
        wrap: Any = tv_tensors.BoundingBoxes
        boxes = torch.tensor([item.box for item in objects], dtype=torch.float32).reshape(-1, 4)
        target: Target = {
            "boxes": wrap(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[item.category_id] for item in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([int(item.crowd) for item in objects], dtype=torch.int64),
            "area": torch.tensor([item.area for item in objects], dtype=torch.float32),
            "image_id": entry["id"],
        }
        if self.masks:
            found = [torch.from_numpy(decode_run_lengths(item.mask)) for item in objects if item.mask is not None]
            target["masks"] = tv_tensors.Mask(torch.stack(found) if found else torch.zeros(0, *size, dtype=torch.uint8))
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), target

    def check_pixels(self, index: int) -> tuple[str, bool]:
        """Reads an image as training and evaluation do; raises ValueError naming file and id.

        Returns a digest of its file, and whether it stays as it is stored although its EXIF would turn it.
        """
        self._decode(index)
        height, width = self.sizes[index]
        data = self.files[index].read_bytes()
        return digest(data), stays_turned(data, (width, height))

    # --- files -------------------------------------------------------------------------------------------------------

    def _find_files(self) -> list[Path]:
        folder = self.folder.resolve()
        first: dict[Path, Entry] = {}
        for entry in self.images:
            file = self._find_file(entry, folder)
            if file in first:
                raise ValueError(
                    f"{self.where}: images {first[file]['id']} and {entry['id']} are one file, {file}; its objects belong to "
                    "one image"
                )
            first[file] = entry
        return list(first)

    def _unlisted(self) -> list[str]:
        """A note of images in the folder that the annotations do not have."""
        known = set(map(str, self.files))
        left = [name for name, real in walk(self.folder).real.items() if is_image(name) and real not in known]
        left = sorted(name for name in left if os.path.realpath(self.folder / name) not in known)
        told = f"{self.folder}: images that {self.where.name} does not list, left out: {len(left)}, {listed(left)}"
        return [told] if left else []

    def _find_file(self, entry: Entry, folder: Path) -> Path:
        name, what = entry["file_name"], f"{self.where}: image {entry['id']}"
        try:
            file = (folder / name).resolve()
            is_file = file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, links in a circle
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{what} has a file_name that is no path: {ascii(name)[:80]} ({reason})") from error
        if not file.is_relative_to(folder):
            raise ValueError(f"{what} lies outside of {self.folder}: {name!r}")
        if not is_file:
            hint = "; write / in place of \\" if "\\" in name else near_name(name, [*walk(self.folder).real])
            raise FileNotFoundError(f"{what} is missing: there is no file {self.folder / name}{hint}")
        return file

    def _decode(self, index: int) -> np.ndarray:
        """(height, width, 3) of 8 bits."""
        (height, width), entry = self.sizes[index], self.images[index]
        path = self.folder / entry["file_name"]
        with named(f"{path} (image {entry['id']} of {self.where})"):
            pixels = np.array(read_image(self.files[index], 3, annotated=(width, height)))
        if pixels.shape[:2] != (height, width):
            found = "x".join(map(str, pixels.shape[:2]))
            raise ValueError(f"{path} is {found} pixels; {self.where} says {height}x{width} of image {entry['id']}")
        return pixels


def count_objects(images: CocoImages) -> dict[str, int]:
    """Objects of each class, crowds left out."""
    items = [item for objects in images.objects.values() for item in objects if not item.crowd]
    counts = Counter(images.labels[item.category_id] for item in items)
    return {name: counts[label] for label, name in enumerate(images.classes, start=1)}
