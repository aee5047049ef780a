"""Executes a study, shared by any number of processes; a run that fails is recorded, and the others continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from sape2.data import Splits
from sape2.data.augment import TrainStream
from sape2.models.trained import build_model
from sape2.runs.checkpoint import Progress
from sape2.runs.lock import Held, Lock, LockLost
from sape2.studies.compare.plan import Cell, Study
from sape2.studies.compare.rawrows import FAILED, Row, failure, note_failure
from sape2.studies.run import run_to_end
from sape2.training.interruption import Stopped

DEATHS = 3  # so many processes that vanished in a run without a new checkpoint: it is not tried a further time
LOOK_S = 2.0  # between looks at runs that others hold
Work = Callable[[Cell], None]  # trains and measures one cell, from where it stands
Tell = Callable[[str, Cell, list[Row]], None]  # hears what happens to which cell, and the rows there are then


def runner(splits: Splits, step: Callable[[Progress, int], None] = lambda progress, total: None) -> Work:
    """Runs a cell as `sape2 train` would, without a bar of its own; `step` hears the progress and the total after each step."""

    def run(cell: Cell) -> None:
        config = cell.config
        total = TrainStream(splits.train, config.augment, config.train, config.seed).total_steps
        run_to_end(build_model(config), splits, cell.run, True, lambda progress: step(progress, total))

    return run


def work(
    study: Study,
    run: Work,
    tell: Tell = lambda what, cell, rows: None,
    caught: Sequence[int] = (),
    cells: Sequence[Cell] | None = None,
) -> list[Row]:
    """Does what is left of the study together with other processes, and returns the rows when nothing is left.

    `cells` are those to do (default all). A run that another process holds is skipped and looked at again at the end: it is
    waited for, and taken up as soon as that process is gone. A run that raises is noted as failed, and the rest goes on; only
    OSError (a full disk, a folder that is gone) stops the work. `tell` hears "starting", "finished", "failed" or "waiting".
    Raises Stopped before the next run, or while waiting, once a signal is in `caught`.
    """
    for cell in _until_settled(study, study.cells if cells is None else cells, caught, tell):
        try:
            lock = cell.run.hold()
        except Held:
            continue
        with lock:
            if cell.run.is_measured or failure(cell.run):  # by another process, since we looked
                continue
            tell("starting", cell, [])
            what = _attempt(cell, lock, run)
            if what:
                tell(what, cell, study.gather())
    return study.gather()


def _until_settled(study: Study, cells: Sequence[Cell], caught: Sequence[int], tell: Tell) -> Iterator[Cell]:
    """The cells that are not settled, again and again until there are none, with a pause where a round settled none."""
    settled = study.settled()
    while left := [cell for cell in cells if cell.digest not in settled]:
        for cell in left:
            if caught:
                raise Stopped(caught[0])
            yield cell
        before, settled = settled, study.settled()
        if settled == before:
            tell("waiting", left[0], [])
            time.sleep(LOOK_S)


def _attempt(cell: Cell, lock: Lock, run: Work) -> str | None:
    """Runs the cell; "finished", or "failed" with the reason noted, or None if its lock was lost."""
    if lock.holder.deaths >= DEATHS:
        reason = f"{DEATHS} processes in turn vanished in it at {lock.holder.note}; killed for want of memory, perhaps"
        note_failure(cell.run, reason)
        return "failed"
    try:
        run(cell)
    except LockLost:
        return None
    except (OSError, Stopped):
        raise
    except Exception as error:
        lock.check()
        note_failure(cell.run, reason_of(error))
        return "failed"
    return "finished"


def reason_of(error: Exception) -> str:
    """The reason in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"[:500]


def forget_failures(study: Study) -> None:
    """Deletes the records of failures, so that failed runs are tried again from their last checkpoint."""
    for cell in study.cells:
        (cell.folder / FAILED).unlink(missing_ok=True)
