"""CIFAR-10 whose objects differ in size and place: a set on which gates by content could help, for benchmarks/gate_forms.py.

Command:  python benchmarks/placed.py --data DIR --out DIR     writes OUT/placed_cifar10 from DIR/cifar10

Every image is shrunk to a side of 12 to 32 pixels and put anywhere on a canvas of 32x32 pixels in one colour. Side, place
and colour are drawn uniformly for each image, from one seed for each split. A gate that shuts on the canvas and opens on
the object counts from the edge of the object, wherever it lies; a plain place can't.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAME = "placed_cifar10"
SIDE, LEAST = 32, 12  # pixels
SPLITS = {"train": 0, "test": 1}  # and their seeds


def placed(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """The image on a canvas of its own size."""
    side = int(draw.integers(LEAST, SIDE + 1))
    left, top = (int(place) for place in draw.integers(0, SIDE - side + 1, 2))
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in draw.integers(0, 256, 3)))
    canvas.paste(image.resize((side, side), Image.Resampling.BOX), (left, top))
    return canvas


def rows(table: pa.Table, seed: int) -> Iterator[dict[str, object]]:
    draw = np.random.default_rng(seed)
    for image, label in zip(table["img"].to_pylist(), table["label"].to_pylist(), strict=True):
        file = io.BytesIO()
        placed(Image.open(io.BytesIO(image["bytes"])).convert("RGB"), draw).save(file, "PNG")
        yield {"img": {"bytes": file.getvalue(), "path": None}, "label": label}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10, as parquet")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    (given.out / NAME).mkdir(parents=True, exist_ok=True)
    for split, seed in SPLITS.items():
        table = pa.concat_tables([pq.read_table(path) for path in sorted((given.data / "cifar10").glob(f"{split}-*.parquet"))])
        pq.write_table(
            pa.Table.from_pylist(list(rows(table, seed)), schema=table.select(["img", "label"]).schema),
            given.out / NAME / f"{split}-00000-of-00001.parquet",
        )


if __name__ == "__main__":
    main()
