"""Updates of a model, each from one batch: rate, gradients, clipping, optimiser, moving average, and the losses.

`Steps` is what every training of this package has in common, `ImageSteps` the training of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.config import RunConfig, TrainConfig
from sape2.data import ImageData, ImageFiles, normalize
from sape2.data.augment import TrainStream, derive_seed
from sape2.data.mixing import BatchMixer
from sape2.encodings import AttentionEncoding
from sape2.training.accelerator import make_accelerator, prepare
from sape2.training.optimisation import compiled, make_optimizer, make_schedule, set_seeds
from sape2.training.processes import ALONE, Processes
from sape2.training.weights import Weights

Part = TypeVar("Part")


class Steps:
    """Model, optimiser and schedule of a training, and how far it is. `schedule` makes the schedule of an optimiser.

    `accelerator` was made for the device and the precision; of `config` the optimiser, the average, clipping and what concerns
    the weights are read. Weights, progress and state are taken up from `checkpoint` if there is one. Raises ValueError if it
    does not fit, or if an encoding could not learn.
    """

    stream: Any  # the batches of a subclass: `batches(start)`, `steps_per_epoch`, `total_steps`
    settings = "train"  # the part of the config that has the learning rate, for errors

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        schedule: Callable[[torch.optim.Optimizer], Any],
        accelerator: Any,
        checkpoint: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        for module in model.modules():
            if isinstance(module, AttentionEncoding):
                module.check_trainable()
        self.config, self.accelerator = config, accelerator
        self.weights = Weights(model.to(accelerator.device), config, processes)
        self.progress, state = self.weights.take_up(checkpoint)
        divided = config.parallel == "fsdp"
        self.wrapped = self.weights.divide(accelerator) if divided else prepare(accelerator, model)
        self.called = compiled(self.wrapped) if config.compile else self.wrapped
        self.optimizer = make_optimizer(model, config)
        self.stepper = prepare(accelerator, self.optimizer)
        self.schedule = schedule(self.optimizer)
        self.pending: list[tuple[int, dict[str, Tensor]]] = []  # what steps gave and nobody has looked at
        if state is not None:
            self._load(state, checkpoint)

    def take(self, batch: Any) -> None:
        """One update from a batch of `stream`."""
        raise NotImplementedError

    def update(self, step: int, parts: Sequence[Part], losses: Callable[[Part], dict[str, Tensor]]) -> None:
        """Moves the weights by the gradient of the sum of the parts' "loss", without waiting for the device.

        `losses` calls the model and gives numbers of a part, which are added up for `look`.
        """
        self.schedule.step_update(step)
        self.wrapped.train()
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.wrapped):
                found = losses(part)
                self.accelerator.backward(found["loss"])
            sums = {name: sums.get(name, 0) + value.detach().float() for name, value in found.items()}
        if self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        self.weights.follow(step)
        self.pending.append((step, sums))

    def look(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The steps since the last look with their numbers: the mean loss of all processes, sums of everything else."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        values = torch.stack([torch.stack(list(sums.values())) for _, sums in pending])
        for (step, sums), row in zip(pending, self.accelerator.reduce(values, "sum").tolist(), strict=True):
            numbers = dict(zip(sums, row, strict=True))
            yield step, numbers | {"loss": numbers["loss"] / self.weights.processes.size}

    def rate_at(self, step: int) -> float:
        return float(self.schedule._get_lr(step)[0])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and progress. All processes must call it."""
        state: dict[str, Any] = {"optimizer": self.weights.state_of(self.optimizer)}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _load(self, state: dict[str, Any], checkpoint: Path | None) -> None:
        try:
            self.weights.give_state(state["optimizer"], self.optimizer)
        except (KeyError, TypeError, ValueError) as error:
            at = f" in {checkpoint}" if checkpoint else ""  # only the main process has the folder
            where = f"the optimiser's state{at}"
            raise ValueError(f"{where} does not fit this version of sape2 ({error}); remove it to start again") from error
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class ImageSteps(Steps):
    """The training of a classifier on images: augmented, erased and mixed, each process with its share of a batch."""

    def __init__(
        self,
        model: nn.Module,
        images: ImageData | ImageFiles,
        config: RunConfig,
        checkpoint: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        train, self.seed = config.train, config.seed
        accelerator = make_accelerator(train.precision, processes)
        images = images.kept_on(accelerator.device)
        self.stream = TrainStream(images, config.augment, train, config.seed, processes.rank, processes.size)
        self.mixer = BatchMixer(config.augment, train.label_smoothing, config.model.num_classes)
        warmup = round(train.warmup_epochs * self.stream.steps_per_epoch)
        schedule = partial(
            make_schedule, decay=train.schedule, steps=self.stream.total_steps, warmup=warmup, min_lr=train.min_lr
        )
        super().__init__(model, train, schedule, accelerator, checkpoint, processes)

    def take(self, batch: Sequence[Tensor]) -> None:
        """One update from images and labels of this process, in `accumulation` parts; their shapes are always the same."""
        images, labels = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        self._draw_for(0)  # the same in all processes, to mix one batch
        normalized = normalize(images, self.stream.data.mean, self.stream.data.std)
        images, targets = self.mixer(normalized, labels, self.stream.places, self.config.batch_size)
        if not self.weights.processes.is_main:  # from here on each draws for its own images
            self._draw_for(self.weights.processes.rank)
        number = self.config.accumulation
        self.update(self.progress.step, list(zip(images.chunk(number), targets.chunk(number), strict=True)), self._losses)

    def _draw_for(self, rank: int) -> None:
        set_seeds(derive_seed(self.seed, "step", self.progress.step, rank) % 2**32, self.accelerator.device)

    def _losses(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = part
        logits = self._logits(images).float()
        loss = F.cross_entropy(logits, targets) / self.config.accumulation
        correct = (logits.detach().argmax(1) == targets.argmax(1)).sum()
        return {"loss": loss, "correct": correct, "images": loss.new_full((), len(images))}

    def _logits(self, images: Tensor) -> Tensor:
        """Raises ValueError if the model cannot be compiled, for example without a compiler for C++."""
        if not self.config.compile:
            return self.called(images)
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            return self.called(images)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).partition("\n")[0] or type(error.inner_exception).__name__
            raise ValueError(
                f"train.compile=true does not work on this machine: {reason}; leave it out, which changes nothing but rounding"
            ) from error
