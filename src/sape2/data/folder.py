"""Image folders: DIR/train/CLASS/*.jpg and the same under a test split, or DIR/CLASS/*.jpg alone.

Classes in order of name; hidden files and folders are left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sape2.data.base import IMAGE_ENDINGS, Source, plain_name, tell, waiting_for
from sape2.data.labels import near_name, numbers_of
from sape2.data.splits import by_split, check_card, drawn, open_labelled, split_of, splits_in
from sape2.data.walk import Files, is_image, listed, tell_left_out

KNOWN = f"taken are images in folders of their classes ({', '.join(IMAGE_ENDINGS)})"


class FolderImages:
    """The images below DIR/SPLIT/CLASS, sorted by file name, so that files named by number keep their order.

    Without any folder of a class they have no labels.
    """

    layout = "folder"

    def __init__(self, files: Files, split: str) -> None:
        self.root, self.where = files.root / split, plain_name(f"{files.root} {split}".rstrip())
        self._prefix = f"{split}/" if split else ""
        inside, folders = (
            [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
            for names in (files.real, files.folders)
        )
        found = [name for name in inside if is_image(name) and ("/" in name or not folders)]
        tell_left_out(self.where, {*inside} - {*found}, KNOWN)
        _check_splits_below(self.where, folders, found, bool(split))
        found = self._once(files, found)
        found.sort(key=lambda name: (os.path.basename(name), name))
        classes = sorted(name for name in folders if "/" not in name)
        self.classes = tuple(map(plain_name, classes))
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels: list[Any] = [numbers.get(_class_of(name)) for name in found]
        self._tell_inner_folders(folders, found)
        self._paths = np.array([os.fsencode(name) for name in found], dtype=bytes)  # far smaller than a list of str

    def _once(self, files: Files, found: list[str]) -> list[str]:
        """Without links to images that are taken already. Raises ValueError for one file in two classes."""
        seen: dict[str, str] = {}
        for name in found:
            real = files.real[self._prefix + name]
            first = seen.setdefault(real, name)
            if _class_of(first) != _class_of(name):
                both = f"{plain_name(first)} and {plain_name(name)} are one file, {plain_name(real)}"
                raise ValueError(f"{self.where}: {both}, in two classes; leave the right one")
        if again := sorted({*found} - {*seen.values()}):
            tell(f"{self.where}: left out, links to images that are taken already: {listed(again)}")
        return list(seen.values())

    def _tell_inner_folders(self, folders: list[str], found: list[str]) -> None:
        """Warns where images lie one folder below their classes, under the same names in each: these may be the classes."""
        inner: dict[str, set[str]] = {name: set() for name in folders if "/" not in name}
        for name in found:
            if name.count("/") < 2:
                return
            top, below, _ = name.split("/", 2)
            inner[top].add(below)
        first = next(iter(inner.values()), set())
        if len(inner) > 1 and len(first) > 1 and all(names == first for names in inner.values()):
            classes, below = listed(sorted(inner)), listed(sorted(first))
            tell(f"{self.where}: the classes are the first folders, {classes}; each of them holds the folders {below}")

    def real_paths(self, files: Files) -> dict[str, str]:
        """Maps the real path of each image to the name it is called by."""
        names = (self._prefix + os.fsdecode(path) for path in self._paths.tolist())
        return {files.real[name]: name for name in names}

    def name(self, index: int) -> str:
        return plain_name(self._path(index))

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self._paths[index]))

    def read(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        return {"bytes": waiting_for(plain_name(self.root), lambda: self._bytes(path))}

    def _bytes(self, path: Path) -> bytes:
        """Raises OSError if the whole folder is gone, ValueError if it is this one file."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            if not self.root.is_dir():
                raise
        try:
            return path.read_bytes()  # the folder may have come back just now
        except OSError as error:
            raise ValueError(f"{plain_name(path)}: the image cannot be read: {error.strerror}") from error

    def contents(self) -> Any:
        return [self._paths.tobytes()]


def _class_of(name: str) -> str:
    return name.partition("/")[0]


def _check_splits_below(where: str, folders: list[str], found: list[str], in_split: bool) -> None:
    """Raises ValueError where train and test lie below a class, or below a split in place of classes, or in file names."""
    holding = {_class_of(name) for name in found if name.count("/") == 1}
    kinds: dict[str, set[str]] = {}
    for name in folders:
        top, _, below = name.partition("/")
        if below or (in_split and top not in holding):
            kinds.setdefault(top if below else "", set()).update(splits_in(below or top)[0])
    names = {split_of(os.path.basename(name)) for name in found} if not in_split else {None}
    for place, splits in (*kinds.items(), *([] if None in names else [("", names)])):
        if "train" in splits and len(splits) > 1:
            holder = f"the class folder {plain_name(place)}" if place else "it"
            raise ValueError(
                f"{where}: {holder} holds images of {' and '.join(sorted(map(str, splits)))}, which must not be mixed; "
                "put them into DIR/train/CLASS and DIR/test/CLASS"
            )


# --- which folder is what --------------------------------------------------------------------------------------------


def find(files: Files) -> bool:
    """True if a folder named like a split contains folders with images."""
    return any(True in below for name, below in _tops(files).items() if split_of(name))


def find_classes(files: Files) -> bool:
    """True if DIR/*/ holds images and no folder is a split."""
    return not find(files) and any(_tops(files).values())


def _tops(files: Files) -> dict[str, set[bool]]:
    """The folders in DIR, each with where its images lie: right in it (False), in folders below (True), or nowhere."""
    found: dict[str, set[bool]] = {name: set() for name in files.folders if "/" not in name}
    for name in files.real:
        top, _, below = name.partition("/")
        if below and is_image(name):
            found[top].add("/" in below)
    return found


def split_folders(files: Files) -> dict[str, str]:
    """Split -> the folder that holds it; none where DIR holds the classes. Raises ValueError where it can be read both ways."""
    tops, where = _tops(files), plain_name(files.root)
    named = [name for name in tops if split_of(name)]
    others = sorted(name for name in tops if name not in named and tops[name])
    kinds = {split_of(name) for name in named}
    whole = "train" in kinds and len(kinds) > 1
    if not find(files):
        if named and (whole or not others):
            raise ValueError(
                f"--data {where}: {listed(named)} hold{'s' * (len(named) == 1)} images but no folder for each class: put them "
                "into DIR/train/CLASS and DIR/test/CLASS"
            )
        return {}
    if others and not whole:
        raise ValueError(
            f"--data {where}: {listed(named)} holds folders as a split does, and {listed(others)} holds images under no word "
            "of a split. If all are classes, put them into DIR/train; if they are splits, name them train and test"
        )
    return {split: found[0] for split, found in by_split(where, named, "folder").items()}


def read(files: Files, test_fraction: float | None = None, seed: int = 0) -> dict[str, Source]:
    """{"train": ..., "test": ...}; where there is no test set, `test_fraction` of each class is taken as one, with `seed`."""
    splits, where = split_folders(files), plain_name(files.root)
    check_card(files, splits)
    if splits:
        tell_left_out(where, [name for name in files.real if _class_of(name) not in splits.values()], "they are of no split")
    if test_fraction is not None and {*splits} <= {"train"}:
        return drawn(_all_filled(FolderImages(files, splits.get("train", ""))), test_fraction, seed)
    if not splits:
        raise ValueError(
            f"--data {where} needs the splits train and test; found classes only. sape2 train images splits them, "
            "or --set data.test_fraction=0.2"
        )

    def opened(split: str) -> tuple[FolderImages, dict[str, str]]:
        source = FolderImages(files, splits[split])
        return source, source.real_paths(files)

    sources = open_labelled(splits, where, opened, test_fraction, seed)
    train, test = sources["train"], sources["test"]
    numbers = numbers_of(train.classes)
    for name in test.classes:
        if name not in numbers:
            raise ValueError(
                f"{test.where} has the class {name!r}, which {train.where} has not{near_name(name, train.classes)}"
            )
    return {"train": _all_filled(train), "test": test}


def _all_filled(train: Source) -> Source:
    """Raises ValueError naming a class folder without images: that class could never be learned."""
    empty = sorted({*range(len(train.classes))} - {*train.labels})
    if empty and train.labels:
        raise ValueError(f"{train.where}: the class {train.classes[empty[0]]!r} has 0 images; add some, or remove its folder")
    return train
