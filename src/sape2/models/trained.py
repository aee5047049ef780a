"""A model from the settings of a run, new with its seed or as its folder holds it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sape2.config import RunConfig
from sape2.data.augment import derive_seed
from sape2.data.pixels import RULE
from sape2.models.vit import ViT
from sape2.training.checkpoint import load_weights, other_rule, read_config
from sape2.training.memory_errors import in_building, told_in_one_line
from sape2.training.standing import check_finished

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}  # last epoch, best epoch on the validation set


def build_model(config: RunConfig) -> ViT:
    """A new model whose weights outside its encodings depend on the seed and on nothing else."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    with told_in_one_line(lambda: in_building(config.model)):
        return ViT(config.model)


def load_run_model(folder: Path, weights: str = "last") -> ViT:
    """The trained model of a run folder, ready to be measured, on the accelerator if there is one."""
    check_finished(folder)
    model = ViT(read_config(folder).model)
    load_weights(folder / WEIGHTS[weights], model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval()


def note_of_rule(folder: Path) -> str | None:
    """What to tell those who look at a finished run whose images were read by another rule than now."""
    try:
        rule = other_rule(json.loads((folder / "data.json").read_text(encoding="utf-8")), RULE)
    except (OSError, ValueError, AttributeError, RecursionError):  # an older run, or one that was copied in parts
        return None
    if rule is None:
        return None
    return f"{folder} read its training images by rule {rule}; here images are read by rule {RULE} (docs/data.md)"
