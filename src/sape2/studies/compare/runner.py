"""Runs one cell of a study as `sape2 train` would, without a progress bar of its own."""

from __future__ import annotations

from collections.abc import Callable

from sape2.data import Splits
from sape2.data.augment import TrainStream
from sape2.models.trained import build_model
from sape2.runs.checkpoint import Progress
from sape2.studies.compare.plan import Cell
from sape2.studies.compare.work import Stopped, Work
from sape2.studies.run import run_to_end
from sape2.training.loop import TrainingStopped


def runner(splits: Splits, step: Callable[[Progress, int], None] = lambda progress, total: None) -> Work:
    """The function that `work` calls for a cell; `step` is called after each step with the progress and the total steps."""

    def run(cell: Cell) -> None:
        config = cell.config
        total = TrainStream(splits.train, config.augment, config.train, config.seed).total_steps
        try:
            run_to_end(build_model(config), splits, cell.run, True, lambda progress: step(progress, total))
        except TrainingStopped as stopped:
            raise Stopped(stopped.signal_number) from stopped

    return run
