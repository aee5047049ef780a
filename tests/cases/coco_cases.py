"""A small set in COCO format, two splits of 64x64 images, to which a test does one thing."""

import copy
import json

import numpy as np
from PIL import Image

SIDE = 64
SPLITS = {"train": 8, "test": 4}
SETTINGS = [
    "model.image_size=64", "model.patch_size=8", "model.depth=1", "model.dim=24", "model.num_heads=2", "model.num_classes=2",
    "training.epochs=1", "training.batch_size=4", "training.warmup_steps=1", "training.workers=0", "detector.window=4",
    "detector.num_global=1", "detector.out_channels=16", "detector.proposals=50", "detector.box_features=32",
    "detector.mask_channels=8", "detector.masks=false", "images.scale_jitter=[]",
]  # fmt: skip


def values_of(split):
    """The content of annotations.json: one box in each image, of two categories in turn."""
    images, objects = [], []
    for i in range(SPLITS[split]):
        x, y, w, h = 10 + i % 5, 12, 24, 20
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        objects.append(
            {"id": i + 1, "image_id": i + 1, "category_id": 1 + i % 2, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            | {"segmentation": outline}
        )
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "cup"}]}


def write_coco(root, changes=None):
    """Writes both splits; `changes` has functions of the values by split. The images differ between and within splits."""
    for number, split in enumerate(SPLITS):
        values = copy.deepcopy(values_of(split))
        random = np.random.default_rng(number)
        where = root / split / "images"
        where.mkdir(parents=True, exist_ok=True)
        for entry, item in zip(values["images"], values["annotations"], strict=True):
            x, y, w, h = item["bbox"]
            pixels = random.integers(0, 80, (SIDE, SIDE, 3)).astype("uint8")
            pixels[y : y + h, x : x + w] = 220
            Image.fromarray(pixels).save(where / entry["file_name"])
        (changes or {}).get(split, lambda _: None)(values)
        (root / split / "annotations.json").write_text(json.dumps(values))
    return root
