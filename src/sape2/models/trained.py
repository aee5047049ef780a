"""The model of a run: newly initialised from its settings and seed, or loaded with the weights of its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sape2.config import RunConfig
from sape2.data.augment import derive_seed
from sape2.data.pixels import RULE
from sape2.machine import find_device
from sape2.models.vit import ViT
from sape2.training.checkpoint import load_weights
from sape2.training.memory_errors import OutOfMemory, available_bytes, memory_message, told_in_one_line
from sape2.training.run_folder import class_names, other_rule, read_config, read_seen
from sape2.training.standing import check_finished

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}  # last epoch, best epoch on the validation set


def build_model(config: RunConfig) -> ViT:
    """A new model whose weights outside its encodings depend on the seed and on nothing else."""
    what = f"in building {config.model.depth} layers of width {config.model.dim}"
    message = partial(memory_message, what, config.model, ["a smaller --model"])
    if config.model.least_bytes > available_bytes():
        raise OutOfMemory(message())
    torch.manual_seed(derive_seed(config.seed, "weights"))
    with told_in_one_line(message):
        return ViT(config.model)


def load_run_model(folder: Path, weights: str = "last") -> ViT:
    """The trained model of a run folder, ready to be measured, on the accelerator if there is one."""
    check_finished(folder)
    model = ViT(read_config(folder).model)
    load_weights(folder / WEIGHTS[weights], model)
    return model.to(find_device()).eval()


def names_of_classes(folder: Path) -> list[str]:
    """Class names of a run, in the order of the logits; numbers if its folder has no names."""
    number = read_config(folder).model.num_classes
    return class_names(folder, number) or [str(label) for label in range(number)]


def sizes_trained_on(folder: Path) -> list[tuple[int, int]]:
    """(height, width) of some training images in their files; the model's where the folder does not tell."""
    train = read_seen(folder).get("train")
    found = train.get("sizes") if isinstance(train, dict) else None
    sizes = [(each[0], each[1]) for each in found if _is_size(each)] if isinstance(found, list) else []
    return sizes or [read_config(folder).model.image_size]


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


def note_of_rule(folder: Path) -> str | None:
    """A note that a finished run read its images by another rule than the present version does; None if it did not."""
    seen = read_seen(folder)
    rule = other_rule(seen, RULE) if seen else None
    if rule is None:
        return None
    return f"{folder} read its training images by rule {rule}; here images are read by rule {RULE} (docs/data.md)"
