"""Trains detectors in one process, which holds the run folder and resumes exactly at the last checkpoint.

Every random draw (order, augmentation, sampled proposals) depends only on (seed, epoch or step), so a run that was
interrupted gives the same weights as one that was not. A checkpoint is saved after every epoch, and on SIGINT or SIGTERM.
The run folder holds config.json, data.json (which images), model.safetensors (weights of the last epoch), checkpoint/,
metrics.jsonl (a line per epoch), results.jsonl. Nothing is selected on the test images.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
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
from sape2.detection.splits import check_goes_on, check_sizes, fingerprint, open_images, read_all, same_content
from sape2.machine import find_device, hardware, precision_of
from sape2.progress import progress_bar
from sape2.training.accelerator import make_accelerator, passed_over, prepare
from sape2.training.checkpoint import (
    Progress,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    standing,
)
from sape2.training.files import holds_files, sweep, write_text
from sape2.training.interruption import TrainingStopped, catch_signals
from sape2.training.lock import Lock, hold
from sape2.training.memory_errors import RESUMABLE, memory_message, told_in_one_line
from sape2.training.run_folder import canonical, keep_fingerprint, read_rows, update_results, write_rows


def run_detection(config: DetectionConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """Trains (or goes on, or finds that it is done), measures the test images, writes and returns the rows.

    All images are read once before the first step. Raises ValueError, FileNotFoundError or ImportError, in one line, for
    what the user can put right; Held if another process works on the folder; TrainingStopped on SIGINT and SIGTERM.
    """
    config = canonical(config)
    check_folder(folder, config)
    done = read_rows(folder / "results.jsonl")
    if done and (config.images.name == "coco_digits" or config.images.source is None):
        return done
    make_metric(config.detector.masks)  # what is missing at the end is better known at the beginning
    with torch.device("meta"):  # what is wrong with a model shows before images are composed
        build_detector(config.model, config.detector, config.images)
    train, test = open_images(config)
    check_goes_on(folder, fingerprint(config, train, test))
    if done:
        return done
    with hold(folder, standing(folder)) as lock:
        check_folder(folder, config)
        sweep(folder)
        check_images(config, train, test, quiet)
        if not (folder / "model.safetensors").exists():
            with memory_named(config):
                seen = fingerprint(config, train, test)
                DetectionTrainer(new_detector(config), train, config, folder, quiet, seen, lock.check).run()
        return measure(config, test, lock, quiet)


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


def measure(config: DetectionConfig, images: CocoImages, lock: Lock, quiet: bool) -> list[Row]:
    """The rows of the trained detector on the test images, written into the locked folder."""
    model = new_detector(config)  # without what accelerate puts around one that is trained
    load_weights(lock.folder / "model.safetensors", model)
    model = model.to(find_device())
    with progress_bar("measuring", len(images), quiet) as show, memory_named(config):
        rows = evaluate_detector(model, images, config, show)
    rows = [row | describe(config) for row in rows]
    lock.check()
    update_results(lock.folder, rows)
    return rows


def memory_named(config: DetectionConfig) -> AbstractContextManager[None]:
    what = f"with a batch of {config.training.batch_size} images"
    ways = [f"a smaller --set {name}" for name in ("training.batch_size", "detector.window", "model.image_size")]
    return told_in_one_line(lambda: memory_message(what, config.model, ways, RESUMABLE))


def new_detector(config: DetectionConfig) -> Any:
    """A detector whose weights outside its encodings depend on the seed and on nothing else."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return build_detector(config.model, config.detector, config.images)


def check_folder(folder: Path, config: DetectionConfig) -> None:
    """Raises ValueError if the folder holds another run, or something that is not a detection run. Changes nothing."""
    path = folder / "config.json"
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, not a run folder")
    if not path.exists():
        if holds_files(folder):
            raise ValueError(f"{folder} is not a detection run: it has no config.json; choose another --out")
        return
    try:
        held = canonical(DetectionConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))).identity()
    except (ValueError, RecursionError) as error:  # JSON errors among them
        raise ValueError(
            f"{path} is not the config of a detection run of this version: {error}; choose another --out"
        ) from error
    wanted = config.identity()
    if held != wanted:
        differing = ", ".join(_differences(held, wanted))
        raise ValueError(
            f"{folder} holds another run, which differs in {differing}; choose another --out, or the same settings"
        )


def _differences(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    found = []
    for key in wanted:
        if isinstance(wanted[key], dict):
            found += [f"{key}.{name}" for name in _differences(held[key], wanted[key])]
        elif held[key] != wanted[key]:
            found.append(key)
    return found


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
    """The state of one run: model, optimiser, schedule, progress. `check` is called before anything is written."""

    def __init__(
        self,
        model: Any,
        images: CocoImages,
        config: DetectionConfig,
        folder: Path,
        quiet: bool,
        seen: Row,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.folder, self.images, self.quiet, self.seen = config, folder, images, quiet, seen
        self.check = check
        self.accelerator = make_accelerator(config.training.precision, command="sape2 detect")
        self.model = model.to(self.accelerator.device)
        divisor = model.transform.size_divisible
        self.sizes = [padded_size(size, config.model.image_size, divisor) for size in images.sizes]
        self.transform = make_transform(config.images, config.model.image_size)
        self.steps_per_epoch = len(epoch_batches(self.sizes, config.training.batch_size, config.seed, 0))
        self.optimizer = make_optimizer(self.model, config.training)
        self.schedule = make_schedule(self.optimizer, config.training, self.steps_per_epoch)
        self.progress, state = Progress(), None
        if checkpoint := last_checkpoint(folder):
            self.progress, state = load_checkpoint(checkpoint, self.model, None)
        self.wrapped, self.stepper = prepare(self.accelerator, self.model, self.optimizer)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def run(self) -> None:
        """Epoch by epoch to the end; at a signal saves, and raises TrainingStopped."""
        self._begin()
        with catch_signals() as caught:
            for epoch in range(self.progress.step // self.steps_per_epoch, self.config.training.epochs):
                self._run_epoch(epoch, caught)
                if self.progress.step % self.steps_per_epoch == 0:
                    self._end_epoch(epoch)
                self.check()
                save_checkpoint(self.folder, self.progress, self.model, None, {"optimizer": self.optimizer.state_dict()})
                if caught and self.progress.step < self.config.training.epochs * self.steps_per_epoch:
                    raise TrainingStopped(caught[0], self.progress.step)
        self.check()
        save_weights(self.folder / "model.safetensors", self.model)

    def _begin(self) -> None:
        """Makes the folder, or takes it up: lines of epochs that will be run again are dropped."""
        if not (self.folder / "config.json").exists():
            write_text(self.folder / "config.json", self.config.to_json())
        keep_fingerprint(self.folder, self.seen)
        path, step = self.folder / "metrics.jsonl", self.progress.step
        write_rows(path, [row for row in read_rows(path) if row["step"] <= step])
        epoch, done = divmod(step, self.steps_per_epoch)
        place = f"going on after epoch {epoch}" + (f" and {done} steps of the next" if done else "")
        say(f"{self.folder}: {place if step else 'starting'}", self.quiet)
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
        self.check()
        path = self.folder / "metrics.jsonl"
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
