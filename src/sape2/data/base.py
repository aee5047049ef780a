"""The interface of all layouts: images of a split by number, with unreadable ones counted and missing files retried."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch.utils.data import get_worker_info

from sape2.progress import one_line

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
NUMBERED = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{16})?(\.\w+)")  # train-00003-of-00010.parquet, train-000003.tar
# Images too, but none that torchvision's folders have: told of, and not read.
OTHER_ENDINGS = (".gif", ".jfif", ".jpe", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".tga", ".dds", ".svg")
Result = TypeVar("Result")
log = logging.getLogger("sape2.data")


class Source(Protocol):
    """Encoded images of one split, by number. The number of an image depends on nothing but what is there."""

    layout: str
    where: str  # folder and split, for errors
    labels: list[Any]
    classes: tuple[str, ...]  # () where the source has no names

    def name(self, index: int) -> str:
        """Path or name of image `index`, for messages."""
        ...

    def read(self, index: int) -> Any:
        """The input of `decode`. Raises ValueError if this image cannot be read, OSError if its whole file is missing."""
        ...

    def contents(self) -> Any:
        """Names and sizes as far as they are known without opening images; a change of files shows in them."""
        ...


def plain_name(path: Path | str) -> str:
    """A path, or a part of one, as text that any file or terminal takes: bytes that are no UTF-8 are written as \\xE9."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # not from the system, which has fewer letters: the name of a class in a file
        data = str(path).encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def at_home(path: str | Path) -> Path:
    """A path in which a leading ~ or ~NAME stands for a home folder, if there is one; else it is a name like any other."""
    return Path(os.path.expanduser(path))


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def encoded(source: Source, index: int) -> bytes:
    """An image as its file holds it; nothing where it cannot be read."""
    try:
        entry = source.read(index) or {}
    except ValueError:
        return b""
    if entry.get("bytes") is None and entry.get("path") is not None and Path(entry["path"]).is_file():
        return Path(entry["path"]).read_bytes()
    return entry.get("bytes") or b""


@cache
def tell(line: str) -> None:
    """Logs a warning once per process, because a command may open a folder several times."""
    log.warning("%s", one_line(line))


class UnreadableImages:
    """The images that could not be read so far, each once. Raises ValueError at the one that is too many."""

    def __init__(self, limit: int, split: str) -> None:
        self.limit, self.split = limit, split
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if len(self) > self.limit:
            raise ValueError(
                f"{reason}; {len(self)} images of {self.split} cannot be read, and data.max_bad_samples allows {self.limit}: "
                "put good files in their place, or --set data.max_bad_samples=N"
            )
        if get_worker_info() is None:  # workers hand theirs to the main process
            log.warning("skipped in %s (%d of at most %d): %s", self.split, len(self), self.limit, one_line(reason))

    def update(self, found: dict[str, str]) -> None:
        for name, reason in found.items():
            self.add(name, reason)


def waiting_for(what: str, attempt: Callable[[], Result]) -> Result:
    """Calls `attempt`; if the system refuses a file, retries after 0.5, 1, 2, 4 and 8 seconds, then raises OSError."""
    for delay in (*RETRY_DELAYS_S, None):
        try:
            return attempt()
        except OSError as error:
            if error.errno is None:  # about what the file holds, not about getting it
                raise
            if delay is None:
                raise OSError(
                    f"{what} cannot be read: {error.strerror}; tried {len(RETRY_DELAYS_S) + 1} times over "
                    f"{sum(RETRY_DELAYS_S):g} s. Put it back; the same command then goes on from the last checkpoint"
                ) from error
            log.warning("%s: %s; trying again in %g s", what, error.strerror, delay)
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


class Subset:
    """Some images of another source, in its order."""

    def __init__(self, parent: Source, rows: Sequence[int], split: str) -> None:
        self.parent, self.rows, self.layout, self.classes = parent, list(rows), parent.layout, parent.classes
        self.where = f"{parent.where} ({split})"
        self.labels: list[Any] = [parent.labels[row] for row in self.rows]

    def name(self, index: int) -> str:
        return self.parent.name(self.rows[index])

    def read(self, index: int) -> Any:
        return self.parent.read(self.rows[index])

    def contents(self) -> Any:
        return [self.parent.contents(), self.rows]


def tell_missing(where: str, files: Sequence[Path]) -> None:
    """Warns where numbered files fall short of their own "-of-N", or have a hole counted from 0 or 1."""
    series: dict[tuple, dict[int, str]] = {}
    for file in files:
        if found := NUMBERED.fullmatch(file.name):
            before, number, total, ending = found.groups()
            series.setdefault((file.parent, before, total, ending), {})[int(number)] = file.name
    totals: dict[tuple, set[str]] = {}
    for (folder, before, total, ending), names in series.items():
        known = totals.setdefault((folder, before, ending), set())
        known |= {total} if total else set()
        if len(known) > 1:
            numbers = " and of ".join(sorted(known))
            tell(f"{where}: files like {names[min(names)]} are numbered of {numbers}, as if written twice; all are read")
        first = min(names)
        wanted = range(int(total)) if total else range(first, (max(names) if first <= 1 else first) + 1)
        missing = [number for number in wanted if number not in names]
        if missing:
            example = f"{len(missing)} of {len(wanted)} files like {names[first]} are missing"
            tell(f"{where}: {example}, the first of them number {missing[0]}; the others are read")
