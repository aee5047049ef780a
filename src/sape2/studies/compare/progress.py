"""Progress of a study on standard error: a bar for all runs, one for the present run, and a line when a run starts or ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sape2.progress import bars
from sape2.runs.checkpoint import Progress
from sape2.studies.compare.plan import Cell, Study
from sape2.studies.compare.rawrows import Row, final_accuracy

BARS = {"submitted": "jobs under way", "waiting": "waiting for runs of other processes"}
LINES = {"starting": "starting, or going on, in", "submitted": "submitted, to start or go on in"}


@contextmanager
def study_progress(study: Study) -> Iterator[StudyProgress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bars(*columns, TextColumn("left"), TimeRemainingColumn()) as bar:
        yield StudyProgress(study, bar)


class StudyProgress:
    """`tell` is told by `work`, `step` by the training of the present run."""

    def __init__(self, study: Study, bar: Any) -> None:
        self.bar, self.digests, self.settled = bar, {cell.digest for cell in study.cells}, 0
        self.runs = bar.add_task("runs", total=len(study.cells))
        self.run = bar.add_task("", total=None, visible=False)
        self._settle(study.gather())

    def tell(self, what: str, cell: Cell, rows: list[Row]) -> None:
        if what in ("finished", "failed"):
            self._settle(rows)
            self.bar.update(self.run, visible=False)
            self._say(self._end(next(row for row in rows if row["digest"] == cell.digest), cell))
            return
        self.bar.reset(self.run, description=BARS.get(what, cell.name), visible=True, total=None)
        if what in LINES:
            self._say(f"{cell.name}: {LINES[what]} {cell.folder}")

    def step(self, progress: Progress, total: int) -> None:
        """Called after each step of the present run."""
        self.bar.update(self.run, completed=progress.step, total=total)
        self.bar.update(self.runs, completed=self.settled + progress.step / total)

    def _settle(self, rows: list[Row]) -> None:
        """Counts the runs of this study that are finished or failed; the folder may hold others."""
        self.settled = len({row["digest"] for row in rows} & self.digests)
        self.bar.update(self.runs, completed=self.settled)

    def _end(self, row: Row, cell: Cell) -> str:
        done = f"({self.settled} of {len(self.digests)} runs)"
        if "failed" in row:
            return f"{cell.name}: failed: {row['failed']} {done}"
        return f"{cell.name}: accuracy {final_accuracy(row):.4f}, {timedelta(seconds=round(row['training_s']))} {done}"

    def _say(self, line: str) -> None:
        self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
