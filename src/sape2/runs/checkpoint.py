"""Checkpoints: checkpoint/step-N with weights, optimiser state and progress, from which a run resumes.

There is no random state to keep: every draw of a step is seeded by (seed, step). Nothing here is unpickled freely:
weights are safetensors, the optimiser is read with weights_only.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from sape2.machine import uncompiled_name
from sape2.runs.files import write_atomic, write_text


def save_weights(path: Path, model: nn.Module) -> None:
    """Under the names that the model has where neither it nor a part of it is compiled."""
    state = {uncompiled_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    about = {"format": "pt"}  # which other loaders of safetensors ask for
    write_atomic(path, lambda temporary: save_file(state, str(temporary), about))


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads weights in place. Raises ValueError naming the first difference if the file holds another model or is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        load_model(model, path)
    except (RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise ValueError(f"{path} does not hold the weights of this model: {reason}") from error


@dataclass
class Progress:
    """Progress of a run: the next step, sums over the current epoch, the best epoch so far."""

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    best_accuracy: float = -1.0


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, ema: nn.Module | None, optimizer_state: dict[str, Any]
) -> None:
    """Writes checkpoint/step-N, then removes the previous checkpoint."""
    parent = folder / "checkpoint"
    final = parent / f"step-{progress.step:08d}"
    if final.exists():  # the same step again: what it holds is the same
        return
    temporary = parent / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_weights(temporary / "model.safetensors", model)
        if ema is not None:
            save_weights(temporary / "ema.safetensors", ema)
        write_atomic(temporary / "optimizer.pt", lambda path: torch.save(optimizer_state, path))
        write_text(temporary / "progress.json", json.dumps(asdict(progress)))
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    keep_only(final)


def keep_only(checkpoint: Path) -> None:
    """Removes all other checkpoints, renaming each first, so that an interrupted removal leaves none that looks complete."""
    for other in checkpoint.parent.iterdir():
        if other == checkpoint:
            continue
        if not other.name.startswith("."):
            other = other.rename(other.with_name(f".removing-{other.name}-{os.getpid()}"))
        shutil.rmtree(other, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    parent = folder / "checkpoint"
    if not parent.is_dir():
        return None
    return max((path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name)), default=None)


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module | None) -> tuple[Progress, dict[str, Any]]:
    """Loads the weights in place; returns the progress and the optimiser's state.

    Raises ValueError if it is damaged, or written by a version with another format.
    """
    load_weights(path / "model.safetensors", model)
    if ema is not None:
        load_weights(path / "ema.safetensors", ema)
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        if f"step-{progress.step:08d}" != path.name or not isinstance(progress.sums, dict):
            raise ValueError("progress.json is not of this step")
        if not isinstance(state, dict) or "optimizer" not in state:
            raise ValueError("optimizer.pt has no optimizer in it")
        return progress, state
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or of another version ({reason}); remove it to start again") from error
