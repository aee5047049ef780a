"""The training loop. It receives model, images and an evaluate function, and writes the run folder as it goes.

A step is decided by (config, seed, step) and the weights before it, so a run that is resumed at any step gives the
same weights as one that never stopped. Several processes share each batch; only the main one touches the run folder.
"""

from __future__ import annotations

import copy
import math
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

from sape2.config import RunConfig, TrainConfig
from sape2.data import ImageData, ImageFiles, normalize
from sape2.data.augment import BatchMixer, TrainStream, derive_seed
from sape2.encodings import AttentionEncoding
from sape2.training.checkpoint import (
    Progress,
    check_data,
    difference,
    last_checkpoint,
    load_checkpoint,
    read_rows,
    save_checkpoint,
    save_weights,
    start_run,
    write_rows,
)
from sape2.training.processes import ALONE, Processes, refuse_launcher
from sape2.training.sharding import divided_state, here, put_together, shard, whole_state

# model -> (accuracy, loss) on the validation set; called in every process, and the same in each
Evaluate = Callable[[nn.Module], tuple[float, float]]
# called after each step with where the run stands; what it returns goes into the epoch's line
Watch = Callable[[Progress], dict[str, Any] | None]
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
    watch: Watch = lambda progress: None,
    processes: Processes = ALONE,
    check_folder: Callable[[], None] = lambda: None,
) -> None:
    """Trains from the last checkpoint in `folder`, or from the start, to the end of the last epoch.

    What could stop the first step is found before anything is written. Writes config.json, metrics.jsonl, TensorBoard
    events, checkpoints, best.safetensors, and last of all model.safetensors. `watch` stops the run by raising,
    and so does `check_folder`, which is called before anything is written there. Raises ValueError when the loss is no
    longer finite, TrainingStopped on SIGINT and SIGTERM. Of several `processes` all must call it; the folder is that of
    the main one.
    """
    Trainer(model, images, evaluate, config, folder, quiet, processes, check_folder).run(watch)


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
        processes: Processes = ALONE,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        self.check_folder = check_folder if processes.is_main else lambda: None
        self.config, self.folder, self.evaluate, self.processes = config, folder, evaluate, processes
        self.quiet = quiet or not processes.is_main
        check_same_run(config, images.fingerprint, processes)
        if processes.is_main:
            check_data(folder, images.fingerprint)
        self.accelerator = make_accelerator(config.train, processes)
        for module in model.modules():
            if isinstance(module, AttentionEncoding):
                module.check_trainable()
        self.stream = TrainStream(images, config.augment, config.train, config.seed, processes.rank, processes.size)
        self.mixer = BatchMixer(config.augment, config.train.label_smoothing, config.model.num_classes)
        self.model = model.to(self.accelerator.device)
        self.ema = make_ema(self.model, config.train)
        self.undivided: list[nn.Module] = []  # where the parts of a divided model, and of its average, are put together
        self.progress, optimizer_state = self._take_up_checkpoint()
        if config.train.parallel == "fsdp":
            self.wrapped = self._divide()
        else:
            self.wrapped = self.accelerator.prepare(self.model)
        self.optimizer = make_optimizer(self.model, config.train)
        self.stepper = self.accelerator.prepare(self.optimizer)
        self.schedule = make_schedule(self.optimizer, config.train, self.stream.steps_per_epoch)
        if optimizer_state is not None:
            self._load_optimizer(optimizer_state)
        self.known: dict[str, Any] = {}  # what `watch` found out
        self.pending: list[tuple[int, Tensor]] = []  # losses not yet looked at
        self.board: Any = None

    @property
    def _ema_module(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    def whole(self) -> list[nn.Module]:
        """The model, and its moving average where there is one, undivided. All processes must call it.

        Putting divided weights together waits for every process, so it begins only where none has failed.
        """
        if self.undivided:
            self.processes.largest(0)
        parts = [self.model] if self.ema is None else [self.model, self.ema.module]
        for part, undivided in zip(parts, self.undivided, strict=False):
            put_together(part, undivided)
        return self.undivided or parts

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self, watch: Watch = lambda progress: None) -> None:
        stream, steps_per_epoch = self.stream, self.stream.steps_per_epoch
        if self.processes.is_main:
            start_run(self.folder, self.config, self.stream.data.fingerprint)
            self.board = open_board(self.folder)
            self._forget_later_epochs()
        self._say(f"{self.folder}: {f'going on from step {self.progress.step}' if self.progress.step else 'starting'}")
        patient = self.processes.size > 1  # a launcher sends on what the process has had already
        with catch_signals(patient) as caught, progress_bar(stream.total_steps, self.progress.step, self.quiet) as show:
            batches = stream.batches(self.progress.step)
            mark = time.perf_counter()
            while self.progress.step < stream.total_steps:
                images, labels = next(batches)
                waited = time.perf_counter() - mark
                self.processes.largest(0)  # all have their images
                self._step(*(t.to(self.accelerator.device, non_blocking=True) for t in (images, labels)))
                self.progress.step += 1
                epoch, done = divmod(self.progress.step, steps_per_epoch)
                every = self.config.train.checkpoint_every
                stop = self.processes.largest(caught[0] if caught else 0)  # once: all stop here, and say what they did
                save = bool(done == 0 or stop or (every and self.progress.step % every == 0))
                if save or self.progress.step % CHECK_EVERY == 0:
                    self._look_at_losses()
                if save:
                    self._check_weights()
                now = time.perf_counter()
                self._add(seconds=now - mark, wait_seconds=waited)
                mark = now
                show(self.progress, epoch + (done > 0), self.config.train.epochs)
                self.known |= watch(self.progress) or {}
                if save:
                    self.check_folder()  # before what takes long
                if done == 0:
                    self._end_epoch(epoch)
                if save:
                    self._save_checkpoint()
                    mark = time.perf_counter()
                if stop and self.progress.step < stream.total_steps:
                    raise TrainingStopped(stop, self.progress.step)
        weights = self.whole()[-1]
        self.check_folder()
        if self.processes.is_main:
            save_weights(self.folder / "model.safetensors", weights)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One update from one batch of this process, in `accumulation` equal parts."""
        from accelerate.utils import set_seed

        step, train, stream = self.progress.step, self.config.train, self.stream
        set_seed(derive_seed(self.config.seed, "step", step, 0) % 2**32)  # the same in all, to mix one batch
        self.schedule.step_update(step)
        normalized = normalize(images, stream.data.mean, stream.data.std)
        images, targets = self.mixer(normalized, labels, stream.places, train.batch_size)
        if not self.processes.is_main:  # from here on each draws for its own images
            set_seed(derive_seed(self.config.seed, "step", step, self.processes.rank) % 2**32)
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
        """Adds up what the last steps gave in all processes; raises ValueError at the first loss that is not finite."""
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
        """A step with a finite loss can still break the weights; such weights are never saved."""
        finite = all(here(parameter).isfinite().all() for parameter in self.model.parameters())
        if self.processes.largest(int(not finite)):
            self._diverged(self.progress.step - 1, "the weights are no longer finite")

    def _diverged(self, step: int, what: str) -> NoReturn:
        """All processes come here, since all have seen the losses of all."""
        last = self.processes.from_main(last_checkpoint(self.folder))
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
        """Measures the validation set, in the precision of the training, writes the epoch's line, keeps the best weights.

        They are those of the moving average where there is one.
        """
        sums, self.progress.sums = self.progress.sums, {}
        waited = max(self.processes.gather(sums["wait_seconds"]))
        weights = self.whole()[-1]
        with self.accelerator.autocast():  # the average and undivided weights were copied before accelerate had the model
            accuracy, loss = self.evaluate(weights)
        self.check_folder()
        row = {
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
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "device": self.accelerator.device.type,
            "processes": self.processes.size,
        } | self.known
        if accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy, self.progress.best_epoch = accuracy, epoch
            if self.processes.is_main:
                save_weights(self.folder / "best.safetensors", weights)
        if self.processes.is_main:
            path = self.folder / "metrics.jsonl"
            write_rows(path, [*read_rows(path), row])
            for name in row.keys() - {"epoch", "step", "precision", "device", "processes"}:
                self.board.add_scalar(name, row[name], epoch)
            self.board.flush()
        self._say(
            f"epoch {epoch}/{self.config.train.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}  "
            f"validation {accuracy:.4f}  {row['images_per_s']:.0f} images/s"
        )

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        model, *average = self.whole()
        state: dict[str, Any] = {"optimizer": whole_state(self.optimizer) if self.undivided else self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.check_folder()
        if self.processes.is_main:
            save_checkpoint(self.folder, self.progress, model, average[0] if average else None, state)

    def _take_up_checkpoint(self) -> tuple[Progress, dict[str, Any] | None]:
        """Where the main process finds the run, in all of them: the others need not see its folder."""
        taken: tuple[Progress, dict[str, Any] | None] = (Progress(), None)
        checkpoint = last_checkpoint(self.folder) if self.processes.is_main else None
        if checkpoint is not None:
            taken = load_checkpoint(checkpoint, self.model, self._ema_module)
        taken = self.processes.from_main(taken)
        if taken[1] is not None and self.processes.size > 1:
            for part in self.whole():
                mine = {name: tensor.cpu() for name, tensor in part.state_dict().items()} if self.processes.is_main else None
                part.load_state_dict(self.processes.from_main(mine))
        return taken

    def _divide(self) -> nn.Module:
        """Divides the model and its average among the processes; returns the model as it is to be called."""
        if self.processes.size == 1 or self.accelerator.scaler is not None:
            raise ValueError(
                "train.parallel=fsdp divides the weights among several processes, in fp32 or bf16; start it with torchrun, "
                "or leave it out, which changes no result"
            )
        parts = self.whole()
        self.undivided = [copy.deepcopy(part) for part in parts]
        wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, and nothing for gradients
        for part in parts:
            shard(part, self.accelerator.device)
        return wrapped

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        kept = state["optimizer"]
        try:
            self.optimizer.load_state_dict(divided_state(kept, self.optimizer) if self.undivided else kept)
        except (KeyError, TypeError, ValueError) as error:
            at = f" in {last_checkpoint(self.folder)}" if self.processes.is_main else ""  # the others have no folder
            where = f"the optimiser's state{at}"
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
        if len(kept) < len(rows):
            write_rows(path, kept)


# --- parts -----------------------------------------------------------------------------------------------------------


def check_same_run(config: RunConfig, fingerprint: dict[str, Any] | None, processes: Processes) -> None:
    """Raises ValueError in every process unless all were started with one config, on the same images."""
    mine = config.identity() | {"images": fingerprint}
    mine |= {name: getattr(config.train, name) for name in ("checkpoint_every", "parallel")}
    for rank, theirs in enumerate(processes.gather(mine)):
        if theirs != mine:
            raise ValueError(
                f"process {rank} was started with other settings or images than process {processes.rank}: "
                f"{difference(theirs, mine)}; give every process the same command"
            )


def make_accelerator(config: TrainConfig, processes: Processes = ALONE) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'sape2[train]'") from error
    if processes.size == 1:
        refuse_launcher("this training")
    AcceleratorState._reset_state()  # it holds one precision for a process, which may train several runs
    accelerator = Accelerator(mixed_precision=mixed_precision(config.precision), cpu=not torch.accelerator.is_available())
    if accelerator.num_processes != processes.size:
        raise ValueError(f"training in several processes does not work on {accelerator.device}; start it without torchrun")
    return accelerator


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
def catch_signals(patient: bool = False) -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM, instead of its ending the process in the middle of a step.

    A second one ends it, unless it is `patient`.
    """
    caught: list[int] = []
    previous = {}

    def remember(number: int, _: Any) -> None:
        if caught and not patient:  # the second time: now
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
