"""The training loop. It receives model, images and an evaluate function, and writes the run folder as it goes.

A step depends only on (config, seed, step) and the weights before it, so a run resumed at any step gives the same
weights as one that never stopped. Several processes share each batch; only the main one touches the run folder.

Its parts: `accelerator` (device, precision), `optimisation` (optimiser, schedule), `weights` (model and average, whole or
divided), `record` (what is written), `interruption` (signals and the bar), `data.augment` and `data.mixing` (what a step
sees).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.config import RunConfig
from sape2.data import ImageData, ImageFiles, normalize
from sape2.data.augment import TrainStream, derive_seed
from sape2.data.mixing import BatchMixer
from sape2.encodings import AttentionEncoding
from sape2.machine import precision_of
from sape2.runs.checkpoint import Progress
from sape2.runs.run import Run
from sape2.runs.settings import difference
from sape2.training.accelerator import make_accelerator, passed_over, prepare
from sape2.training.interruption import TrainingStopped, catch_signals, progress_bar
from sape2.training.optimisation import compiled, make_optimizer, make_schedule, set_seeds
from sape2.training.processes import ALONE, Processes
from sape2.training.record import Record
from sape2.training.weights import Weights

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
    ValueError when the loss is no longer finite, OSError once a lock on the folder is lost, TrainingStopped on SIGINT and
    SIGTERM. Of several `processes` all must call it; the folder is that of the main one.
    """
    Trainer(model, images, evaluate, run, quiet, processes).run(watch)


class Trainer:
    """The state of one run: weights, optimiser, schedule, images, progress."""

    def __init__(
        self,
        model: nn.Module,
        images: ImageData | ImageFiles,
        evaluate: Evaluate,
        run: Run[RunConfig],
        quiet: bool,
        processes: Processes = ALONE,
    ) -> None:
        config = run.config
        check_same_run(config, images.fingerprint, processes)
        if processes.is_main:
            run.check_settings()
            run.check_images(images.fingerprint)
        self.config, self.evaluate, self.processes = config, evaluate, processes
        self.record = Record(run, processes.is_main, quiet)
        self.accelerator = make_accelerator(config.train.precision, processes)
        for module in model.modules():
            if isinstance(module, AttentionEncoding):
                module.check_trainable()
        images = images.kept_on(self.accelerator.device)
        self.stream = TrainStream(images, config.augment, config.train, config.seed, processes.rank, processes.size)
        self.mixer = BatchMixer(config.augment, config.train.label_smoothing, config.model.num_classes)
        self.model = model.to(self.accelerator.device)
        self.weights = Weights(self.model, config.train, processes)
        self.progress, optimizer_state = self.weights.take_up(run.checkpoint)
        divided = config.train.parallel == "fsdp"
        self.wrapped = self.weights.divide(self.accelerator) if divided else prepare(self.accelerator, self.model)
        self.called = compiled(self.wrapped) if config.train.compile else self.wrapped
        self.optimizer = make_optimizer(self.model, config.train)
        self.stepper = prepare(self.accelerator, self.optimizer)
        self.schedule = make_schedule(self.optimizer, config.train, self.stream.steps_per_epoch)
        if optimizer_state is not None:
            self._load_optimizer(optimizer_state)
        self.known: dict[str, Any] = {}  # what `watch` found out
        self.pending: list[tuple[int, Tensor]] = []  # losses not yet looked at

    def run(self, watch: Watch = lambda progress: None) -> None:
        """The training loop. It measures and saves at the end of each epoch, and saves and stops on a signal."""
        stream, progress = self.stream, self.progress
        self.record.begin(progress, stream.data.fingerprint)
        for line in passed_over():
            self.record.say(line)
        patient = self.processes.size > 1  # a launcher sends on what the process has had already
        with catch_signals(patient) as caught, progress_bar(stream.total_steps, progress.step, self.record.quiet) as show:
            batches = stream.batches(progress.step)
            mark = time.perf_counter()
            while progress.step < stream.total_steps:
                images, labels = next(batches)
                waited = time.perf_counter() - mark
                self.processes.barrier()  # all have their images
                self._step(*(t.to(self.accelerator.device, non_blocking=True) for t in (images, labels)))
                progress.step += 1
                epoch, done = divmod(progress.step, stream.steps_per_epoch)
                stop = self.processes.largest(caught[0] if caught else 0)  # once: all stop here, and say what they did
                save = self._is_saved(done, stop)
                if save or progress.step % CHECK_EVERY == 0:
                    self._look_at_losses()
                if save:
                    self._check_weights()
                now = time.perf_counter()
                self._add(seconds=now - mark, wait_seconds=waited)
                mark = now
                show(progress, epoch + (done > 0), self.config.train.epochs)
                self.known |= watch(progress) or {}
                if save:
                    self.record.check()  # before what takes long
                if done == 0:
                    self._end_epoch(epoch)
                if save:
                    self._save_checkpoint()
                    mark = time.perf_counter()
                if stop and progress.step < stream.total_steps:
                    raise TrainingStopped(stop, progress.step)
        self.record.finish(self.weights.whole()[-1])

    def _is_saved(self, done: int, stop: int) -> bool:
        """True if a checkpoint is saved after this step, the `done`-th of its epoch."""
        every = self.config.train.checkpoint_every
        return bool(done == 0 or stop or (every and self.progress.step % every == 0))

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One update from one batch of this process, in `accumulation` equal parts, without synchronising with the device.

        Shapes are the same in every step.
        """
        step, train, stream = self.progress.step, self.config.train, self.stream
        set_seeds(derive_seed(self.config.seed, "step", step, 0) % 2**32, images.device)  # the same in all, to mix one batch
        self.schedule.step_update(step)
        normalized = normalize(images, stream.data.mean, stream.data.std)
        images, targets = self.mixer(normalized, labels, stream.places, train.batch_size)
        if not self.processes.is_main:  # from here on each draws for its own images
            set_seeds(derive_seed(self.config.seed, "step", step, self.processes.rank) % 2**32, images.device)
        self.wrapped.train()
        parts = list(zip(images.chunk(train.accumulation), targets.chunk(train.accumulation), strict=True))
        total = torch.zeros((), device=images.device)
        correct = torch.zeros((), device=images.device)
        for index, (part, target) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                logits = self.called(part).float()
                loss = F.cross_entropy(logits, target) / len(parts)
                self.accelerator.backward(loss)
            total += loss.detach()
            correct += (logits.detach().argmax(1) == target.argmax(1)).sum()
        if train.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), train.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        self.weights.follow(step)
        self.pending.append((step, torch.stack([total, correct, correct.new_full((), len(images))])))

    # --- what the steps gave ------------------------------------------------------------------------------------------

    def _look_at_losses(self) -> None:
        """Adds up the losses of the last steps in all processes; raises ValueError at the first loss that is not finite."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        values = self.accelerator.reduce(torch.stack([value for _, value in pending]), "sum").tolist()
        for (step, _), (losses, correct, count) in zip(pending, values, strict=True):
            loss = losses / self.processes.size
            if not math.isfinite(loss):
                self._diverged(step, f"the loss is {loss}")
            self._add(loss=loss * count, correct=correct, images=count)

    def _check_weights(self) -> None:
        """Raises if the weights are not finite, which can happen after a finite loss, so that such weights are never saved."""
        if not self.weights.are_finite():
            self._diverged(self.progress.step - 1, "the weights are no longer finite")

    def _diverged(self, step: int, what: str) -> NoReturn:
        """All processes come here, since all have seen the losses of all."""
        last = self.processes.from_main(self.record.run.checkpoint)
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        raise ValueError(
            f"{what} at step {step} (epoch {step // self.stream.steps_per_epoch + 1}, learning rate "
            f"{self._rate_at(step):.3g}); {kept}. "
            "Try, with another --out, a lower --set train.lr, --set train.clip_grad=1, or --set train.precision=fp32"
        )

    def _rate_at(self, step: int) -> float:
        return float(self.schedule._get_lr(step)[0])

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value

    def _end_epoch(self, epoch: int) -> None:
        """Measures the validation set, in the precision of the training, and records the epoch with its weights if best.

        They are those of the moving average where there is one.
        """
        sums, self.progress.sums = self.progress.sums, {}
        waited = max(self.processes.gather(sums["wait_seconds"]))
        weights = self.weights.whole()[-1]
        with self.accelerator.autocast():  # the average and undivided weights were copied before accelerate had the model
            accuracy, loss = self.evaluate(weights)
        self.record.check()
        best = accuracy > self.progress.best_accuracy
        if best:
            self.progress.best_accuracy, self.progress.best_epoch = accuracy, epoch
        self.record.epoch(self._row(epoch, sums, waited, accuracy, loss), weights if best else None)

    def _row(self, epoch: int, sums: dict[str, float], waited: float, accuracy: float, loss: float) -> dict[str, Any]:
        """The row of an epoch for metrics.jsonl."""
        return {
            "epoch": epoch,
            "step": self.progress.step,
            "lr": self._rate_at(self.progress.step - 1),
            "loss": sums["loss"] / sums["images"],
            "accuracy": sums["correct"] / sums["images"],
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "images_per_s": sums["images"] / sums["seconds"],
            "wait_fraction": min(1.0, waited / sums["seconds"]),
            "seconds": sums["seconds"],
            "precision": precision_of(self.config.train.precision),
            "device": self.accelerator.device.type,
            "processes": self.processes.size,
        } | self.known

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        model, *average = self.weights.whole()
        state: dict[str, Any] = {"optimizer": self.weights.state_of(self.optimizer)}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.record.checkpoint(self.progress, model, average[0] if average else None, state)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        try:
            self.weights.give_state(state["optimizer"], self.optimizer)
        except (KeyError, TypeError, ValueError) as error:
            at = f" in {self.record.run.checkpoint}" if self.processes.is_main else ""  # the others have no folder
            where = f"the optimiser's state{at}"
            raise ValueError(f"{where} does not fit this version of sape2 ({error}); remove it to start again") from error
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


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
