"""Image folders: DIR/train/CLASS/*.jpg and the same under test, validation, valid or val, or DIR/CLASS/*.jpg alone.

Classes in order of name; hidden files and folders are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sape2.data.base import IMAGE_ENDINGS, OTHER_ENDINGS, TEST_NAMES, TRAIN_NAMES, Part, Source, find_splits, log, waiting_for
from sape2.data.images import class_split
from sape2.data.labels import near_name

LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found")  # folders that hold copies or nothing
PEEK = 20  # folders and files looked at to tell the layout


class FolderImages:
    """The images below DIR/SPLIT/CLASS, sorted by file name, so that files named by number keep their order."""

    layout = "folder"

    def __init__(self, folder: Path, split: str, classes: tuple[str, ...]) -> None:
        from torchvision.datasets.folder import make_dataset

        self.root, self.where, self.classes = folder / split, f"{folder} {split}".rstrip(), classes
        numbers = {name: number for number, name in enumerate(classes)}
        start = len(str(self.root)) + 1
        found = make_dataset(str(self.root), numbers, is_valid_file=_may_be_image, allow_empty=True)
        found = [image for image in found if not any(map(_is_hidden, image[0][start:].split(os.sep)))]
        others = [path for path, _ in found if not _is_image(path)]
        if others:
            log.warning("%s: %d images are left out, the first %s; known are %s", self.where, len(others), others[0][start:],
                        ", ".join(IMAGE_ENDINGS))  # fmt: skip
        found = [image for image in found if _is_image(image[0])]
        found.sort(key=lambda image: (os.path.basename(image[0]), image[0]))
        self.labels: list[Any] = [label for _, label in found]
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


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, in order of path; what is hidden or left by systems is not looked at.

    Links to folders are followed, each folder once. Raises OSError for a folder that cannot be listed.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else [name for name in folders if not _is_hidden(name)]
        found += [] if here in seen else [Path(root, name) for name in names if _is_image(name)]
        seen.add(here)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def find(folder: Path) -> bool:
    """Whether DIR/train/*/ holds image files; looks at a few names only."""
    return any(_holds_classes(folder / split) for split in _split_names(folder))


def find_classes(folder: Path) -> bool:
    """The same of DIR/*/, where there is no split."""
    return not _split_names(folder) and _holds_classes(folder)


def has_test(folder: Path) -> bool:
    return any(name in TEST_NAMES for name in _split_names(folder))


def _holds_classes(folder: Path) -> bool:
    return any(holds_images(path.path) for path in _some(folder) if path.is_dir() and not _is_hidden(path.name))


def holds_images(folder: str | Path) -> bool:
    """Directly, not below; looks at a few names only."""
    return any(file.name.lower().endswith(IMAGE_ENDINGS) for file in _some(folder))


def _split_names(folder: Path) -> list[str]:
    return [name for name in (*TRAIN_NAMES, *TEST_NAMES) if (folder / name).is_dir()]


def _some(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry, _ in zip(entries, range(PEEK), strict=False):
            yield entry


def read(folder: Path, test_fraction: float | None = None, seed: int = 0) -> dict[str, Source]:
    """{"train": ..., "test": ...}; where there is no test set, `test_fraction` of each class is taken as one, with `seed`."""
    if test_fraction is not None and not has_test(folder):
        only = next(iter(_split_names(folder)), "")
        source = _all_filled(FolderImages(folder, only, _classes(folder / only)))
        rest, part = class_split(torch.tensor(source.labels, dtype=torch.long), test_fraction, seed)
        return {"train": Part(source, rest.tolist(), "train"), "test": Part(source, part.tolist(), "test")}
    if find_classes(folder):
        raise ValueError(
            f"--data {folder} needs the splits train and test; found classes only. sape2 train images splits them, "
            "or --set data.test_fraction=0.2"
        )
    train, tests = find_splits(_split_names(folder), str(folder))
    classes = _classes(folder / train)
    others = sorted({*_classes(folder / tests[0])} - {*classes})
    if others:
        raise ValueError(
            f"{folder / tests[0]} has the class {others[0]!r}, which {folder / train} has not{near_name(others[0], classes)}"
        )
    return {"train": _all_filled(FolderImages(folder, train, classes)), "test": FolderImages(folder, tests[0], classes)}


def _all_filled(train: FolderImages) -> FolderImages:
    """Raises ValueError naming a class folder without images: that class could never be learned."""
    empty = sorted({*range(len(train.classes))} - {*train.labels})
    if empty and train.labels:
        raise ValueError(f"{train.root}: the class {train.classes[empty[0]]!r} has 0 images; add some, or remove its folder")
    return train


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def _may_be_image(path: str) -> bool:
    return path.lower().endswith((*IMAGE_ENDINGS, *OTHER_ENDINGS))


def _is_image(path: str) -> bool:
    name = os.path.basename(path).lower()
    return name.endswith(IMAGE_ENDINGS) and not name.startswith(".")
