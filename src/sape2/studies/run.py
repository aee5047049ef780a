"""Trains and measures one run, for `sape2 train` and for every run of `sape2 compare`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sape2.config import RunConfig
from sape2.data import ImageData, ImageFiles, Splits, load_data
from sape2.evaluation.accuracy import quick_accuracy
from sape2.evaluation.cost.memory import PeakMeter
from sape2.evaluation.runs import measure
from sape2.machine import find_device
from sape2.models.trained import build_model
from sape2.models.vit import ViT
from sape2.runs.checkpoint import Progress
from sape2.runs.files import sweep
from sape2.runs.run import Run
from sape2.tables import Row
from sape2.training.interruption import Stopped
from sape2.training.loop import train
from sape2.training.memory_errors import told_in_one_line, training_message
from sape2.training.processes import ALONE, Dismissed, Processes

MIB = 2**20
NOWHERE = Path(os.devnull)  # no file can be made in it
WARM_UP = 2  # steps before the one whose memory is measured: the optimiser's state is there then


def run_to_end(
    model: ViT,
    splits: Splits,
    run: Run[RunConfig],
    quiet: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
    processes: Processes = ALONE,
) -> list[Row]:
    """Resumes training of a run that this process holds, unless it is finished, and measures the test set.

    Nothing is saved once the lock is lost. `watch` is called with the progress after each step. Raises ValueError if the
    folder holds another run, or one on other images; what `train` and `Lock.check` raise; OutOfMemory. The other `processes`
    must call `help_to_train`; they end when the training is done.
    """
    run.check_settings()
    run.check_images(splits.train.fingerprint)
    sweep(run.folder)
    if run.state != "finished":
        config = run.config
        memory = StepMemory(len(splits.train) // config.train.batch_size)

        def look(progress: Progress) -> Row:
            watch(progress)
            return memory.after_step(progress.step)

        try:
            with told_in_one_line(lambda: training_message(config, processes.size)):
                validate = validation_of(splits, processes)
                train(model, splits.train, validate, run, quiet, look, processes)
        finally:
            memory.close()
    processes.leave()
    run.check_lock()
    return measure(run, splits, ["accuracy"], "test", ["last", "best"])


def help_to_train(config: RunConfig, processes: Processes) -> int:
    """The work in `run_to_end` of every process but the main one; touches no folder. Returns an exit status."""
    try:
        splits = load_data(config.data, config.model)
        model, validate = build_model(config), validation_of(splits, processes)
        with told_in_one_line(lambda: training_message(config, processes.size)):
            train(model, splits.train, validate, Run(NOWHERE, config), processes=processes)
    except Stopped as stopped:
        return 128 + stopped.signal_number
    except Dismissed:  # the main process found nothing to train
        pass
    return 0


def validation_of(splits: Splits, processes: Processes) -> Callable[[nn.Module], tuple[float, float]]:
    """`shared_accuracy` on the validation set, in the form that `train` takes."""
    return lambda trained: shared_accuracy(trained, splits.validation, processes)


def shared_accuracy(model: nn.Module, data: ImageData | ImageFiles, processes: Processes) -> tuple[float, float]:
    """`quick_accuracy` of all images, of which each process measures every size-th: each image counts once."""
    if processes.size == 1:
        return quick_accuracy(model, data)
    mine = torch.arange(processes.rank, len(data), processes.size)
    accuracy, loss = quick_accuracy(model, data[mine]) if len(mine) else (0.0, 0.0)
    parts = processes.gather((round(accuracy * len(mine)), loss * len(mine)))
    return sum(correct for correct, _ in parts) / len(data), sum(loss for _, loss in parts) / len(data)


class StepMemory:
    """The highest extra memory of one step, its batch included, measured once in every process that trains a run."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch, self.seen = steps_per_epoch, 0
        self.meter: PeakMeter | None = None
        self.known: Row = {}

    def after_step(self, step: int) -> Row:
        """Called after every step; returns the memory measured so far. The measured step is never the last of an epoch."""
        self.seen += 1
        if self.meter is not None:
            self.known = {"step_memory_mib": self.meter.stop() / MIB}
            self.meter = None
        elif not self.known and self.seen >= WARM_UP and step % self.steps_per_epoch:
            place = find_device()
            if place.type in ("cpu", "cuda"):
                self.meter = PeakMeter(place)
                self.meter.start()
        return self.known

    def close(self) -> None:
        """Ends a measurement that an exception interrupted."""
        if self.meter is not None:
            self.meter.stop()
