"""Writes the images of --data out again as an image folder and as webdataset shards, file by file, bytes unchanged.

Command:  python benchmarks/write_layouts.py --data DIR --out DIR [--limit N] [--shard-size 1000]

OUT/folder holds SPLIT/CLASS/NUMBER.ENDING, OUT/webdataset holds SPLIT-NUMBER.tar and classes.txt. Numbers are those of the
rows in --data, so a run from any of the three sees the same images in the same order.
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from sape2.config import DataConfig, ModelConfig
from sape2.data import Source, open_sources

Sample = tuple[int, bytes, str, int]  # number, encoded image, file ending, label


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int, help="the first N images of each split (default all)")
    parser.add_argument("--shard-size", type=int, default=1000)
    options = parser.parse_args(argv)
    for split, source in open_sources(DataConfig(name="images", source=options.data), ModelConfig()).items():
        classes = class_names(source)
        write_folder(options.out / "folder" / split, samples(source, options.limit), classes)
        write_shards(options.out / "webdataset", split, samples(source, options.limit), options.shard_size)
        (options.out / "webdataset" / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        print(f"{split}: {len(source.labels) if options.limit is None else options.limit} images, {len(classes)} classes")


def class_names(source: Source) -> list[str]:
    """Names of class folders whose order is that of the labels."""
    names = list(source.classes) or [str(label) for label in range(max(source.labels) + 1)]
    if names == sorted(names) and not any("/" in name for name in names):
        return names
    plain = [re.sub(r"[^-.\w]+", "_", name) for name in names]
    return [f"{label:04d}_{name}" for label, name in enumerate(plain)]


def samples(source: Source, limit: int | None) -> Iterator[Sample]:
    for number, label in enumerate(source.labels[:limit]):
        entry = source.read(number)
        data = entry.get("bytes") or Path(entry["path"]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            ending = {"JPEG": "jpg"}.get(str(image.format), str(image.format).lower())
        yield number, data, ending, label


def write_folder(folder: Path, images: Iterator[Sample], classes: list[str]) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, data, ending, label in images:
        (folder / classes[label] / f"{number:08d}.{ending}").write_bytes(data)


def write_shards(folder: Path, split: str, images: Iterator[Sample], size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shard: tarfile.TarFile | None = None
    for number, data, ending, label in images:
        if number % size == 0:
            if shard is not None:
                shard.close()
            shard = tarfile.open(folder / f"{split}-{number // size:06d}.tar", "w")  # noqa: SIM115 - closed with the last sample
        for file, content in ((f"{number:08d}.{ending}", data), (f"{number:08d}.cls", str(label).encode())):
            member = tarfile.TarInfo(file)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    if shard is not None:
        shard.close()


if __name__ == "__main__":
    main()
