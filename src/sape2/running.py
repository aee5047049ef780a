"""One run from its settings to its rows: what `sape2 train`, and every run of `sape2 compare`, does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sape2.checkpoint import Progress, Row, check_run, is_finished
from sape2.claim import Claim
from sape2.config import RunConfig
from sape2.data import Splits
from sape2.evaluation.accuracy import quick_accuracy
from sape2.evaluation.memory import PeakMeter
from sape2.runs import measure
from sape2.shortage import in_training, told_in_one_line
from sape2.train import train
from sape2.vit import ViT

MIB = 2**20
WARM_UP = 2  # steps before the one whose memory is measured: the optimiser's state is there then


def run_to_end(
    model: ViT,
    splits: Splits,
    config: RunConfig,
    claim: Claim,
    quiet: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> list[Row]:
    """Trains on from where the run in the claimed folder stands, unless it is finished, and measures the test set.

    Nothing is saved once the claim is lost. `watch` hears where the run stands after each step. Raises what `train` and
    `Claim.check` raise, and OutOfMemory.
    """
    folder = claim.folder
    check_run(folder, config)
    if not is_finished(folder):
        memory = StepMemory(len(splits.train) // config.train.batch_size)

        def guard(progress: Progress, saving: bool) -> Row:
            if saving:
                claim.check()
            watch(progress)
            return memory.after_step(progress.step)

        def validate(trained: nn.Module) -> tuple[float, float]:
            return quick_accuracy(trained, splits.validation)

        try:
            with told_in_one_line(lambda: in_training(config)):
                train(model, splits.train, validate, config, folder, quiet, guard)
        finally:
            memory.close()
    claim.check()
    return measure(folder, splits, ["accuracy"], "test", ["last", "best"])


class StepMemory:
    """The highest extra memory of one step, its batch included, measured once in every process that trains a run."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch, self.seen = steps_per_epoch, 0
        self.meter: PeakMeter | None = None
        self.known: Row = {}

    def after_step(self, step: int) -> Row:
        """To be called after every step; what is known by then. What is measured is never an epoch's end."""
        self.seen += 1
        if self.meter is not None:
            self.known = {"step_memory_mib": self.meter.stop() / MIB}
            self.meter = None
        elif not self.known and self.seen >= WARM_UP and step % self.steps_per_epoch:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
            if device is not None and device.type in ("cpu", "cuda"):
                self.meter = PeakMeter(device)
                self.meter.start()
        return self.known

    def close(self) -> None:
        """Ends a measurement that an exception interrupted."""
        if self.meter is not None:
            self.meter.stop()
