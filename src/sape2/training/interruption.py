"""Stops a run between two steps on a signal, and shows its progress."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sape2.progress import bars
from sape2.runs.checkpoint import Progress


class Stopped(Exception):
    """A signal asked the process to stop; what it did is saved."""

    def __init__(self, signal_number: int, where: str = "") -> None:
        super().__init__(f"stopped{where}; the same command goes on from there")
        self.signal_number = signal_number


@contextmanager
def catch_signals(patient: bool = False) -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM, which then does not end the process in the middle of a step.

    A second one ends it, unless it is `patient`. A signal that is ignored stays so: a script's shell gives SIGINT to its
    jobs in the background, too, and asks them to ignore it.
    """
    caught: list[int] = []
    previous = {}

    def remember(number: int, _: Any) -> None:
        if caught and not patient:  # the second time: now
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # not the main thread
            break
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(total: int, start: int, quiet: bool) -> Iterator[Callable[[Progress, int, int], None]]:
    """A bar on standard error with epoch, loss, accuracy, images/s and time left."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with bars(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), quiet=quiet) as bar:
        task = bar.add_task("training", total=total, completed=start)

        def show(progress: Progress, epoch: int, epochs: int) -> None:
            sums = progress.sums
            count = sums.get("images", 0.0)
            text = f"epoch {epoch}/{epochs}"
            if count:
                rate = count / sums["seconds"]
                text += f"  loss {sums['loss'] / count:.3f}  accuracy {sums['correct'] / count:.3f}  {rate:.0f} images/s"
            bar.update(task, completed=progress.step, description=text)

        yield show
