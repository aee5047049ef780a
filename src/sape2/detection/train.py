"""Training of detectors: one process, resumed exactly at the end of the last epoch.

Every draw of a step (order, augmentation, which proposals are sampled) follows from (seed, epoch or step), so a run that
stopped gives the same weights as one that did not. The run folder holds config.json, data.json (which
images), model.safetensors (last epoch, the end), checkpoint/, metrics.jsonl (a line per epoch), results.jsonl. Nothing is
chosen on the test images.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sape2.config.detection import DetectionConfig, TrainingConfig
from sape2.data.augment import derive_seed
from sape2.data.fingerprint import digest
from sape2.data.pixels import RULE
from sape2.detection.batches import Sample, TrainView, epoch_batches, make_transform, padded_size
from sape2.detection.coco import CocoImages, count_objects, open_split
from sape2.detection.composed import compose
from sape2.detection.metrics import Row, evaluate_detector, make_metric
from sape2.detection.models import build_detector, no_weight_decay
from sape2.evaluation.runs import hardware
from sape2.training.checkpoint import Progress, last_checkpoint, load_checkpoint, load_weights, save_checkpoint, save_weights
from sape2.training.files import holds_files, write_text
from sape2.training.memory_errors import in_detection, told_in_one_line
from sape2.training.optimisation import mixed_precision
from sape2.training.processes import refuse_launcher
from sape2.training.run_folder import check_data, keep_fingerprint, read_rows, update_results, write_rows

COMPOSED = "runs/data/coco_digits"


def run_detection(config: DetectionConfig, folder: Path, quiet: bool = False) -> list[Row]:
    """Trains (or goes on, or finds that it is done), measures the test images, writes and returns the rows.

    Raises ValueError, FileNotFoundError or ImportError, in one line, for what the user can put right.
    """
    check_folder(folder, config)
    done = read_rows(folder / "results.jsonl")
    if done:
        return done
    make_metric(config.detector.masks)  # what is missing at the end is better known at the beginning
    with torch.device("meta"):  # what is wrong with a model shows before images are composed
        build_detector(config.model, config.detector, config.images)
    train_images, test_images = open_images(config)
    model = new_detector(config)
    if (folder / "model.safetensors").exists():
        load_weights(folder / "model.safetensors", model)
    else:
        images = fingerprint(config, train_images, test_images)
        check_goes_on(folder, images)
        with memory_named(config):
            DetectionTrainer(model, train_images, config, folder, quiet, images).run()
        model = new_detector(config)  # without what accelerate put around it
        load_weights(folder / "model.safetensors", model)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    with progress_bar("measuring", len(test_images), quiet) as show, memory_named(config):
        rows = evaluate_detector(model, test_images, config, show)
    rows = [row | describe(config) for row in rows]
    update_results(folder, rows)
    return rows


def memory_named(config: DetectionConfig) -> AbstractContextManager[None]:
    return told_in_one_line(lambda: in_detection(config.model, config.training.batch_size))


def open_images(config: DetectionConfig) -> tuple[CocoImages, CocoImages]:
    """Training and test images; the composed set is made if it does not exist. Raises ValueError if classes do not fit."""
    images = config.images
    if images.name == "coco_digits":
        source = compose(Path(images.source or COMPOSED), images.train_images or 0, images.test_images or 0)
    elif images.source is None:
        raise ValueError("coco needs --data: a folder in COCO format, with annotations/, train2017/ and val2017/")
    else:
        source = Path(images.source).expanduser()
    limits = {"train": images.train_images, "test": images.test_images}
    train, test = (open_split(source, split, config.detector.masks, limit) for split, limit in limits.items())
    test.match_classes(train)
    for split in (train, test):
        if len(split.classes) != config.model.num_classes:
            raise ValueError(
                f"{split.where} has {len(split.classes)} categories, {', '.join(split.classes[:3])}, …; wanted those of "
                f"{train.where}, as many as --set model.num_classes={len(train.classes)}, got {config.model.num_classes}"
            )
    return train, test


def fingerprint(config: DetectionConfig, train: CocoImages, test: CocoImages) -> Row:
    """For data.json: number of images and digest of the annotations of each split, and the rule of reading if it matters.

    It does not for JPEG files, which are neither deep nor transparent and are left as they are stored, nor for our own.
    """
    splits = {"train": train, "test": test}
    names = [entry["file_name"].lower() for images in splits.values() for entry in images.images]
    plain = config.images.name == "coco_digits" or all(name.endswith((".jpg", ".jpeg")) for name in names)
    described = {name: {"images": len(images), "labels": digest(images.where.read_bytes())} for name, images in splits.items()}
    return {"layout": "coco"} | ({} if plain else {"reading_rule": RULE}) | described


def check_goes_on(folder: Path, images: Row) -> None:
    """Raises ValueError if a run to be taken up saw other images, or may have read them by another rule."""
    check_data(folder, images)
    if "reading_rule" in images and last_checkpoint(folder) and not (folder / "data.json").exists():
        raise ValueError(
            f"{folder} does not tell by which rule it read its images; this version reads by rule {images['reading_rule']} "
            "(docs/data.md). Finish it with the version that began it, or choose another --out"
        )


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
        held = DetectionConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))).identity()
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
    """What a number was measured on."""
    return {
        "encoding": config.model.encoding,
        "model": config.model.label,
        "data": config.images.name,
        "recipe": config.recipe,
        "epochs": config.training.epochs,
        "seed": config.seed,
        "split": "test",
        "weights": "last",
        "precision": mixed_precision(config.training.precision).replace("no", "fp32"),
        "torch": torch.__version__,
        "hardware": hardware(),
    }


# --- the loop --------------------------------------------------------------------------------------------------------


class DetectionTrainer:
    """The state of one run: model, optimiser, schedule, progress."""

    def __init__(self, model: Any, images: CocoImages, config: DetectionConfig, folder: Path, quiet: bool, seen: Row) -> None:
        self.config, self.folder, self.images, self.quiet, self.seen = config, folder, images, quiet, seen
        self.accelerator = make_accelerator(config.training)
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
        self.wrapped, self.stepper = self.accelerator.prepare(self.model, self.optimizer)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def run(self) -> None:
        if not (self.folder / "config.json").exists():
            write_text(self.folder / "config.json", self.config.to_json())
        keep_fingerprint(self.folder, self.seen)
        self._say_where_it_stands()
        path = self.folder / "metrics.jsonl"
        write_rows(path, [row for row in read_rows(path) if row["step"] <= self.progress.step])
        epochs = self.config.training.epochs
        for epoch in range(self.progress.step // self.steps_per_epoch, epochs):
            start = time.perf_counter()
            with progress_bar(f"epoch {epoch + 1}/{epochs}", self.steps_per_epoch, self.quiet) as show:
                sums = self._run_epoch(epoch, show)
            row = self._row(epoch, sums, time.perf_counter() - start)
            write_rows(path, [*read_rows(path), row])
            save_checkpoint(self.folder, self.progress, self.model, None, {"optimizer": self.optimizer.state_dict()})
            parts = "  ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in sums)
            self._say(f"epoch {epoch + 1}/{epochs}  {parts}  {row['images_per_s']:.1f} images/s")
        save_weights(self.folder / "model.safetensors", self.model)

    def _run_epoch(self, epoch: int, show: Callable[[int], None]) -> dict[str, float]:
        """The sums over the steps of the loss and of its parts."""
        training, seed = self.config.training, self.config.seed
        loader: DataLoader[list[Sample]] = DataLoader(
            TrainView(self.images, self.transform, seed, epoch),
            batch_sampler=epoch_batches(self.sizes, training.batch_size, seed, epoch),
            collate_fn=list,
            num_workers=training.workers,
        )
        sums: dict[str, float] = {}
        for done, samples in enumerate(loader, start=1):
            for name, value in self._step(samples).items():
                sums[name] = sums.get(name, 0.0) + value
            self.progress.step += 1
            show(done)
        return sums

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

    def _row(self, epoch: int, sums: dict[str, float], seconds: float) -> Row:
        images = self.steps_per_epoch * self.config.training.batch_size
        return {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: value / self.steps_per_epoch for name, value in sums.items()},
            "images_per_s": images / seconds,
            "seconds": seconds,
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "device": str(self.accelerator.device),
        }

    def _say_where_it_stands(self) -> None:
        epoch = self.progress.step // self.steps_per_epoch
        self._say(f"{self.folder}: {f'going on after epoch {epoch}' if epoch else 'starting'}")
        counts = sum(count_objects(self.images).values())
        self._say(f"{len(self.images)} training images with {counts} objects of {len(self.images.classes)} classes")
        for note in self.images.notes:
            self._say(note)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)


def _of_training(target: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """What a loss needs of a target."""
    names = [name for name in ("boxes", "labels", "masks") if name in target]
    return {name: target[name].as_subclass(torch.Tensor).to(device) for name in names}


# --- parts -----------------------------------------------------------------------------------------------------------


def make_accelerator(training: TrainingConfig) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'sape2[train]'") from error
    refuse_launcher("sape2 detect")
    AcceleratorState._reset_state()  # it holds one precision for a process, which may train several runs
    return Accelerator(mixed_precision=mixed_precision(training.precision))


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


@contextmanager
def progress_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A function of how much is done, which moves a bar on standard error; none if that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
