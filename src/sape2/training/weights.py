"""The weights of a run: the model and its moving average, whole or divided among processes (`sharding`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sape2.config import TrainConfig
from sape2.runs.checkpoint import Progress, load_checkpoint
from sape2.training.accelerator import config_alone
from sape2.training.optimisation import make_ema
from sape2.training.processes import Processes
from sape2.training.sharding import divided_state, here, put_together, shard, whole_state


class Weights:
    """`model` and, where the config asks for one, its moving average `ema`. Every process of a run has one of these."""

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.model, self.processes = model, processes
        self.ema = make_ema(model, config)
        self.undivided: list[nn.Module] = []  # where the parts of a divided model, and of its average, are put together

    @property
    def average(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    def parts(self) -> list[nn.Module]:
        """The model and its average, if there is one, as stored in this process."""
        return [self.model] if self.average is None else [self.model, self.average]

    def whole(self) -> list[nn.Module]:
        """`parts`, undivided. All processes must call it.

        Putting divided weights together waits for every process, so it begins only where none has failed.
        """
        if not self.undivided:
            return self.parts()
        self.processes.barrier()
        for part, undivided in zip(self.parts(), self.undivided, strict=True):
            put_together(part, undivided)
        return self.undivided

    def are_finite(self) -> bool:
        """True if all parameters are finite in all processes."""
        finite = all(here(parameter).isfinite().all() for parameter in self.model.parameters())
        return not self.processes.largest(int(not finite))

    def follow(self, step: int) -> None:
        """Updates the moving average after a step."""
        if self.ema is not None:
            self.ema.update(self.model, step=step)

    def take_up(self, checkpoint: Path | None) -> tuple[Progress, dict[str, Any] | None]:
        """Loads and broadcasts the checkpoint of rank 0 (None: a new run); returns the progress and the optimiser's state."""
        taken: tuple[Progress, dict[str, Any] | None] = (Progress(), None)
        if checkpoint is not None and self.processes.is_main:
            taken = load_checkpoint(checkpoint, self.model, self.average)
        taken = self.processes.from_main(taken)
        if taken[1] is not None and self.processes.size > 1:
            for part in self.parts():
                mine = {name: tensor.cpu() for name, tensor in part.state_dict().items()} if self.processes.is_main else None
                part.load_state_dict(self.processes.from_main(mine))
        return taken

    def divide(self, accelerator: Any) -> nn.Module:
        """Divides the model and its average among the processes; returns the model as it is to be called."""
        if self.processes.size == 1 or accelerator.scaler is not None:
            raise ValueError(
                "train.parallel=fsdp divides the weights among several processes, in fp32 or bf16; start it with torchrun, "
                "or leave it out, which changes no result"
            )
        self.undivided = [copy.deepcopy(part) for part in self.parts()]
        with config_alone():
            wrapped = accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, and nothing for gradients
        for part in self.parts():
            shard(part, accelerator.device)
        return wrapped

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state, undivided."""
        return whole_state(optimizer) if self.undivided else optimizer.state_dict()

    def give_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """The inverse of `state_of`, in place. Raises KeyError, TypeError or ValueError for a state of another version."""
        optimizer.load_state_dict(divided_state(state, optimizer) if self.undivided else state)
