"""Trains detectors in one process, which holds the run folder and resumes exactly at the last checkpoint.

Every random draw (order, augmentation, sampled proposals) depends only on (seed, epoch or step), so a run that was
interrupted gives the same weights as one that was not. A checkpoint is saved after every epoch, and on SIGINT or SIGTERM.
The run folder holds config.json, data.json (which images), model.safetensors (weights of the last epoch), checkpoint/,
metrics.jsonl (a line per epoch), results.jsonl. Nothing is selected on the test images.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sape2.config.detection import DetectionConfig, TrainingConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.data.augment import derive_seed, leave_signals_to_the_main_process
from sape2.detection.batches import Sample, TrainView, epoch_batches, make_transform, padded_size
from sape2.detection.coco import CocoImages, count_objects
from sape2.detection.metrics import Row, evaluate_detector, make_metric
from sape2.detection.models import build_detector, no_weight_decay
from sape2.detection.pyramid import strides
from sape2.detection.splits import check_sizes, fingerprint, open_images, read_all, same_content
from sape2.machine import find_device, hardware, precision_of
from sape2.progress import progress_bar
from sape2.runs.checkpoint import Progress, load_checkpoint, save_checkpoint, save_weights
from sape2.runs.files import sweep
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.training.accelerator import make_accelerator, passed_over, prepare
from sape2.training.interruption import TrainingStopped, catch_signals
from sape2.training.memory_errors import RESUMABLE, memory_message, told_in_one_line


def run_detection(config: DetectionConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """Trains (or goes on, or finds that it is done), measures the test images, writes and returns the rows.

    All images are read once before the first step. Raises ValueError, FileNotFoundError or ImportError, in one line, for
    what the user can put right; Held if another process works on the folder; TrainingStopped on SIGINT and SIGTERM.
    """
    run = Run(folder, config)
    config = run.config
    run.check_settings()
    done = run.results()
    if done and (config.images.name == "coco_digits" or config.images.source is None):
        return done
    make_metric(config.detector.masks)  # what is missing at the end is better known at the beginning
    with torch.device("meta"):  # what is wrong with a model shows before images are composed
        build_detector(config.model, config.detector, config.images)
    train, test = open_images(config)
    seen = fingerprint(config, train, test)
    run.check_images(seen)
    if done:
        return done
    with run.hold():
        run.check_settings()
        sweep(folder)
        check_images(config, train, test, quiet)
        if run.state != "finished":
            with memory_named(config):
                DetectionTrainer(new_detector(config), train, run, quiet, seen).train()
        return measure(run, test, quiet)


def check_images(config: DetectionConfig, train: CocoImages, test: CocoImages, quiet: bool) -> None:
    """Says what was changed or left out, and reads every image of both splits once. Raises ValueError naming file and id."""
    stride = strides(config.model.patch_size, config.detector.scales, config.detector.extra_level)[-1]
    low = min(config.images.scale_jitter, default=None)
    check_sizes(train, config.model.image_size, stride, low)
    check_sizes(test, config.model.image_size, stride)
    for note in (*train.notes, *test.notes, *passed_over()):
        say(note, quiet)
    digests = []
    for images in (train, test):
        with progress_bar(f"reading the images of {images.where}", len(images), quiet) as show:
            digests.append(read_all(images, show))
    for note in same_content(train, digests[0], test, digests[1]):
        say(note, quiet)


def measure(run: Run[DetectionConfig], images: CocoImages, quiet: bool) -> list[Row]:
    """The rows of the trained detector on the test images, written into the folder, which this process holds."""
    config = run.config
    model = new_detector(config)  # without what accelerate puts around one that is trained
    run.load(model)
    model = model.to(find_device())
    with progress_bar("measuring", len(images), quiet) as show, memory_named(config):
        rows = evaluate_detector(model, images, config, show)
    rows = [row | describe(config) for row in rows]
    run.check_lock()
    run.add_results(rows)
    return rows


def memory_named(config: DetectionConfig) -> AbstractContextManager[None]:
    what = f"with a batch of {config.training.batch_size} images"
    ways = [f"a smaller --set {name}" for name in ("training.batch_size", "detector.window", "model.image_size")]
    return told_in_one_line(lambda: memory_message(what, config.model, ways, RESUMABLE))


def new_detector(config: DetectionConfig) -> Any:
    """A detector whose weights outside its encodings depend on the seed and on nothing else."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return build_detector(config.model, config.detector, config.images)


def describe(config: DetectionConfig) -> Row:
    """The description of a run that every result row carries."""
    return {
        "encoding": config.model.encoding,
        "model": config.model.label,
        "data": config.images.name,
        "recipe": config.recipe,
        "epochs": config.training.epochs,
        "seed": config.seed,
        "changed": changed_in_words(config),
        "split": "test",
        "weights": "last",
        "precision": precision_of(config.training.precision),
        "torch": torch.__version__,
        "hardware": hardware(),
    }


# --- the loop --------------------------------------------------------------------------------------------------------


class DetectionTrainer:
    """The state of one run: model, optimiser, schedule, progress. Before it writes, it checks that the folder is still held."""

    def __init__(
        self,
        model: Any,
        images: CocoImages,
        run: Run[DetectionConfig],
        quiet: bool,
        seen: Row,
    ) -> None:
        config = run.config
        self.run, self.config, self.images, self.quiet, self.seen = run, config, images, quiet, seen
        self.accelerator = make_accelerator(config.training.precision, command="sape2 detect")
        self.model = model.to(self.accelerator.device)
        divisor = model.transform.size_divisible
        self.sizes = [padded_size(size, config.model.image_size, divisor) for size in images.sizes]
        self.transform = make_transform(config.images, config.model.image_size)
        self.steps_per_epoch = len(epoch_batches(self.sizes, config.training.batch_size, config.seed, 0))
        self.optimizer = make_optimizer(self.model, config.training)
        self.schedule = make_schedule(self.optimizer, config.training, self.steps_per_epoch)
        self.progress, state = Progress(), None
        if run.checkpoint:
            self.progress, state = load_checkpoint(run.checkpoint, self.model, None)
        self.wrapped, self.stepper = prepare(self.accelerator, self.model, self.optimizer)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def train(self) -> None:
        """Epoch by epoch to the end; at a signal saves, and raises TrainingStopped."""
        self._begin()
        with catch_signals() as caught:
            for epoch in range(self.progress.step // self.steps_per_epoch, self.config.training.epochs):
                self._run_epoch(epoch, caught)
                if self.progress.step % self.steps_per_epoch == 0:
                    self._end_epoch(epoch)
                self.run.check_lock()
                save_checkpoint(self.run.folder, self.progress, self.model, None, {"optimizer": self.optimizer.state_dict()})
                if caught and self.progress.step < self.config.training.epochs * self.steps_per_epoch:
                    raise TrainingStopped(caught[0], self.progress.step)
        self.run.check_lock()
        save_weights(self.run.weights("last"), self.model)

    def _begin(self) -> None:
        """Makes the folder, or takes it up: lines of epochs that will be run again are dropped."""
        self.run.start(self.seen)
        path, step = self.run.folder / "metrics.jsonl", self.progress.step
        write_rows(path, [row for row in read_rows(path) if row["step"] <= step])
        epoch, done = divmod(step, self.steps_per_epoch)
        place = f"going on after epoch {epoch}" + (f" and {done} steps of the next" if done else "")
        say(f"{self.run.folder}: {place if step else 'starting'}", self.quiet)
        counts = sum(count_objects(self.images).values())
        text = f"{len(self.images)} training images with {counts} objects of {len(self.images.classes)} classes"
        say(text, self.quiet)

    def _run_epoch(self, epoch: int, caught: list[int]) -> None:
        """The steps of an epoch that are not done yet, until a signal; `progress.sums` adds up their losses and seconds."""
        training, seed, sums = self.config.training, self.config.seed, self.progress.sums
        first = self.progress.step % self.steps_per_epoch
        loader: DataLoader[list[Sample]] = DataLoader(
            TrainView(self.images, self.transform, seed, epoch),
            batch_sampler=epoch_batches(self.sizes, training.batch_size, seed, epoch)[first:],
            collate_fn=list,
            num_workers=training.workers,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        mark = time.perf_counter()
        with progress_bar(f"epoch {epoch + 1}/{training.epochs}", self.steps_per_epoch, self.quiet) as show:
            for done, samples in enumerate(loader, start=first + 1):
                for name, value in self._step(samples).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.progress.step += 1
                show(done)
                if caught:
                    break
        sums["seconds"] = sums.get("seconds", 0.0) + time.perf_counter() - mark

    def _end_epoch(self, epoch: int) -> None:
        sums, self.progress.sums = self.progress.sums, {}
        row = self._row(epoch, sums.pop("seconds"), sums)
        self.run.check_lock()
        path = self.run.folder / "metrics.jsonl"
        write_rows(path, [*read_rows(path), row])
        parts = "  ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in sums)
        say(f"epoch {epoch + 1}/{self.config.training.epochs}  {parts}  {row['images_per_s']:.1f} images/s", self.quiet)

    def _step(self, samples: list[Sample]) -> dict[str, float]:
        """One update; raises ValueError if the loss is not finite."""
        step, device = self.progress.step, self.accelerator.device
        torch.manual_seed(derive_seed(self.config.seed, "step", step))
        self.schedule.step_update(step)
        self.wrapped.train()
        images = [image.to(device) for image, _ in samples]
        parts = self.wrapped(images, [_of_training(target, device) for _, target in samples])
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {step} (epoch {step // self.steps_per_epoch + 1}); try, with another "
                "--out, a lower --set training.lr, --set training.clip_grad=1, or --set training.precision=fp32"
            )
        self.accelerator.backward(loss)
        if self.config.training.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.training.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        return {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}

    def _row(self, epoch: int, seconds: float, sums: dict[str, float]) -> Row:
        return {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: value / self.steps_per_epoch for name, value in sums.items()},
            "images_per_s": self.steps_per_epoch * self.config.training.batch_size / seconds,
            "seconds": seconds,
            "precision": precision_of(self.config.training.precision),
            "device": str(self.accelerator.device),
        }


def _of_training(target: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The parts of a target that a loss needs."""
    names = [name for name in ("boxes", "labels", "masks") if name in target]
    return {name: target[name].as_subclass(torch.Tensor).to(device) for name in names}


def say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


# --- parts -----------------------------------------------------------------------------------------------------------


def make_optimizer(model: Any, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; norms, biases and everything of an encoding do not decay."""
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(model, training.weight_decay, no_weight_decay_list=no_weight_decay(model))
    return torch.optim.AdamW(groups, lr=training.lr)


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig, steps_per_epoch: int) -> Any:
    """Linear warm-up, then cosine or steps; a function of the step alone."""
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    total = training.epochs * steps_per_epoch
    warmup = min(training.warmup_steps, total - 1)
    shared: dict[str, Any] = {"warmup_t": warmup, "t_in_epochs": False}
    shared["warmup_lr_init"] = min(training.min_lr, training.lr) if warmup else training.lr
    if training.schedule == "cosine":
        decay = {"t_initial": total - warmup, "lr_min": training.min_lr, "warmup_prefix": True}
        return CosineLRScheduler(optimizer, **decay, **shared)
    milestones = [math.ceil(total * 8 / 9), math.ceil(total * 26 / 27)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, warmup_prefix=False, **shared)
