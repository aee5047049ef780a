"""A lock on a folder for one process. The kernel releases it when the process ends, however it ends.

The lock is flock on the file `.lock` in the folder, through filelock, so it needs no timeout and no heartbeat. The text of
the file says who holds it. A holder that ends normally removes the file; one that was killed leaves it, so that the next
holder can count it. Where the file system has no flock, OSError is raised rather than falling back to another kind of lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


@dataclass(frozen=True)
class Holder:
    """The holder of a folder. `note` is the caller's; `deaths` counts earlier holders with the same note that were killed."""

    pid: int = 0
    host: str = "an unknown machine"
    since: str = "an unknown time"
    note: str = ""
    deaths: int = 0


class Held(ValueError):
    """Another process, or another part of this one, holds the folder."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        super().__init__(
            f"{folder} is in use by process {holder.pid} on {holder.host} since {holder.since}; "
            "wait for it, stop it, or choose another --out"
        )


class LockLost(OSError):
    """The file of the lock is not the one that this process holds: someone removed or replaced it."""


class Lock:
    """A folder held until the `with` block ends; `check` says if it still is."""

    def __init__(self, folder: Path, file: FileLock, holder: Holder, made: list[Path]) -> None:
        self.folder, self.holder, self._file, self._made = folder, holder, file, made
        self._inode = _inode(folder / NAME)

    def check(self) -> None:
        """Raises FileNotFoundError if the folder is gone, LockLost if its lock was removed or replaced."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was removed while it was being written to; nothing more is written there")
        if self._inode is None or _inode(self.folder / NAME) != self._inode:
            raise LockLost(f"the lock of this process on {self.folder} was removed or replaced; nothing more is written there")

    def release(self) -> None:
        """Releases the lock, and removes folders that were created only for it if they are still empty."""
        with contextlib.suppress(OSError):
            self.check()
            (self.folder / NAME).unlink()  # first: one that opened it meanwhile sees that it is no file any more
            for folder in reversed(self._made):
                folder.rmdir()
        self._file.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(folder: Path, note: str = "") -> Lock:
    """Locks the folder, which is created if necessary. Raises Held at once if it is taken, OSError if it cannot be written."""
    made, path = _make(folder), folder / NAME
    file = _acquire(folder)
    before = _read(path)
    deaths = before.deaths + 1 if before is not None and before.note == note else 0
    lock = Lock(
        folder, file, Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"), note, deaths), made
    )
    try:
        path.write_text(json.dumps(asdict(lock.holder)), encoding="utf-8")
        lock.check()
    except BaseException:
        lock.release()
        raise
    return lock


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process or thread is in such a block with this folder; for what is read, changed and written.

    It locks the folder itself and leaves no file. Where there is no such lock, the block is entered without one.
    """
    place = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        place = os.open(folder, os.O_RDONLY)
        fcntl.flock(place, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if place is not None:
            os.close(place)


def _acquire(folder: Path) -> FileLock:
    path = folder / NAME
    file = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    while True:
        try:
            file.acquire()
            return file
        except Timeout:
            holder = _read(path)
            if path.exists():  # else it was given back in between
                raise Held(folder, holder or Holder()) from None


def _make(folder: Path) -> list[Path]:
    """Makes the folder; returns those that were not there, from the outermost."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
    return missing[::-1]


def _read(path: Path) -> Holder | None:
    """The holder written in the file; None if nothing is written yet or the file is damaged."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
