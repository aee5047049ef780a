"""Progress of a study on standard error: finished runs, current run, time left; one line for each run without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sape2.progress import bars
from sape2.runs.checkpoint import Progress
from sape2.runs.lock import NAME
from sape2.studies.compare.plan import Cell, Study
from sape2.studies.compare.rawrows import Row, final_accuracy
from sape2.studies.compare.work import seconds_left


@contextmanager
def study_progress(study: Study) -> Iterator[StudyProgress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    left = TextColumn("{task.fields[left]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    with bars(*columns) as bar:
        yield StudyProgress(study, bar, bar.console)


class StudyProgress:
    """`tell` is told by `work`, `step` by the training of the present run."""

    def __init__(self, study: Study, bar: Any, console: Any) -> None:
        self.study, self.bar, self.console = study, bar, console
        self.rows: list[Row] = study.gather()
        self.cell: Cell | None = None
        self.start, self.first_step, self.shown = 0.0, -1, 0.0
        self.began, self.besides = 0.0, 0.0  # when this run began; what the last whole one took besides its training
        self.runs = bar.add_task("runs", total=len(study.cells()), left="")
        self.run = bar.add_task("", total=None, visible=False, left="")
        self._show_runs()

    def tell(self, what: str, cell: Cell, rows: list[Row]) -> None:
        if what == "starting":
            self.cell, self.first_step, self.began = cell, -1, time.monotonic()
            self.bar.reset(self.run, description=cell.name, visible=True, total=None)
        elif what == "submitted":
            self.bar.reset(self.run, description="jobs under way", visible=True, total=None)
        elif what == "waiting":
            self.bar.reset(self.run, description="waiting for runs of other processes", visible=True, total=None)
        else:
            self.rows, self.cell = rows, None
            self._look_back(cell)
            self.bar.update(self.run, visible=False)
            self._show_runs()
        if what != "waiting":
            self.console.print(self._line(what, cell), highlight=False, markup=False, soft_wrap=True)

    def _line(self, what: str, cell: Cell) -> str:
        if what == "starting":
            return f"{cell.name}: starting, or going on, in {cell.folder}"
        if what == "submitted":
            return f"{cell.name}: submitted, to start or go on in {cell.folder}"
        row = next(row for row in self.rows if row["digest"] == cell.digest)
        done = f"{self._settled()} of {len(self.study.cells())} runs"
        if "failed" in row:
            return f"{cell.name}: failed: {row['failed']} ({done})"
        return f"{cell.name}: accuracy {final_accuracy(row):.4f}, {duration(row['training_s'])} ({done}{self._left()})"

    def _look_back(self, cell: Cell) -> None:
        """Learns the overhead besides training from a run that this process did from its first step to its end."""
        took = next((row["training_s"] for row in self.rows if row["digest"] == cell.digest and "failed" not in row), None)
        if took is not None and self.first_step == 1:
            self.besides = max(0.0, time.monotonic() - self.began - took)

    def step(self, progress: Progress, total: int) -> None:
        """Called after each step of the current run; updates the display once a second."""
        if self.first_step < 0:
            self.start, self.first_step = time.monotonic(), progress.step
        now = time.monotonic()
        if now - self.shown < 1 and progress.step < total:
            return
        self.shown = now
        self.bar.update(self.run, completed=progress.step, total=total)
        self._show_runs((progress.step, total))

    def _show_runs(self, at: tuple[int, int] = (0, 1)) -> None:
        self.bar.update(self.runs, completed=self._settled(), left=self._left(at).removeprefix(", "))

    def _settled(self) -> int:
        """Runs of this study that are finished or failed; the folder may hold others."""
        return len({row["digest"] for row in self.rows} & {cell.digest for cell in self.study.cells()})

    def _left(self, at: tuple[int, int] = (0, 1)) -> str:
        """Text of the time left, if the work is shared by all processes that hold a run."""
        held = sum((cell.folder / NAME).exists() for cell in self.study.cells())
        present = None
        if self.cell is not None and at[0] > self.first_step:
            whole = (time.monotonic() - self.start) * at[1] / (at[0] - self.first_step)
            present = self.cell, at[0] / at[1], whole
        seconds = seconds_left(self.study, self.rows, held, present, self.besides)
        return "" if not seconds else f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
