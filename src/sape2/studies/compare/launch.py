"""Runs a study as submitit jobs, one for each run, in the queue of Slurm. On one machine the lock of a run folder does it.

Each job does one run with `work`. The run folders say which runs remain, so it does not matter whether a job ends, is killed
or never starts: a run that is not settled when its job is over is submitted again. All jobs of one run have the same name,
and of these only one may run at a time (`singleton`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sape2.config.extras import from_extra
from sape2.data import load_data
from sape2.runs.files import digest_of, write_text
from sape2.runs.lock import Held
from sape2.studies.compare.plan import Cell, Study
from sape2.studies.compare.rawrows import Row, failure, note_failure
from sape2.studies.compare.work import DEATHS, LOOK_S, Tell, reason_of, runner, work
from sape2.training.interruption import Stopped, catch_signals

REQUEUES = 10**6  # of a job, at most: submitit wants a number, and a run goes on as often as it must
OURS = ("array_parallelism", "dependency", "job_name", "name", "nodes", "ntasks_per_node", "tasks_per_node")


def jobs_folder(study: Study, cell: Cell) -> Path:
    """Folder of the logs and job files of a cell; hidden, so that it is not part of the results."""
    return study.folder / ".jobs" / cell.folder.name


def _reason_file(study: Study, cell: Cell) -> Path:
    return jobs_folder(study, cell) / "reason.txt"


# --- in the job ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellJob:
    """A job: resumes its run from the last checkpoint. Before its time limit it saves a checkpoint and is requeued."""

    study: Study
    cell: Cell

    def __call__(self) -> None:
        with _requeue_when_asked() as requeue, catch_signals() as caught:
            try:
                splits = load_data(self.cell.config.data, self.cell.config.model)
                work(self.study, runner(splits), caught=caught, cells=[self.cell])
            except (Stopped, KeyboardInterrupt):
                requeue()
            except Exception as error:  # of everyone, a full disk say: what is wrong with this run alone is noted by `work`
                traceback.print_exc()
                write_text(_reason_file(self.study, self.cell), reason_of(error))

    def checkpoint(self) -> Any:
        """Called by submitit on requeueing: submits the same job, since a run resumes from its folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextmanager
def _requeue_when_asked() -> Iterator[Callable[[], None]]:
    """SIGUSR2, by which a job is told that its time is over, becomes SIGTERM, which ends training after the step.

    What it gives is to be called then: submitit's own handler, which requeues the job and exits, if that signal came.
    """
    asked: list[int] = []

    def remember(number: int, _: Any) -> None:
        if not asked:
            asked.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

    def requeue() -> None:
        if asked and callable(previous):
            previous(asked[0], None)

    previous = signal.signal(signal.SIGUSR2, remember)
    try:
        yield requeue
    finally:
        signal.signal(signal.SIGUSR2, previous)


# --- where jobs run --------------------------------------------------------------------------------------------------


class Slurm:
    """The queue, with `parameters` of sbatch by submitit's names. Raises ValueError for one that is unknown or ours."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._submitit = from_extra("cluster", "submitit", "--launcher needs submitit")
        self.parameters = dict(parameters)
        if taken := sorted(set(self.parameters) & set(OURS)):
            raise ValueError(f"--slurm may not set {', '.join(taken)}: every job is one task for one run, and named after it")
        self._executor(Path(os.devnull), "sape2")

    def submit(self, study: Study, cell: Cell) -> Any:
        """The job of this cell that an earlier command left in the queue, else a new one."""
        folder, name = jobs_folder(study, cell), f"sape2-{digest_of({'folder': str(cell.folder.resolve())})}"
        return self._in_queue(folder) or self._executor(folder, name).submit(CellJob(study, cell))

    def _executor(self, folder: Path, name: str) -> Any:
        try:
            executor = self._submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
            known = executor._convert_parameters(self.parameters)
            executor.update_parameters(**known, job_name=name, dependency="singleton", additional_parameters={"requeue": True})
        except RuntimeError as error:
            raise ValueError(f"--launcher slurm needs sbatch, srun and sacct on this machine: {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"--slurm: {' '.join(str(error).split())}") from error
        return executor

    def _in_queue(self, folder: Path) -> Any:
        for path in sorted(folder.glob("*_submitted.pkl"), reverse=True):
            job = self._submitit.SlurmJob(folder, path.name.removesuffix("_submitted.pkl"))
            if not job.done(force_check=True) and job.state != "UNKNOWN":  # forgotten by Slurm: `singleton` guards the next
                return job
        return None


# --- in the command --------------------------------------------------------------------------------------------------


def launch(
    study: Study,
    launcher: Slurm,
    at_a_time: int | None = None,
    tell: Tell = lambda what, cell, rows: None,
    caught: Sequence[int] = (),
) -> list[Row]:
    """Submits a job for each run that is not settled, at most `at_a_time` (None: all), until all are; returns the rows.

    A run whose job is over without it is submitted again. After DEATHS such jobs at one checkpoint it is noted as failed.
    Raises OSError when a job met an error that is not of its run alone, Stopped once a signal is in `caught`; jobs in the
    queue go on then.
    """
    jobs = _Jobs(study, launcher, at_a_time or len(study.cells))
    while left := jobs.settle(tell):
        if caught:
            raise Stopped(caught[0])
        jobs.submit(left, tell)
        time.sleep(LOOK_S)
    return study.gather()


class _Jobs:
    """The jobs under way, by the digest of their cell: (cell, job)."""

    def __init__(self, study: Study, launcher: Slurm, at_a_time: int) -> None:
        self.study, self.launcher, self.at_a_time = study, launcher, at_a_time
        self.running: dict[str, tuple[Cell, Any]] = {}
        self.fruitless: Counter[tuple[str, str]] = Counter()

    def submit(self, left: list[Cell], tell: Tell) -> None:
        for cell in left:
            if cell.digest in self.running or len(self.running) >= self.at_a_time:
                continue
            _reason_file(self.study, cell).unlink(missing_ok=True)
            self.running[cell.digest] = cell, self.launcher.submit(self.study, cell)
            tell("submitted", cell, [])

    def settle(self, tell: Tell) -> list[Cell]:
        """Looks at all jobs, first whether they are over and then at what is there; the cells that are left."""
        over = {digest for digest, (_, job) in self.running.items() if job.done()}
        settled = self.study.settled()
        for digest, (cell, _) in list(self.running.items()):
            if digest in settled or (digest in over and self._is_given_up(cell)):
                tell("failed" if failure(cell.run) else "finished", cell, self.study.gather())
            if digest in settled | over:
                del self.running[digest]
        settled = self.study.settled() if over else settled
        return [cell for cell in self.study.cells if cell.digest not in settled]

    def _is_given_up(self, cell: Cell) -> bool:
        """Handles a job that ended before its run did; True, and the failure is recorded, after too many of them."""
        reason = _reason_file(self.study, cell)
        if reason.exists():
            raise OSError(f"the job of {cell.name} stopped: {reason.read_text(encoding='utf-8')}; logs: {reason.parent}")
        at = cell.run.reached
        self.fruitless[cell.digest, at] += 1
        if self.fruitless[cell.digest, at] < DEATHS:
            return False
        with contextlib.suppress(Held), cell.run.hold():
            if not cell.run.is_measured:
                logs = jobs_folder(self.study, cell)
                note_failure(cell.run, f"{DEATHS} jobs in turn ended in it at {at}; their logs: {logs}")
            return True
        return False
