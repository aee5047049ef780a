"""Atomic writing of files and folders: they appear complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WAY_OUT = "what was there is unchanged; make room or the folder writable, and give the same command again"
WRITER = re.compile(r"StreamWriter|inline_container|iostream|writing|write failed|cannot be opened|directory .* does not exist")


def safe_name(encoding: str) -> str:
    """ "ape+sape2:count=cyclic" -> "ape+sape2_count=cyclic": a valid and not too long part of a path."""
    name = re.sub(r"[^\w+=.-]+", "_", encoding)
    return name if len(name) <= 120 else f"{name[:100]}-{digest_of({'encoding': encoding})}"


def digest_of(settings: dict[str, Any]) -> str:
    """A digest of sixteen digits that identifies settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def beside(path: Path) -> Path:
    """A hidden name in the same folder that no other thread, process or machine makes, to be renamed onto `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)` beside `path`, then renamed onto it, so that a reader sees the old file or the new one.

    Raises OSError that names `path` if it cannot be written; torch and safetensors raise errors of their own for a full disk.
    """
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # who may use the folder may use the file
        _sync(temporary)
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:
        if not _is_about_writing(error):
            raise
        raise OSError(f"{path} cannot be written: {(str(error).splitlines() or ['no reason given'])[0]}; {WAY_OUT}") from error
    except OSError as error:
        if error.errno is None:  # not the system's: it says what it is about
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}; {WAY_OUT}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_about_writing(error: Exception) -> bool:
    """torch's writer of zip files raises a plain RuntimeError; its other errors (memory, a lost process) have other words."""
    return isinstance(error, SafetensorError) or (type(error) is RuntimeError and bool(WRITER.search(str(error))))


def holds_files(folder: Path) -> bool:
    """True if the path is a folder that contains anything but hidden files."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def check_writable(folder: Path, way_out: str = "choose another --out") -> None:
    """Raises OSError in one line, before any work, if no file can be made in a folder that is there or is to be made.

    It creates and removes a file, because write access also depends on how a disk is mounted.
    """
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), folder)
    if not there.is_dir():
        what = "a file, not a folder" if there.exists() else "a link that leads nowhere"
        raise NotADirectoryError(f"{there} is {what}; {way_out}")
    probe = beside(there / "sape2")
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error.strerror}; {way_out}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes files that killed processes left incomplete in the folder; only for a process that holds its lock."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> str:
    """The text of a file of ours, to which an editor may have added a byte order mark. Raises ValueError if it is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
