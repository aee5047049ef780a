"""The training loop. It receives model, images and an evaluate function, and writes the run folder as it goes.

A step is decided by (config, seed, step) and the weights before it, so a run that is resumed at any step gives the
same weights as one that never stopped.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.augment import BatchMixer, TrainStream, derive_seed
from sape2.checkpoint import (
    Progress,
    check_data,
    last_checkpoint,
    load_checkpoint,
    read_rows,
    save_checkpoint,
    save_weights,
    start_run,
    write_rows,
)
from sape2.config import RunConfig, TrainConfig
from sape2.data import ImageData, ImageFiles, normalize
from sape2.encodings import AttentionEncoding

Evaluate = Callable[[nn.Module], tuple[float, float]]  # model -> (accuracy, loss) on the validation set
# called after each step with where the run stands and whether it is about to save; what it returns goes into the epoch's line
Watch = Callable[[Progress, bool], dict[str, Any] | None]
CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the accelerator


class TrainingStopped(Exception):
    """A signal asked the run to stop; its checkpoint is saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal_number = signal_number


def train(
    model: nn.Module,
    images: ImageData | ImageFiles,
    evaluate: Evaluate,
    config: RunConfig,
    folder: Path,
    quiet: bool = False,
    watch: Watch = lambda progress, saving: None,
) -> None:
    """Trains from the last checkpoint in `folder`, or from the start, to the end of the last epoch.

    What could stop the first step is found before anything is written. Writes config.json, metrics.jsonl, TensorBoard
    events, checkpoints, best.safetensors, and last of all model.safetensors. `watch` stops the run by raising.
    Raises ValueError when the loss is no longer finite, TrainingStopped on SIGINT and SIGTERM.
    """
    Trainer(model, images, evaluate, config, folder, quiet).run(watch)


class Trainer:
    """The state of one run: model, average, optimiser, schedule, progress."""

    def __init__(
        self,
        model: nn.Module,
        images: ImageData | ImageFiles,
        evaluate: Evaluate,
        config: RunConfig,
        folder: Path,
        quiet: bool,
    ) -> None:
        self.config, self.folder, self.evaluate, self.quiet = config, folder, evaluate, quiet
        check_data(folder, images.fingerprint)
        self.accelerator = make_accelerator(config.train)
        for module in model.modules():
            if isinstance(module, AttentionEncoding):
                module.check_trainable()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.stream = TrainStream(images, config.augment, config.train, config.seed, rank, world)
        self.mixer = BatchMixer(config.augment, config.train.label_smoothing, config.model.num_classes)
        self.model = model.to(self.accelerator.device)
        self.ema = make_ema(self.model, config.train)
        self.optimizer = make_optimizer(self.model, config.train)
        self.schedule = make_schedule(self.optimizer, config.train, self.stream.steps_per_epoch)
        self.progress, optimizer_state = Progress(), None
        if checkpoint := last_checkpoint(folder):
            self.progress, optimizer_state = load_checkpoint(checkpoint, self.model, self._ema_module)
        self.wrapped, self.stepper = self.accelerator.prepare(self.model, self.optimizer)
        if optimizer_state is not None:
            self._load_optimizer(optimizer_state)
        self.known: dict[str, Any] = {}  # what `watch` found out
        self.pending: list[tuple[int, Tensor]] = []  # losses not yet looked at
        self.board: Any = None

    @property
    def _ema_module(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are measured and kept: the moving average where there is one."""
        return self._ema_module or self.model

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self, watch: Watch = lambda progress, saving: None) -> None:
        stream, steps_per_epoch = self.stream, self.stream.steps_per_epoch
        if self.accelerator.is_main_process:
            start_run(self.folder, self.config, self.stream.data.fingerprint)
        self.board = open_board(self.folder) if self.accelerator.is_main_process else None
        self._forget_later_epochs()
        self._say(f"{self.folder}: {f'going on from step {self.progress.step}' if self.progress.step else 'starting'}")
        with catch_signals() as caught, progress_bar(stream.total_steps, self.progress.step, self.quiet) as show:
            batches = stream.batches(self.progress.step)
            mark = time.perf_counter()
            while self.progress.step < stream.total_steps:
                images, labels = next(batches)
                waited = time.perf_counter() - mark
                self._step(*(t.to(self.accelerator.device, non_blocking=True) for t in (images, labels)))
                self.progress.step += 1
                epoch, done = divmod(self.progress.step, steps_per_epoch)
                every = self.config.train.checkpoint_every
                stop = bool(caught)  # read once: what is saved and what is said must agree
                save = bool(done == 0 or stop or (every and self.progress.step % every == 0))
                if save or self.progress.step % CHECK_EVERY == 0:
                    self._look_at_losses()
                if save:
                    self._check_weights()
                now = time.perf_counter()
                self._add(seconds=now - mark, wait_seconds=waited)
                mark = now
                show(self.progress, epoch + (done > 0), self.config.train.epochs)
                self.known |= watch(self.progress, save) or {}
                if done == 0:
                    self._end_epoch(epoch)
                if save:
                    self._save_checkpoint()
                    mark = time.perf_counter()
                if stop and self.progress.step < stream.total_steps:
                    raise TrainingStopped(caught[0], self.progress.step)
        if self.accelerator.is_main_process:
            save_weights(self.folder / "model.safetensors", self.evaluated)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One update from one batch of this process, in `accumulation` equal parts."""
        from accelerate.utils import set_seed

        step, train = self.progress.step, self.config.train
        set_seed(derive_seed(self.config.seed, "step", step, self.accelerator.process_index) % 2**32)
        self.schedule.step_update(step)
        images, targets = self.mixer(normalize(images, self.stream.data.mean, self.stream.data.std), labels)
        self.wrapped.train()
        parts = list(zip(images.chunk(train.accumulation), targets.chunk(train.accumulation), strict=True))
        total = torch.zeros((), device=images.device)
        correct = torch.zeros((), device=images.device)
        for index, (part, target) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                logits = self.wrapped(part).float()
                loss = F.cross_entropy(logits, target) / len(parts)
                self.accelerator.backward(loss)
            total += loss.detach()
            correct += (logits.detach().argmax(1) == target.argmax(1)).sum()
        if train.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), train.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        self.pending.append((step, torch.stack([total, correct, correct.new_tensor(len(images))])))

    def _look_at_losses(self) -> None:
        """Adds up what the last steps gave; raises ValueError at the first loss that is not finite."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        values = torch.stack([value for _, value in pending]).tolist()
        for (step, _), (loss, correct, count) in zip(pending, values, strict=True):
            if not math.isfinite(loss):
                self._diverged(step, f"the loss is {loss}")
            self._add(loss=loss * count, correct=correct, images=count)

    def _check_weights(self) -> None:
        """A step with a finite loss can still break the weights; such weights are never saved."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self._diverged(self.progress.step - 1, "the weights are no longer finite")

    def _diverged(self, step: int, what: str) -> NoReturn:
        last = last_checkpoint(self.folder)
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
        """Measures the validation set, in the precision of the training, writes the epoch's line, keeps the best weights."""
        sums, self.progress.sums = self.progress.sums, {}
        accuracy, loss = self.evaluate(self.evaluated)
        row = {
            "epoch": epoch,
            "step": self.progress.step,
            "lr": self._rate_at(self.progress.step - 1),
            "loss": sums["loss"] / sums["images"],
            "accuracy": sums["correct"] / sums["images"],
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "images_per_s": sums["images"] * self.accelerator.num_processes / sums["seconds"],
            "wait_fraction": sums["wait_seconds"] / sums["seconds"],
            "seconds": sums["seconds"],
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "device": str(self.accelerator.device),
        } | self.known
        if accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy, self.progress.best_epoch = accuracy, epoch
            if self.accelerator.is_main_process:
                save_weights(self.folder / "best.safetensors", self.evaluated)
        if self.accelerator.is_main_process:
            path = self.folder / "metrics.jsonl"
            write_rows(path, [*read_rows(path), row])
            for name in row.keys() - {"epoch", "step", "precision", "device"}:
                self.board.add_scalar(name, row[name], epoch)
            self.board.flush()
        self._say(
            f"epoch {epoch}/{self.config.train.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}  "
            f"validation {accuracy:.4f}  {row['images_per_s']:.0f} images/s"
        )

    def _say(self, text: str) -> None:
        if not self.quiet and self.accelerator.is_main_process:
            print(text, file=sys.stderr)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.folder, self.progress, self.model, self._ema_module, state)
        self.accelerator.wait_for_everyone()

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, ValueError) as error:
            where = f"the optimiser's state in {last_checkpoint(self.folder)}"
            raise ValueError(f"{where} does not fit this version of sape2 ({error}); remove it to start again") from error
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _forget_later_epochs(self) -> None:
        """Drops lines of epochs that ended after the checkpoint: they will be run, and written, again."""
        path = self.folder / "metrics.jsonl"
        rows = read_rows(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{path} has a line without its step, so it cannot be continued; choose another --out")
        kept = [row for row in rows if row["step"] <= self.progress.step]
        if self.accelerator.is_main_process and len(kept) < len(rows):
            write_rows(path, kept)


# --- parts -----------------------------------------------------------------------------------------------------------


def make_accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'sape2[train]'") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sape2 train runs in one process; training in several is not supported yet. Start it without torchrun")
    AcceleratorState._reset_state()  # it holds one precision for a process, which may train several runs
    return Accelerator(mixed_precision=mixed_precision(config.precision))


def open_board(folder: Path) -> Any:
    """TensorBoard events in folder/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training writes TensorBoard events: pip install 'sape2[train]'") from error
    return SummaryWriter(str(folder / "tensorboard"))


def mixed_precision(precision: str) -> str:
    """accelerate's name for a precision; auto is bf16 where the machine computes in it, else fp32."""
    if precision == "auto":
        return "bf16" if _has_bf16() else "no"
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("train.precision=fp16 needs an accelerator, and there is none; choose bf16, fp32 or auto")
    return "no" if precision == "fp32" else precision


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.accelerator.is_available() and torch.cpu._is_avx512_bf16_supported()


def make_ema(model: nn.Module, config: TrainConfig) -> Any:
    from timm.utils import ModelEmaV3

    return None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; norms, biases, tokens and everything of an encoding do not decay (`ViT.no_weight_decay`)."""
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Any:
    """Linear warm-up, then cosine from lr to min_lr; a function of the step alone."""
    from timm.scheduler import CosineLRScheduler

    warmup = min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps_per_epoch - warmup,
        lr_min=min(config.min_lr, config.lr),
        warmup_t=warmup,
        warmup_lr_init=min(config.min_lr, config.lr) if warmup else config.lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM, instead of its ending the process in the middle of a step."""
    caught: list[int] = []
    previous = {}

    def remember(number: int, _: Any) -> None:
        if caught:  # the second time: now
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # not the main thread
            break
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(total: int, start: int, quiet: bool) -> Iterator[Callable[[Progress, int, int], None]]:
    """A bar on standard error with epoch, loss, accuracy, images/s and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    console = Console(stderr=True)
    with Bar(
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task("training", total=total, completed=start)

        def show(progress: Progress, epoch: int, epochs: int) -> None:
            sums = progress.sums
            count = sums.get("images", 0.0)
            text = f"epoch {epoch}/{epochs}"
            if count:
                rate = count / sums["seconds"]
                text += f"  loss {sums['loss'] / count:.3f}  accuracy {sums['correct'] / count:.3f}  {rate:.0f} images/s"
            bar.update(task, completed=progress.step, description=text)

        yield show
