"""Webdataset shards: tar files in which KEY.jpg and KEY.cls (or KEY.json with "label") are one sample.

The headers of a shard are read once and give the place of every image, so that any image can be read by number: the
order of a run then follows from its seed alone, and a run goes on in the middle of an epoch without reading up to there.
Nothing is unpacked, so names in an archive are never used as paths.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from sape2.data.base import IMAGE_ENDINGS, OTHER_ENDINGS, Source, plain_name, tell, tell_missing, waiting_for
from sape2.data.labels import numbers_of
from sape2.data.splits import files_by_split, open_labelled, splits_in
from sape2.data.walk import Files, tell_left_out

LABEL_ENDINGS = ("cls", "json")
# The first bytes of packed files.
STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


class ShardImages:
    """The samples of some shards, in the order of the shards and of their members."""

    layout = "webdataset"

    def __init__(self, where: str, shards: list[Path], classes: tuple[str, ...]) -> None:
        self.where, self.shards, self.classes = where, shards, classes
        tell_missing(where, shards)
        numbers = numbers_of(classes)
        indices = [waiting_for(plain_name(shard), lambda shard=shard: index_shard(shard, numbers)) for shard in shards]
        for shard, index in zip(shards, indices, strict=True):
            if not index:
                tell(f"{plain_name(shard)} holds no samples")
        self.labels: list[Any] = [label for index in indices for *_, label in index]
        self._keys = np.array([os.fsencode(key) for index in indices for key, *_ in index], dtype=bytes)
        self._places = np.array([place[1:3] for index in indices for place in index], dtype=np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *map(len, indices)])

    def check_split(self, split: str) -> None:
        """Raises ValueError where the folders in the shards name another split; one among others may be a class."""
        folders = {key.rpartition(b"/")[0] for key in self._keys.tolist() if b"/" in key}
        named = {name: splits_in(f"{name}/")[0] for name in map(os.fsdecode, folders)}
        other = [name for name, found in named.items() if len(found) == 1 and ("train" in found) != (split == "train")]
        if other and all(named.values()):
            raise ValueError(
                f"{self.where}: the shards hold images in {plain_name(min(other))}/; a test image must not be trained on, so "
                "give each split shards of its own"
            )

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        return plain_name(f"{self.shards[self._shard(index)]}:{os.fsdecode(bytes(self._keys[index]))}")

    def read(self, index: int) -> dict[str, Any]:
        offset, size = self._places[index].tolist()
        shard = self.shards[self._shard(index)]
        data = waiting_for(plain_name(shard), lambda: bytes_at(shard, offset, size))
        if len(data) < size:
            raise ValueError(f"{self.name(index)}: the shard ends after {len(data)} of its {size} bytes")
        return {"bytes": data}

    def contents(self) -> Any:
        return [[shard.name for shard in self.shards], self._keys.tobytes(), self._places.tobytes()]


# --- one shard -------------------------------------------------------------------------------------------------------


def bytes_at(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


Place = tuple[str, int, int, Any]  # key, first byte, number of bytes, label


@dataclass
class Sample:
    """The files of a shard with one key, each with the name of its member."""

    key: str
    images: list[tuple[str, int, int]] = field(default_factory=list)  # first byte, number of bytes
    labels: list[tuple[str, Any]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    dotted: list[str] = field(default_factory=list)  # KEY.x.cls, which is no label
    others: list[str] = field(default_factory=list)  # images of kinds that are not read

    @cached_property
    def image(self) -> tuple[str, int, int]:
        """The one image: KEY.png, whatever KEY.depth.png lies beside it. Asked for when all members are known."""
        plain = [image for image in self.images if "." not in _key(image[0])[1]] or self.images
        if len(plain) > 1:
            raise ValueError(
                f"sample {self.key} has two images, {plain[0][0]} and {plain[1][0]}; a key ends at the first dot and has one "
                "image"
            )
        return plain[0]


def index_shard(path: Path, numbers: Mapping[str, int] | None = None) -> list[Place]:
    """Positions and labels of the images of a shard: numbers, names counted by `numbers`, None without a label.

    Raises ValueError if the shard is damaged, has members that would be left out, or is ambiguous.
    """
    samples: dict[str, Sample] = {}  # ./KEY is KEY
    _check_start(path)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _add(samples, tar, member, numbers or {})
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        last = next((f" after sample {plain_name(each.key)}" for each in reversed(samples.values()) if each.images), "")
        raise ValueError(f"the shard {plain_name(path)} cannot be read{last}: {error}; fetch it again, or remove it") from error
    try:
        found = [_place(each.key, each) for each in samples.values() if each.images or each.labels or each.links]
        _check_kind(samples.values())
    except ValueError as error:
        raise ValueError(plain_name(f"{path}: {error}")) from error
    others = [name for each in samples.values() if not (each.images or each.labels or each.links) for name in each.others]
    tell_left_out(plain_name(path), others, f"read are {', '.join(IMAGE_ENDINGS)}", "image")
    return found


def _check_start(path: Path) -> None:
    """Raises ValueError for a packed file, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(6)
    kind = next((kind for known, kind in STARTS.items() if start.startswith(known)), None)
    if kind:
        raise ValueError(f"the shard {plain_name(path)} is packed with {kind}; unpack it, since images are read by their place")


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raises ValueError unless a block of zeros, and nothing but zeros, follows the last member.

    tarfile takes whatever is no header for the end: a cut between two members, a damaged header, a second archive.
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"at byte {offset} there is neither a file nor the end of the archive (a block of zeros)")
    while rest := file.read(2**20):
        if rest.count(0) != len(rest):
            raise ValueError("after the end of the archive another one follows: two shards need two files")


def _add(samples: dict[str, Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, numbers: Mapping[str, int]) -> None:
    """Takes down what a member is to its sample; hidden files, and what is neither image nor label, are left out."""
    key, ending = _key(member.name)
    is_image, last = f".{ending}".endswith(IMAGE_ENDINGS), ending.rpartition(".")[2]
    is_other = f".{last}" in OTHER_ENDINGS
    if key == "" or key.endswith("/") or member.isdir() or not (is_image or is_other or last in LABEL_ENDINGS):
        return
    sample = samples.setdefault(posixpath.normpath(key), Sample(key))
    if is_other:
        sample.others.append(member.name)
    elif not member.isfile() or member.issparse():
        sample.links.append(member.name)
    elif is_image:
        sample.images.append((member.name, member.offset_data, member.size))
    elif last != ending:
        sample.dotted.append(member.name)
    else:
        content: Any = tar.extractfile(member)
        for label in _labels(content.read(2**20), ending):
            sample.labels.append((member.name, numbers.get(label, label) if isinstance(label, str) else label))


def _key(member: str) -> tuple[str, str]:
    """The key, which ends at the first dot of the file's name, and the ending in small letters, which may hold more dots."""
    folder, _, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _place(key: str, sample: Sample) -> Place:
    """Raises ValueError for what is not one image with at most one label."""
    if sample.links:
        raise ValueError(f"sample {key}: {sample.links[0]} is a link or has holes; a shard needs the bytes of the file")
    if not sample.images:
        raise ValueError(f"sample {key} has the label {sample.labels[0][0]} and no image ({', '.join(IMAGE_ENDINGS)})")
    if sample.dotted and not sample.labels:
        raise ValueError(
            f"sample {key} has no label: a key ends at the first dot, so {sample.dotted[0]} is not its .cls or .json"
        )
    return key, *sample.image[1:], _agreed(key, sample.labels)


def _check_kind(samples: Iterable[Sample]) -> None:
    """Raises ValueError where one sample has KEY.png and another of its folder KEY.depth.png alone: its own may be lost."""
    first: dict[str, tuple[str, str]] = {}  # of each folder
    for name in (each.image[0] for each in samples if each.images):
        kind = _key(name)[1].rpartition(".")[0]
        known, other = first.setdefault(posixpath.dirname(posixpath.normpath(name)), (kind, name))
        if kind != known:
            one, two = sorted((name, other), key=len)
            raise ValueError(f"{two} and {one} are the images of two samples; name all alike, or put back the one that is lost")


def _agreed(key: str, found: list[tuple[str, Any]]) -> Any:
    """The one label, however often it is there; a number goes before words that are no class."""
    counted = [label for label in found if isinstance(label[1], (int, float))] or found
    other = next((label for label in counted[1:] if label[1] != counted[0][1]), None)
    if other is not None:
        (first, one), (second, two) = counted[0], other
        raise ValueError(f"sample {key} has two labels, {one!r} in {first} and {two!r} in {second}; leave the right one")
    return counted[0][1] if counted else None


def _labels(content: bytes, ending: str) -> list[Any]:
    """The number in a .cls file, or every "label" of a .json file; what cannot be understood is returned as it is."""
    text = content.decode("utf-8-sig", "replace").strip()
    if ending == "cls":
        return [int(text) if re.fullmatch(r"-?\d{1,9}", text) else text]
    try:
        values = json.loads(text, object_pairs_hook=tuple)
    except (json.JSONDecodeError, RecursionError):
        return [text]
    pairs = values if isinstance(values, tuple) else ()
    return [value for name, value in pairs if name == "label" and value is not None]


# --- a folder of shards ----------------------------------------------------------------------------------------------


def find(files: Files) -> bool:
    return bool(files.ending(".tar"))


def read(files: Files, test_fraction: float | None = None, seed: int = 0) -> dict[str, Source]:
    """The split of a shard is a word of its path (train-0001.tar, val/0001.tar); classes.txt may hold names, one a line."""
    packed = next((name for name in files.real if PACKED.search(name)), None)
    where = plain_name(files.root)
    if packed is not None or not find(files):
        found = "no .tar file" if packed is None else plain_name(packed)
        raise ValueError(f"--data {where} needs webdataset shards that are not compressed (.tar); found {found}")
    groups, classes = files_by_split(files, ".tar", test_fraction is not None), _class_names(files)
    _tell_places(where, classes)
    tell_left_out(where, {*files.real} - {*files.ending(".tar"), "classes.txt"}, "samples in shards are taken")

    def open_split(split: str) -> tuple[ShardImages, dict[str, str]]:
        shards = [files.root / name for name in groups[split]]
        source = ShardImages(f"{where} {split}", shards, classes)
        source.check_split(split)
        return source, {files.real[name]: name for name in groups[split]}

    return open_labelled(groups, where, open_split, test_fraction, seed)


def _class_names(files: Files) -> tuple[str, ...]:
    """The class names in classes.txt, one per line; an empty line before the last name is a class without a name."""
    path = files.root / "classes.txt"
    if "classes.txt" not in files.real:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
        return tuple(map(str.strip, text.split("\n"))) if text else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{plain_name(path)} is not UTF-8: {error}; save it as UTF-8") from error


def _tell_places(where: str, classes: tuple[str, ...]) -> None:
    """Warns where a name is, or begins with, the number of another class ("2 owl"); such a label is taken as a number."""
    numbered = [(place, name, re.match(r"\d{1,9}\b", name)) for place, name in enumerate(classes)]
    other = [(place, name, found[0]) for place, name, found in numbered if found and place != int(found[0]) < len(classes)]
    if other:
        place, name, number = other[0]
        tell(f"{where}: classes.txt has the name {name!r} in place {place}, from 0; a label {number} in shards is a place")
