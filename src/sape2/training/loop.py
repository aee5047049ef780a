"""The training loop: batch, step, look, save. It writes the run folder as it goes.

A step depends only on (config, seed, step) and the weights before it, so a run resumed at any step gives the same
weights as one that never stopped. Several processes share each batch; only the main one touches the run folder.

Its parts: `steps` (one update from one batch), `record` (what is written), `interruption` (signals and the bar). Those of
a step: `accelerator` (device, precision), `optimisation` (optimiser, schedule), `weights` (model and average, whole or
divided), `data.augment` and `data.mixing` (what a step sees).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from torch import nn

from sape2.config import RunConfig
from sape2.data import ImageData, ImageFiles
from sape2.machine import find_device, keep_freed_memory, precision_of
from sape2.runs.checkpoint import Progress
from sape2.runs.run import Run
from sape2.runs.settings import difference
from sape2.training.accelerator import passed_over
from sape2.training.interruption import Stopped, catch_signals, progress_bar
from sape2.training.processes import ALONE, Processes
from sape2.training.record import Record
from sape2.training.steps import ImageSteps, Steps

# model -> (accuracy, loss) on the validation set; called in every process, and the same in each
Evaluate = Callable[[nn.Module], tuple[float, float]]
# called after each step with where the run stands; what it returns goes into the epoch's line
Watch = Callable[[Progress], dict[str, Any] | None]
CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the accelerator


def train(
    model: nn.Module,
    images: ImageData | ImageFiles,
    evaluate: Evaluate,
    run: Run[RunConfig],
    quiet: bool = False,
    watch: Watch = lambda progress: None,
    processes: Processes = ALONE,
) -> None:
    """Trains from the last checkpoint of the run, or from the start, to the end of the last epoch.

    Problems that would stop the first step are found before anything is written. Writes config.json, metrics.jsonl, TensorBoard
    events, checkpoints, best.safetensors, and last of all model.safetensors. `watch` stops the run by raising. Raises
    ValueError when the loss is no longer finite, OSError once a lock on the folder is lost, Stopped on SIGINT and
    SIGTERM. Of several `processes` all must call it; the folder is that of the main one.
    """
    config = run.config
    check_same_run(config, images.fingerprint, processes)
    if processes.is_main:
        run.check_settings()
        run.check_images(images.fingerprint)
    steps = ImageSteps(model, images, config, run.checkpoint, processes)
    record, progress = Record(run, processes.is_main, quiet), steps.progress
    where = {"precision": precision_of(config.train.precision), "device": steps.accelerator.device.type}
    record.begin(progress, images.fingerprint)
    record.tell_change(where)

    def end_epoch(epoch: int, sums: dict[str, float], known: dict[str, Any]) -> None:
        """Measures the validation set with the average, if there is one, in the precision of the training."""
        waited = max(processes.gather(sums["wait_seconds"]))
        weights = steps.weights.whole()[-1]
        with steps.accelerator.autocast():  # the average and undivided weights were copied before accelerate had the model
            accuracy, loss = evaluate(weights)
        record.check()
        best = accuracy > progress.best_accuracy
        if best:
            progress.best_accuracy, progress.best_epoch = accuracy, epoch
        row = {
            "epoch": epoch,
            "step": progress.step,
            "lr": steps.rate_at(progress.step - 1),
            "loss": sums["loss"] / sums["images"],
            "accuracy": sums["correct"] / sums["images"],
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "images_per_s": sums["images"] / sums["seconds"],
            "wait_fraction": min(1.0, waited / sums["seconds"]),
            "seconds": sums["seconds"],
            "processes": processes.size,
        }
        row |= where | known
        told = f"epoch {epoch}/{config.train.epochs}  "
        told += f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}  validation {accuracy:.4f}  "
        told += f"{row['images_per_s']:.0f} images/s"
        record.epoch(row, told, weights if best else None)

    try:
        run_steps(steps, record, end_epoch, watch)
    finally:
        record.close()


def run_steps(
    steps: Steps,
    record: Record,
    end_epoch: Callable[[int, dict[str, float], dict[str, Any]], None],
    watch: Watch = lambda progress: None,
) -> None:
    """The loop. It saves at the end of each epoch, after `end_epoch`, and saves and stops on a signal.

    `end_epoch` gets the epoch, the sums over its steps, and what `watch` found out.
    """
    if find_device().type == "cpu":
        keep_freed_memory()
    stream, progress, processes = steps.stream, steps.progress, steps.weights.processes
    known: dict[str, Any] = {}
    for line in passed_over():
        record.say(line)
    patient = processes.size > 1  # a launcher sends on what the process has had already
    with (
        catch_signals(patient) as caught,
        progress_bar(stream.total_steps, progress.step, record.quiet) as show,
        closing(stream.batches(progress.step)) as batches,  # else its workers live as long as an error is kept
    ):
        mark = time.perf_counter()
        while progress.step < stream.total_steps:
            batch = next(batches)
            waited = time.perf_counter() - mark
            processes.barrier()  # all have their images
            steps.take(batch)
            progress.step += 1
            epoch, done = divmod(progress.step, stream.steps_per_epoch)
            stop = processes.largest(caught[0] if caught else 0)  # once: all stop here, and say what they did
            every = steps.config.checkpoint_every
            save = bool(done == 0 or stop or (every and progress.step % every == 0))
            if save or progress.step % CHECK_EVERY == 0:
                _check_losses(steps, record)
            if save and not steps.weights.are_finite():  # which can happen after a finite loss
                raise _diverged(steps, record, progress.step - 1, "the weights are no longer finite")
            now = time.perf_counter()
            _add(progress, seconds=now - mark, wait_seconds=waited)
            mark = now
            show(progress, epoch + (done > 0), steps.config.epochs)
            known |= watch(progress) or {}
            if save:
                record.check()  # before what takes long
                if done == 0:
                    sums, progress.sums = progress.sums, {}
                    end_epoch(epoch, sums, known)
                record.checkpoint(progress, steps.weights.whole(), steps.state())
                mark = time.perf_counter()
            if stop and progress.step < stream.total_steps:
                raise Stopped(stop, f" at step {progress.step}")
    record.finish(steps.weights.whole()[-1])


def _check_losses(steps: Steps, record: Record) -> None:
    """Adds up what the last steps gave; raises ValueError at the first loss that is not finite."""
    for step, numbers in steps.look():
        if not math.isfinite(numbers["loss"]):
            raise _diverged(steps, record, step, f"the loss is {numbers['loss']}")
        _add(steps.progress, **numbers | {"loss": numbers["loss"] * numbers.get("images", 1.0)})


def _add(progress: Progress, **values: float) -> None:
    for name, value in values.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + value


def _diverged(steps: Steps, record: Record, step: int, what: str) -> ValueError:
    """All processes come here, since all have seen the losses of all."""
    last = steps.weights.processes.from_main(record.run.checkpoint)
    kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return ValueError(
        f"{what} at step {step} (epoch {step // steps.stream.steps_per_epoch + 1}, learning rate {steps.rate_at(step):.3g}); "
        f"{kept}. Try, with another --out, a lower --set {steps.settings}.lr, --set {steps.settings}.clip_grad=1, or "
        f"--set {steps.settings}.precision=fp32"
    )


def check_same_run(config: RunConfig, fingerprint: dict[str, Any] | None, processes: Processes) -> None:
    """Raises ValueError in every process unless all were started with one config, on the same images."""
    mine = config.identity() | {"images": fingerprint}
    mine |= {name: getattr(config.train, name) for name in ("checkpoint_every", "parallel", "compile")}
    for rank, theirs in enumerate(processes.gather(mine)):
        if theirs != mine:
            raise ValueError(
                f"process {rank} was started with other settings or images than process {processes.rank}: "
                f"{difference(theirs, mine)}; give every process the same command"
            )
