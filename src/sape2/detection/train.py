"""Trains detectors in one process, which holds the run folder and resumes exactly at the last checkpoint.

Every random draw (order, augmentation, sampled proposals) depends only on (seed, epoch or step), so a run that was
interrupted gives the same weights as one that was not. A checkpoint is saved after every epoch, and on SIGINT or SIGTERM.
The run folder holds config.json, data.json (which images), model.safetensors (weights of the last epoch), checkpoint/,
metrics.jsonl (a line per epoch), results.jsonl. Nothing is selected on the test images.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sape2.config import TrainConfig
from sape2.config.detection import DetectionConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.data.augment import derive_seed
from sape2.detection.batches import Sample, TrainBatches
from sape2.detection.coco import CocoImages, count_objects
from sape2.detection.metrics import Row, evaluate_detector, make_metric
from sape2.detection.models import build_detector
from sape2.detection.pyramid import strides
from sape2.detection.splits import check_sizes, fingerprint, open_images, read_all, same_content
from sape2.machine import find_device, hardware, precision_of
from sape2.progress import progress_bar, say
from sape2.runs.files import sweep
from sape2.runs.run import Run
from sape2.training.accelerator import make_accelerator
from sape2.training.loop import run_steps
from sape2.training.memory_errors import RESUMABLE, memory_message, told_in_one_line
from sape2.training.optimisation import make_schedule
from sape2.training.record import Record
from sape2.training.steps import Steps


def run_detection(config: DetectionConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """Trains (or goes on, or finds that it is done), measures the test images, writes and returns the rows.

    All images are read once before the first step. Raises ValueError, FileNotFoundError or ImportError, in one line, for
    what the user can put right; Held if another process works on the folder; Stopped on SIGINT and SIGTERM.
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
                train_detector(train, run, quiet, seen)
        return measure(run, test, quiet)


def check_images(config: DetectionConfig, train: CocoImages, test: CocoImages, quiet: bool) -> None:
    """Says what was changed or left out, and reads every image of both splits once. Raises ValueError naming file and id."""
    stride = strides(config.model.patch_size, config.detector.scales, config.detector.extra_level)[-1]
    low = min(config.images.scale_jitter, default=None)
    check_sizes(train, config.model.image_size, stride, low)
    check_sizes(test, config.model.image_size, stride)
    for note in (*train.notes, *test.notes) if not quiet else ():
        say(note)
    digests, notes = [], []
    for images in (train, test):
        with progress_bar(f"reading the images of {images.where}", len(images), quiet) as show:
            found, told = read_all(images, show)
        digests.append(found)
        notes += told
    for note in (*notes, *same_content(train, digests[0], test, digests[1])) if not quiet else ():
        say(note)


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


# --- training --------------------------------------------------------------------------------------------------------


def train_detector(images: CocoImages, run: Run[DetectionConfig], quiet: bool, seen: Row) -> None:
    """From the last checkpoint, or from the start, to the last epoch; raises what `training.loop.run_steps` raises."""
    config = run.config
    steps = DetectionSteps(new_detector(config), images, config, run.checkpoint)
    record = Record(run, True, quiet, curves=False)
    record.begin(steps.progress, seen)
    counts = sum(count_objects(images).values())
    record.say(f"{len(images)} training images with {counts} objects of {len(images.classes)} classes")

    def end_epoch(epoch: int, sums: dict[str, float], _: Row) -> None:
        number, progress = steps.stream.steps_per_epoch, steps.progress
        losses = {name: value / number for name, value in sums.items() if name.startswith("loss")}
        row = {"epoch": epoch, "step": progress.step, "lr": steps.rate_at(progress.step - 1), **losses} | {
            "images_per_s": number * config.training.batch_size / sums["seconds"],
            "seconds": sums["seconds"],
            "precision": precision_of(config.training.precision),
            "device": str(steps.accelerator.device),
        }
        record.check()
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        record.epoch(row, f"epoch {epoch}/{config.training.epochs}  {parts}  {row['images_per_s']:.1f} images/s")

    run_steps(steps, record, end_epoch)


class DetectionSteps(Steps):
    """The training of a detector, in one process. AdamW; norms, biases and everything of an encoding do not decay."""

    settings = "training"

    def __init__(self, model: Any, images: CocoImages, config: DetectionConfig, checkpoint: Path | None = None) -> None:
        training, self.seed = config.training, config.seed
        self.stream = TrainBatches(images, config, model.transform.size_divisible)
        shared = ("epochs", "batch_size", "lr", "min_lr", "weight_decay", "clip_grad", "precision")
        settings = TrainConfig(warmup_epochs=0, **{name: getattr(training, name) for name in shared})
        schedule = partial(
            make_schedule,
            decay=training.schedule,
            steps=self.stream.total_steps,
            warmup=training.warmup_steps,
            min_lr=training.min_lr,
        )
        accelerator = make_accelerator(training.precision, command="sape2 detect")
        super().__init__(model, settings, schedule, accelerator, checkpoint)

    def take(self, batch: list[Sample]) -> None:
        torch.manual_seed(derive_seed(self.seed, "step", self.progress.step))
        self.update(self.progress.step, [batch], self._losses)

    def _losses(self, batch: list[Sample]) -> dict[str, torch.Tensor]:
        device = self.accelerator.device
        parts = self.called([image.to(device) for image, _ in batch], [_of_training(target, device) for _, target in batch])
        return {"loss": torch.stack([part.float() for part in parts.values()]).sum(), **parts}


def _of_training(target: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The parts of a target that a loss needs."""
    names = [name for name in ("boxes", "labels", "masks") if name in target]
    return {name: target[name].as_subclass(torch.Tensor).to(device) for name in names}
