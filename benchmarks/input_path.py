"""How fast images come from each layout, and where the time goes: reading, decoding, cutting, augmenting.

Command:  python benchmarks/input_path.py --out DIR [--images 256] [--row-group 100]     (about half a minute on one core)

Makes JPEG files of ImageNet's usual size (500x375, quality 90, smooth shapes and noise; their size in bytes is printed),
writes them as parquet, folder and shards, and measures images per second of processor time of one thread, so that
other programs on the machine disturb little. Rows go to benchmarks/results/input_path.jsonl, the table of docs/data.md.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import plain_augmentation
import torch
import write_layouts
from PIL import Image

from sape2.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig, model_config
from sape2.config.recipes import get_recipe
from sape2.data import ImageFiles, files, load_data
from sape2.data.augment import TrainStream
from sape2.data.decoding import center_crop, decode
from sape2.runs.rows import write_rows
from sape2.tables import print_table

ROWS = Path(__file__).parent / "results" / "input_path.jsonl"
CLASSES = ["a", "b"]
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--row-group", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files.MAX_THREADS = 1
    if not (options.out / "parquet").exists():
        write_images(options.out / "parquet", options.images, options.row_group)
        write_layouts.main(["--data", str(options.out / "parquet"), "--out", str(options.out)])
    model = model_config("vit_small", image_size=224, patch_size=16, num_classes=len(CLASSES))
    rows = []
    for layout in ("folder", "webdataset", "parquet"):
        config = DataConfig(name="images", source=str(options.out / layout), in_memory=False, validation_fraction=0.01)
        data = load_data(config, model).train
        assert isinstance(data, ImageFiles)
        rows += measure(data, layout)
    data = load_data(DataConfig(name="images", source=str(options.out / "folder"), in_memory=False), model).train
    assert isinstance(data, ImageFiles)
    rows += stages(data, model)
    write_rows(ROWS, rows)
    print_table(rows, ["layout", "what", "images_per_cpu_s", "milliseconds", "n"], "input path, one thread")


def write_images(folder: Path, number: int, row_group: int) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for split, size in (("train", number), ("test", 4)):
        encoded = [{"bytes": jpeg(seed), "path": None} for seed in range(size)]
        print(f"{split}: {sum(len(entry['bytes']) for entry in encoded) / size / 1000:.0f} kB an image")
        folder.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict({"img": encoded, "label": [i % 2 for i in range(size)]}, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"), batch_size=row_group)


def jpeg(seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """Smooth shapes with noise: about as many bytes as a photograph of that size."""
    draw = np.random.default_rng(seed)
    smooth = Image.fromarray(draw.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(np.int16) + draw.normal(0, 9, (size[1], size[0], 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(data: ImageFiles, layout: str) -> list[dict]:
    """Reading alone in the two orders, and whole training batches of the DeiT recipe."""
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    read = data.source.read
    augment = get_recipe("imagenet").augment
    light = AugmentConfig(crop_area=augment.crop_area, flip=True)
    rows = [
        timed(layout, "read in order", len(data), lambda: [read(int(row)) for row in data.rows]),
        timed(layout, "read in random order", len(data), lambda: [read(int(data.rows[i])) for i in shuffled]),
    ]
    for what, config in (("boxes and flips", light), ("DeiT: with RandAugment", augment)):
        stream = TrainStream(data, config, TrainConfig(epochs=9, batch_size=BATCH, workers=0), seed=0)
        rows.append(timed(layout, what, BATCH, lambda stream=stream: stream[0]))
    return rows


def stages(data: ImageFiles, model: ModelConfig) -> list[dict]:
    """One image through each step."""
    entries = [data.source.read(int(row)) for row in data.rows[:BATCH]]
    opened = [Image.open(io.BytesIO(entry["bytes"])).convert("RGB") for entry in entries]
    images = data.take(torch.arange(BATCH))[0]
    policy = AugmentConfig(policy="randaugment", policy_magnitude=27, policy_group=1)
    return [
        timed("any", "JPEG to pixels", BATCH, lambda: [Image.open(io.BytesIO(e["bytes"])).convert("RGB") for e in entries]),
        timed("any", "resize to 224x224", BATCH, lambda: [i.resize((224, 224), Image.Resampling.BICUBIC) for i in opened]),
        timed("any", "test view", BATCH, lambda: [decode(e, model, "", partial(center_crop, share=0.875)) for e in entries]),
        timed("any", "RandAugment", BATCH, lambda: plain_augmentation.ours(images, policy, seed=0)),
    ]


def timed(layout: str, what: str, images: int, work: Callable[[], object]) -> dict:
    """The better of two rounds after one of warm-up, in processor time."""
    work()
    rounds = []
    for _ in range(2):
        start = time.process_time()
        work()
        rounds.append(time.process_time() - start)
    seconds = min(rounds)
    milliseconds = round(1000 * seconds / images, 3)
    return {
        "layout": layout,
        "what": what,
        "images_per_cpu_s": round(images / seconds),
        "milliseconds": milliseconds,
        "n": images,
    }


if __name__ == "__main__":
    main()
