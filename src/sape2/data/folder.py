"""Image folders: DIR/train/CLASS/*.jpg and the same under test, validation, valid or val. Classes in order of name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sape2.data.base import IMAGE_ENDINGS, TEST_NAMES, TRAIN_NAMES, find_splits, waiting_for

PEEK = 20  # folders and files looked at to tell the layout


class FolderImages:
    """The images below DIR/SPLIT/CLASS, sorted by file name, so that files named by number keep their order."""

    layout = "folder"

    def __init__(self, folder: Path, split: str, classes: tuple[str, ...]) -> None:
        from torchvision.datasets.folder import make_dataset

        self.root, self.where, self.classes = folder / split, f"{folder} {split}", classes
        numbers = {name: number for number, name in enumerate(classes)}
        found = make_dataset(str(self.root), numbers, IMAGE_ENDINGS, allow_empty=True)
        found.sort(key=lambda image: (os.path.basename(image[0]), image[0]))
        self.labels: list[Any] = [label for _, label in found]
        start = len(str(self.root)) + 1
        self._paths = np.array([os.fsencode(path[start:]) for path, _ in found], dtype=bytes)  # far smaller than a list of str

    def name(self, index: int) -> str:
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self._paths[index]))

    def read(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        return {"bytes": waiting_for(str(self.root), lambda: self._bytes(path))}

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
            raise ValueError(f"{path}: the image cannot be read: {error.strerror}") from error

    def contents(self) -> Any:
        return [self._paths.tobytes()]


def find(folder: Path) -> bool:
    """Whether DIR/train/*/ holds image files; looks at a few names only."""
    return any(
        any(file.name.lower().endswith(IMAGE_ENDINGS) for file in _some(path.path))
        for split in _split_names(folder)
        for path in _some(folder / split)
        if path.is_dir()
    )


def _split_names(folder: Path) -> list[str]:
    return [name for name in (*TRAIN_NAMES, *TEST_NAMES) if (folder / name).is_dir()]


def _some(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry, _ in zip(entries, range(PEEK), strict=False):
            yield entry


def read(folder: Path) -> dict[str, FolderImages]:
    train, tests = find_splits(_split_names(folder), str(folder))
    classes = tuple(sorted(entry.name for entry in os.scandir(folder / train) if entry.is_dir()))
    others = sorted({entry.name for entry in os.scandir(folder / tests[0]) if entry.is_dir()} - set(classes))
    if others:
        raise ValueError(f"{folder / tests[0]} has the class {others[0]!r}, which {folder / train} has not")
    return {"train": FolderImages(folder, train, classes), "test": FolderImages(folder, tests[0], classes)}
