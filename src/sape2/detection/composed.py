"""A data set in COCO format, composed from real images: scikit-learn's handwritten digits on crops of its photographs.

FOLDER/train/annotations.json and FOLDER/train/images/*.png, the same for test. Boxes and masks are exact: a mask is what
later digits leave visible of a digit, its box is tight. Test digits and test parts of the photographs are in no training
image. Each image depends only on (seed, split, number).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sape2.config.extras import from_extra
from sape2.runs.files import beside, write_text

SIZES = ((96, 96), (64, 96), (96, 64))  # (height, width) of an image
ITEM_SIDES = (20, 40)  # pixels
MAX_ITEMS = 4
MIN_VISIBLE = 0.6  # of the pixels of a digit
THRESHOLD = 0.4  # of full ink, above which a pixel belongs to a digit
TEST_EVERY = 5  # every fifth digit
TEST_COLUMNS = 440  # test crops begin at this column of a photograph, training crops end there
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
SPLITS = ("train", "test")
VERSION = 1  # of the rule by which the set is made, in composed.json with all that decides it


@dataclass(frozen=True)
class _Item:
    """A digit in an image: where its square lies, its ink from 0 to 1, and its mask in the image, others aside."""

    index: int
    label: int
    top: int
    left: int
    ink: np.ndarray
    mask: np.ndarray


def compose(folder: Path | str, train_images: int, test_images: int, seed: int = 0) -> Path:
    """Writes the set, whole or not at all; a folder that holds the same set is left as it is.

    Raises ValueError if the folder holds anything else, ImportError without scikit-learn.
    """
    settings = {"train_images": train_images, "test_images": test_images, "seed": seed, "version": VERSION}
    folder = Path(folder)
    if _is_composed(folder, settings):
        return folder
    whole = folder.resolve()  # a link to an empty folder stays one
    temporary = beside(whole)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split, count in zip(SPLITS, (train_images, test_images), strict=True):
            _write_split(temporary / split, split, count, seed)
        write_text(temporary / "composed.json", json.dumps(settings) + "\n")
        os.replace(temporary, whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_composed(folder: Path, settings: dict[str, int]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / "composed.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove the folder, or choose another one") from error
    if found == settings:
        return True
    held = "is no composed set" if found is None else f"holds another composed set, {found}"
    raise ValueError(f"{folder} {held}; wanted {settings}. Choose another folder for it")


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    photographs, digits, labels = _sources()
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        random = np.random.default_rng([seed, SPLITS.index(split), number])
        pixels, masks, items, crop = _draw(photographs, digits, labels, split, random)
        name = f"{number:06d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        height, width = pixels.shape[:2]
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width, "crop": crop})
        for mask, item in zip(masks, items, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number + 1} | annotation(mask, item.label + 1) | {"item": item.index}
            )
    categories = [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(10)]
    info = {"description": "handwritten digits on photographs, both of scikit-learn", "seed": seed, "split": split}
    whole = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_text(folder / "annotations.json", json.dumps(whole))


def _sources() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The photographs, the digits as ink from 0 to 1, their labels."""
    sets = from_extra("data", "sklearn.datasets", "the composed set needs scikit-learn")
    digits = sets.load_digits()
    return [sets.load_sample_image(name) for name in PHOTOGRAPHS], (digits.images / 16).astype(np.float32), digits.target


# --- one image -------------------------------------------------------------------------------------------------------


def _draw(
    photographs: list[np.ndarray], digits: np.ndarray, labels: np.ndarray, split: str, random: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], list[_Item], dict[str, Any]]:
    """Pixels, the visible mask of each digit, the digits, and where the background was cut out."""
    size = SIZES[random.integers(len(SIZES))]
    pixels, crop = _background(photographs, size, split, random)
    placed: list[_Item] = []
    for _ in range(random.integers(1, MAX_ITEMS + 1)):
        item = _place(digits, labels, size, split, random)
        if _all_visible([*placed, item]):  # else it is left out: what can be seen is always annotated
            placed.append(item)
    for item in placed:
        _paint(pixels, item, random)
    return pixels.round().astype(np.uint8), visible_masks([item.mask for item in placed]), placed, crop


def _background(
    photographs: list[np.ndarray], size: tuple[int, int], split: str, random: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """A crop of one to two times `size`, from the left part of a photograph for training, from the right for test."""
    which = int(random.integers(len(photographs)))
    photograph = photographs[which]
    zoom = random.uniform(1, 2)
    height, width = (int(side * zoom) for side in size)
    first, last = (0, TEST_COLUMNS) if split == "train" else (TEST_COLUMNS, photograph.shape[1])
    top = int(random.integers(photograph.shape[0] - height + 1))
    left = int(random.integers(first, last - width + 1))
    crop = Image.fromarray(photograph[top : top + height, left : left + width])
    pixels = np.asarray(crop.resize((size[1], size[0]), Image.Resampling.BILINEAR), dtype=np.float32).copy()
    return pixels, {"photograph": PHOTOGRAPHS[which], "top": top, "left": left, "height": height, "width": width}


def _place(digits: np.ndarray, labels: np.ndarray, size: tuple[int, int], split: str, random: np.random.Generator) -> _Item:
    of_split = [i for i in range(len(digits)) if (i % TEST_EVERY == 0) == (split == "test")]
    index = of_split[random.integers(len(of_split))]
    side = int(random.integers(ITEM_SIDES[0], ITEM_SIDES[1] + 1))
    top, left = (int(random.integers(length - side + 1)) for length in size)
    ink = np.asarray(Image.fromarray(digits[index]).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = ink > THRESHOLD
    return _Item(index, int(labels[index]), top, left, ink, mask)


def visible_masks(masks: list[np.ndarray]) -> list[np.ndarray]:
    """The part of each mask that later masks leave visible."""
    covered = np.zeros_like(masks[0])
    visible = []
    for mask in reversed(masks):
        visible.insert(0, mask & ~covered)
        covered |= mask
    return visible


def _all_visible(items: list[_Item]) -> bool:
    masks = [item.mask for item in items]
    return all(seen.sum() >= MIN_VISIBLE * mask.sum() for seen, mask in zip(visible_masks(masks), masks, strict=True))


def _paint(pixels: np.ndarray, item: _Item, random: np.random.Generator) -> None:
    """Ink of a light colour on dark ground and of a dark one on light; nothing outside the mask changes."""
    part = (slice(item.top, item.top + len(item.ink)), slice(item.left, item.left + len(item.ink)))
    light = 30.0 if pixels[part].mean() > 127 else 225.0
    colour = light + random.uniform(-30, 30, size=3)
    ink = np.where(item.mask[part], item.ink, 0)[..., None]
    pixels[part] = ink * colour + (1 - ink) * pixels[part]


# --- COCO ------------------------------------------------------------------------------------------------------------


def annotation(mask: np.ndarray, category: int) -> dict[str, Any]:
    """Box, area and mask of one object as COCO writes them: (x, y, width, height) in pixels, tight."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    segmentation = {"size": list(mask.shape), "counts": run_lengths(mask)}
    return {"category_id": category, "bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": segmentation}


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed form: lengths of runs of 0 and 1 in turn, column by column, the first of 0."""
    values = mask.T.ravel()
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    lengths = np.diff([0, *borders.tolist(), len(values)]).tolist()
    return [0, *lengths] if values[0] else lengths
