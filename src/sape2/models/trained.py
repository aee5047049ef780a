"""The model of a run: newly initialised from its settings and seed, or with the weights of its folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sape2.config import RunConfig
from sape2.data.augment import derive_seed
from sape2.machine import find_device
from sape2.models.hub import unfilled
from sape2.models.vit import ViT
from sape2.runs.run import Run
from sape2.training.memory_errors import OutOfMemory, available_bytes, memory_message, told_in_one_line

Load = Callable[[str], ViT]  # "last" or "best" -> the model with these weights


def build_model(config: RunConfig) -> ViT:
    """A new model whose weights outside its encodings depend on the seed and on nothing else."""
    what = f"in building {config.model.depth} layers of width {config.model.dim}"
    message = partial(memory_message, what, config.model, ["a smaller --model"])
    if config.model.least_bytes > available_bytes():
        raise OutOfMemory(message())
    torch.manual_seed(derive_seed(config.seed, "weights"))
    with told_in_one_line(message):
        return ViT(config.model)


def load_run_model(run: Run[RunConfig], weights: str = "last") -> ViT:
    """The trained model of a finished run, ready to be measured, on the accelerator if there is one."""
    model = unfilled(ViT, run.config.model)
    run.load(model, weights)
    return model.to(find_device()).eval()
