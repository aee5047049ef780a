"""What a command says while it works, on standard error: lines, and progress bars in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unicodedata import category

LINE_ENDS = ("Cc", "Zl", "Zp")  # and other control characters, as Unicode calls them


def one_line(text: str) -> str:
    """Text with line ends and other control characters written as in Python: a file may be named so.

    A terminal would obey them: clear itself, take another title, or show another name.
    """
    return text if text.isprintable() else "".join(ascii(s)[1:-1] if category(s) in LINE_ENDS else s for s in text)


def say(text: str) -> None:
    """Prints a line on standard error. If its reader has gone (2>&1 | head), it is lost, and the work goes on."""
    try:
        print(one_line(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def bars(*columns: Any, quiet: bool = False, transient: bool = False) -> Any:
    """A `rich.progress.Progress` on standard error, disabled if `quiet` or without a terminal.

    Without `columns`: description (as it is: brackets in a path are no markup), bar, per cent, time left and elapsed time.
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    described = TextColumn("{task.description}", markup=False)
    columns = columns or (described, *Progress.get_default_columns()[1:], TimeElapsedColumn())
    return Progress(*columns, console=console, transient=transient, disable=quiet or not console.is_terminal)


@contextmanager
def progress_bar(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """One bar, moved by a function that takes how much is done; it goes away at the end."""
    with bars(quiet=quiet, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
