"""Errors for commands that need a finished run: they say how far the run is and how to resume it."""

from __future__ import annotations

from pathlib import Path

from sape2.config import RunConfig
from sape2.config.command import train_command
from sape2.training.checkpoint import last_checkpoint
from sape2.training.run_folder import is_finished, read_config, read_rows


def check_finished(folder: Path) -> None:
    """Raises ValueError with the progress of an unfinished run and the command that resumes it. Changes nothing."""
    config = read_config(folder)
    if not is_finished(folder):
        raise ValueError(f"the run in {folder} is not finished: {where(folder, config)}; {_go_on(folder, config)}")


def where(folder: Path, config: RunConfig) -> str:
    """ "at step 40 of 60, in epoch 2 of 3"; the total is known after the first epoch."""
    last = last_checkpoint(folder)
    if last is None:
        return f"no checkpoint yet of its {config.train.epochs} epochs"
    step, done = int(last.name.removeprefix("step-")), read_rows(folder / "metrics.jsonl")
    if not done:
        return f"at step {step}, in epoch 1 of {config.train.epochs}"
    steps = done[-1]["step"] // done[-1]["epoch"]  # of an epoch
    epoch = min(step // steps + 1, config.train.epochs)
    return f"at step {step} of {steps * config.train.epochs}, in epoch {epoch} of {config.train.epochs}"


def _go_on(folder: Path, config: RunConfig) -> str:
    try:
        return f"go on with: {train_command(config, folder)}"
    except ValueError:  # a recipe of another version
        return "give its sape2 train command again to go on"
