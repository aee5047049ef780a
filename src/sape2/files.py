"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def beside(path: Path) -> Path:
    """A hidden name in the same folder that no other thread, process or machine makes, to be renamed onto `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)` beside `path`, then renamed onto it, so that a reader sees the old file or the new one.

    Raises OSError if it cannot be written; torch and safetensors raise errors of their own for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        write(temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # who may use the folder may use the file
        _sync(temporary)
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
