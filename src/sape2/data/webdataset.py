"""Webdataset shards: tar files in which KEY.jpg and KEY.cls (or KEY.json with "label") are one sample.

The headers of a shard are read once and give the place of every image, so that any image can be read by number: the
order of a run then follows from its seed alone, and a run goes on in the middle of an epoch without reading up to there.
Nothing is unpacked, so names in an archive lead nowhere.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from sape2.data.base import IMAGE_ENDINGS, READING, TEST_NAMES, TRAIN_NAMES, find_splits, has_labels, waiting_for

MAX_OPEN = 64  # shards held open by one process


class ShardImages:
    """The samples of some shards, in the order of the shards and of their members."""

    layout = "webdataset"

    def __init__(self, where: str, shards: list[Path], classes: tuple[str, ...]) -> None:
        self.where, self.shards, self.classes = where, shards, classes
        indices = [waiting_for(str(shard), lambda shard=shard: index_shard(shard)) for shard in shards]
        numbers: dict[Any, int] = {name: number for number, name in enumerate(classes)}
        labels = (label for index in indices for *_, label in index)
        self.labels: list[Any] = [numbers.get(label, label) if isinstance(label, str) else label for label in labels]
        self._keys = np.array([key.encode() for index in indices for key, *_ in index], dtype=bytes)
        self._places = np.array([place[1:3] for index in indices for place in index], dtype=np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *map(len, indices)])
        self._open: dict[int, io.FileIO] = {}

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}:{bytes(self._keys[index]).decode()}"

    def read(self, index: int) -> dict[str, Any]:
        offset, size = self._places[index].tolist()
        shard = self._shard(index)
        data = waiting_for(str(self.shards[shard]), lambda: self._bytes(shard, offset, size))
        if len(data) < size:
            raise ValueError(f"{self.name(index)}: the shard ends after {len(data)} of its {size} bytes")
        return {"bytes": data}

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        """By position, so that processes which share the open file do not disturb each other."""
        with READING:
            try:
                return os.pread(self._opened(shard).fileno(), size, offset)
            except OSError:
                self._open.pop(shard, None)  # what is forgotten is closed
                raise

    def _opened(self, shard: int) -> io.FileIO:
        if shard not in self._open:
            if len(self._open) == MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[shard] = io.FileIO(self.shards[shard])
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def contents(self) -> Any:
        return [[shard.name for shard in self.shards], self._keys.tobytes(), self._places.tobytes()]


Place = tuple[str, int, int, Any]  # key, first byte, number of bytes, label


def index_shard(path: Path) -> list[Place]:
    """Where the images of a shard lie, and their labels. Raises ValueError if the shard is damaged."""
    images: dict[str, list[tuple[str, int, int]]] = {}  # key: member, first byte, number of bytes
    labels: dict[str, Any] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, ending = _key(member.name)
                if not member.isreg():
                    continue
                if f".{ending.lower()}".endswith(IMAGE_ENDINGS):
                    images.setdefault(key, []).append((member.name, member.offset_data, member.size))
                elif ending in ("cls", "json") and labels.get(key) is None:
                    labels[key] = _label(_content(tar, member), ending)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        last = f" after sample {next(reversed(images))}" if images else ""
        raise ValueError(f"the shard {path} cannot be read{last}: {error}; fetch it again, or remove it") from error
    return [(key, *_only(path, key, found), labels.get(key)) for key, found in images.items()]


def _key(member: str) -> tuple[str, str]:
    """The key, which ends at the first dot of the file's name, and the ending, which may hold more dots."""
    folder, _, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending


def _only(path: Path, key: str, found: list[tuple[str, int, int]]) -> tuple[int, int]:
    """The place of the one image of a sample: KEY.png, whatever KEY.depth.png lies beside it."""
    plain = [image for image in found if "." not in _key(image[0])[1]] or found
    if len(plain) > 1:
        raise ValueError(
            f"{path}: sample {key} has two images, {plain[0][0]} and {plain[1][0]}; "
            "a key ends at the first dot and has one image"
        )
    return plain[0][1:]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = tar.extractfile(member)
    return b"" if file is None else file.read(2**20)


def _label(content: bytes, ending: str) -> Any:
    """The number in a .cls file, or "label" of a .json file; what cannot be understood is returned as it is."""
    text = content.decode("utf-8", "replace").strip()
    if ending == "cls":
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    return values.get("label") if isinstance(values, dict) else None


# --- a folder of shards ----------------------------------------------------------------------------------------------


def find(folder: Path) -> bool:
    return next(folder.rglob("*.tar"), None) is not None


def read(folder: Path) -> dict[str, ShardImages]:
    """The split of a shard is a word of its path (train-0001.tar, val/0001.tar); classes.txt may hold names, one a line."""
    groups: dict[str, list[Path]] = {}
    for shard in sorted(folder.rglob("*.tar")):
        groups.setdefault(_split_of(shard.relative_to(folder)), []).append(shard)
    if not groups:
        packed = next((path.name for path in folder.rglob("*.tar.*")), "no .tar file")
        raise ValueError(f"--data {folder} needs webdataset shards that are not compressed (.tar); found {packed}")
    train, tests = find_splits(list(groups), str(folder))
    names = folder / "classes.txt"
    classes = (
        tuple(line.strip() for line in names.read_text(encoding="utf-8-sig").strip().splitlines()) if names.exists() else ()
    )
    sources = (ShardImages(f"{folder} {name}", groups[name], classes) for name in tests)
    test = next((source for source in sources if has_labels(source)), None)
    if test is None:
        raise ValueError(f"--data {folder} has no labels in {' or '.join(tests)}: all are -1")
    return {"train": ShardImages(f"{folder} {train}", groups[train], classes), "test": test}


def _split_of(path: Path) -> str:
    words = re.split(r"[\W_\d]+", str(path.with_suffix("")).lower())
    return next((name for name in (*TRAIN_NAMES, *TEST_NAMES) if name in words), "others")
