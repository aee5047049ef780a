"""Images, boxes and masks in COCO format.

A folder holds either SPLIT/annotations.json with SPLIT/images, or, as COCO is published, annotations/instances_train2017.json
with train2017 and instances_val2017.json with val2017 (the labels of its test images are not public: test reads val).
What cannot be used is refused in one line; what training can do without is left out and counted in `notes`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sape2.data.pixels import named, read_image
from sape2.encodings.grid import Grid

Target = dict[str, Any]
PUBLISHED = {"train": "train2017", "test": "val2017"}


def open_split(folder: Path, split: str, masks: bool = False, limit: int | None = None) -> CocoImages:
    """The first `limit` (None: all) images of "train" or "test". Raises FileNotFoundError saying what was looked for."""
    own = (folder / split / "annotations.json", folder / split / "images")
    published = (folder / "annotations" / f"instances_{PUBLISHED[split]}.json", folder / PUBLISHED[split])
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --data takes one in COCO format")
    for labels, images in (own, published):
        if labels.is_file():
            return CocoImages(labels, images, masks, limit)
    raise FileNotFoundError(
        f"{folder} is not in COCO format: looked for {own[0].relative_to(folder)} and {published[0].relative_to(folder)}"
    )


class CocoImages(Dataset):
    """(image, target) by number: a uint8 image (3, height, width), and as torchvision's detectors take it

    boxes (n, 4) as x1, y1, x2, y2 in pixels, labels 1..C in the order of the category ids, iscrowd, area, image_id, and with
    `masks` masks (n, height, width). `sizes` are (height, width), `classes` the names of labels 1..C.
    """

    def __init__(self, annotations: Path, images: Path, masks: bool = False, limit: int | None = None) -> None:
        self.where, self.folder, self.masks = annotations, images, masks
        values = _read_json(annotations)
        categories = sorted(values["categories"], key=lambda category: category["id"])
        self.classes = tuple(str(category["name"]) for category in categories)
        self.labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        self.images = [self._checked_image(entry) for entry in values["images"][:limit]]
        if not self.images:
            raise ValueError(f"{annotations} has no images")
        self.sizes: list[Grid] = [(entry["height"], entry["width"]) for entry in self.images]
        self.notes: list[str] = []
        known = {entry["id"] for entry in values["images"]}
        self.objects = self._by_image(values["annotations"], known)

    def match_classes(self, train: CocoImages) -> None:
        """Labels in the order of the training names, whatever the ids. Raises ValueError if the names are not the same."""
        for name in sorted({*self.classes} ^ {*train.classes}):
            has, lacks = (self, train) if name in self.classes else (train, self)
            raise ValueError(f"{has.where} has the category {name!r}, which {lacks.where} has not")
        self.labels = {number: train.classes.index(self.classes[label - 1]) + 1 for number, label in self.labels.items()}
        self.classes = train.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        entry, size = self.images[index], self.sizes[index]
        pixels = self._read_pixels(entry, size)
        objects = self.objects[entry["id"]]
        wrap: Any = tv_tensors.BoundingBoxes
        boxes = torch.tensor([_corners(item["bbox"], size) for item in objects], dtype=torch.float32).reshape(-1, 4)
        target: Target = {
            "boxes": wrap(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[item["category_id"]] for item in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([int(item.get("iscrowd", 0)) for item in objects], dtype=torch.int64),
            "area": torch.tensor([float(item["area"]) for item in objects], dtype=torch.float32),
            "image_id": entry["id"],
        }
        if self.masks:
            found = [self._mask(item, size) for item in objects]
            target["masks"] = tv_tensors.Mask(torch.stack(found) if found else torch.zeros(0, *size, dtype=torch.uint8))
        return tv_tensors.Image(pixels), target

    # --- checks ------------------------------------------------------------------------------------------------------

    def _checked_image(self, entry: Any) -> dict[str, Any]:
        wanted = {"id": int, "file_name": str, "height": int, "width": int}
        for key, kind in wanted.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ValueError(f"{self.where}: an image needs {', '.join(wanted)}; got {str(entry)[:80]}")
        path = self.folder / entry["file_name"]
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{self.where}: image {entry['id']} lies outside of {self.folder}: {entry['file_name']!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{self.where}: image {entry['id']} is missing: there is no {path}")
        return entry

    def _by_image(self, annotations: list[Any], known: set[int]) -> dict[int, list[dict[str, Any]]]:
        sizes = {entry["id"]: size for entry, size in zip(self.images, self.sizes, strict=True)}
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        flat: list[Any] = []
        for item in annotations:
            name = self._checked_annotation(item, known)
            if item["image_id"] not in sizes:
                continue
            left, top, right, bottom = _corners(item["bbox"], sizes[item["image_id"]])
            if right <= left or bottom <= top:
                flat.append(name)
                continue
            if self.masks and not item.get("segmentation"):
                raise ValueError(f"{name} has no segmentation, and masks are asked for; leave --masks out")
            found[item["image_id"]].append({"area": (right - left) * (bottom - top)} | item)
        if flat:
            self.notes.append(f"left out {len(flat)} boxes of no size inside their image, the first: {flat[0]}")
        empty = sum(entry["id"] not in found for entry in self.images)
        if empty:
            self.notes.append(f"{empty} of {len(self.images)} images of {self.where} hold no object")
        return found

    def _checked_annotation(self, item: Any, known: set[int]) -> str:
        """What to call it in errors."""
        if not isinstance(item, dict):
            raise ValueError(f"{self.where}: an annotation must be an object; got {str(item)[:80]}")
        name = f"{self.where}: annotation {item.get('id')}"
        if item.get("image_id") not in known:
            raise ValueError(f"{name} speaks of image {item.get('image_id')!r}, which is not listed")
        if item.get("category_id") not in self.labels:
            raise ValueError(f"{name} has category {item.get('category_id')!r}; known ids: {', '.join(map(str, self.labels))}")
        box = item.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            raise ValueError(f"{name} needs bbox as four finite numbers, x, y, width, height; got {str(box)[:80]}")
        return name

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read_pixels(self, entry: dict[str, Any], size: Grid) -> Tensor:
        path = self.folder / entry["file_name"]
        with named(str(path)):
            pixels = np.array(read_image(path, 3, annotated=(size[1], size[0])))
        if pixels.shape[:2] != size:
            height, width = pixels.shape[:2]
            raise ValueError(f"{path} is {height}x{width} pixels; {self.where} says {size[0]}x{size[1]}")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _mask(self, item: dict[str, Any], size: Grid) -> Tensor:
        try:
            return torch.from_numpy(decode_mask(item["segmentation"], size))
        except ValueError as error:
            raise ValueError(f"{self.where}: annotation {item.get('id')}: {error}") from error


def decode_mask(segmentation: Any, size: Grid) -> np.ndarray:
    """COCO's polygons, run lengths or compressed run lengths -> (height, width) of 0 and 1."""
    try:
        from faster_coco_eval.core import mask as rle
    except ImportError as error:
        raise ImportError("masks in COCO format need faster-coco-eval: pip install 'sape2[detect]'") from error
    height, width = size
    if isinstance(segmentation, list):
        if not segmentation or not all(_is_polygon(part) for part in segmentation):
            raise ValueError("a polygon needs x, y of at least three points, as finite numbers")
        parts: Any = rle.frPyObjects(segmentation, height, width)
        return rle.decode(rle.merge(parts))
    if not isinstance(segmentation, dict) or list(segmentation.get("size", [])) != [height, width]:
        raise ValueError(
            f"a segmentation is polygons or run lengths of an image of {height}x{width}; got {str(segmentation)[:80]}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, (str, bytes)):
        return rle.decode(segmentation)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != height * width:
        raise ValueError(f"run lengths must add up to the {height * width} pixels of the image")
    return rle.decode(rle.frPyObjects(segmentation, height, width))


def count_objects(images: CocoImages) -> dict[str, int]:
    """Objects of each class, crowds left out."""
    items = [item for objects in images.objects.values() for item in objects if not item.get("iscrowd", 0)]
    counts = Counter(images.labels[item["category_id"]] for item in items)
    return {name: counts[label] for label, name in enumerate(images.classes, start=1)}


def _corners(box: list[float] | list[int], size: Grid) -> list[float]:
    """x1, y1, x2, y2 inside the image."""
    (x, y, w, h), (height, width) = map(float, box), map(float, size)
    return [min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and all(_is_number(value) for value in part)


def _check_ids(path: Path, key: str, entries: list[Any]) -> None:
    """Raises ValueError naming two entries of one id, or two categories of one name."""
    for field in ("id", "name") if key == "categories" else ("id",):
        seen: dict[Any, dict[str, Any]] = {}
        for entry in (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get(field), (int, str))):
            first = seen.setdefault(entry[field], entry)
            if first is not entry:
                both = f"{_called(first)} and {_called(entry)}"
                raise ValueError(f"{path}: {key} has {field} {entry[field]!r} twice: {both}; give each its own")


def _called(entry: dict[str, Any]) -> str:
    return str(entry.get("file_name") or entry.get("name") or {k: entry.get(k) for k in ("image_id", "category_id", "bbox")})[
        :80
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(values, dict) or not isinstance(values.get(key), list):
            raise ValueError(f"{path} is not in COCO format: it needs a list called {key}")
    for key in ("images", "annotations", "categories"):
        _check_ids(path, key, values[key])
    for category in values["categories"]:
        if not isinstance(category, dict) or not {"id", "name"} <= set(category):
            raise ValueError(f"{path}: a category needs id and name; got {str(category)[:80]}")
    return values
