"""The same small images in every layout."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import write_layouts
from PIL import Image

from sape2.config import DataConfig, ModelConfig
from sape2.data import load_data

CLASSES = ["cat", "dog", "eel"]
MODEL = ModelConfig(image_size=(8, 8), patch_size=4, num_classes=3)
LAYOUTS = ["parquet", "folder", "webdataset"]


def picture(row, size=(12, 10)):
    pixels = np.random.default_rng(row).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, files, labels, names=CLASSES):
    label_type = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "label": label_type})
    columns = {"img": [{"bytes": file, "path": None} for file in files], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path), batch_size=7)


def shard_of(path, size, prefix="s", label=lambda number: number % 3):
    """A shard with so many samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(size):
            for ending, data in (("png", file_of(picture(number))), ("cls", str(label(number)).encode())):
                member = tarfile.TarInfo(f"{prefix}{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_layouts_of(root: Path, train=60, test=9, bad=()) -> dict[str, Path]:
    """Folders by layout; the training set is in two parquet files. `bad` are numbers of training images that end too early."""
    files = [file_of(picture(row)) for row in range(train + test)]
    for row in bad:
        files[row] = files[row][:-40]
    labels = [row * 7 % 3 for row in range(train + test)]
    half = train // 2
    parts = {
        "train-00000-of-00002": (0, half),
        "train-00001-of-00002": (half, train),
        "test-00000-of-00001": (train, train + test),
    }
    for name, (first, last) in parts.items():
        write_parquet(root / "parquet" / "data" / f"{name}.parquet", files[first:last], labels[first:last])
    if not bad:
        write_layouts.main(["--data", str(root / "parquet"), "--out", str(root), "--shard-size", "25"])
    else:
        images = {"train": range(train), "test": range(train, train + test)}
        for split, rows in images.items():
            samples = [(number, files[row], "png", labels[row]) for number, row in enumerate(rows)]
            write_layouts.write_folder(root / "folder" / split, iter(samples), CLASSES)
            write_layouts.write_shards(root / "webdataset", split, iter(samples), 25)
        (root / "webdataset" / "classes.txt").write_text("\n".join(CLASSES))
    return {layout: root / layout for layout in LAYOUTS}


def load(folder, model=MODEL, **changes):
    return load_data(DataConfig(**{"name": "tiny", "source": str(folder)} | changes), model)


def hub_splits(**splits):
    """What `datasets.load_dataset` gives: splits of (names of classes or None, labels), with bright images of dogs."""

    def rows(names, labels):
        kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        dogs = [(names or ["cat", "dog"])[label] == "dog" for label in labels]
        files = [file_of(Image.new("RGB", (8, 8), (10 + 100 * dog,) * 3)) for dog in dogs]
        columns = {"image": [{"bytes": file, "path": None} for file in files], "label": labels}
        return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "label": kind}))

    return {name: rows(*split) for name, split in splits.items()}
