"""Writes the run folder during training: settings, a line for each epoch, checkpoints, weights, TensorBoard events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sape2.config import RunConfig
from sape2.training.checkpoint import Progress, save_checkpoint, save_weights
from sape2.training.run_folder import Row, read_rows, start_run, write_rows

CONDITIONS = {"epoch", "step", "precision", "device", "processes"}  # of an epoch's line: no curve is drawn of them


class Record:
    """Writes the run folder in the main process; in other processes every method does nothing.

    `check_folder` is called before anything is written; it raises if another process holds the folder by now.
    """

    def __init__(self, folder: Path, config: RunConfig, is_main: bool, quiet: bool, check_folder: Callable[[], None]) -> None:
        self.folder, self.config, self.is_main, self.quiet = folder, config, is_main, quiet or not is_main
        self.check = check_folder if is_main else lambda: None
        self.board: Any = None

    def begin(self, progress: Progress, fingerprint: Row | None) -> None:
        """Creates the folder, or prepares it to resume at a step: lines of epochs that will be repeated are removed."""
        if self.is_main:
            start_run(self.folder, self.config, fingerprint)
            self.board = open_board(self.folder)
            self._forget_epochs_after(progress.step)
        self.say(f"{self.folder}: {f'going on from step {progress.step}' if progress.step else 'starting'}")

    def epoch(self, row: Row, best: nn.Module | None) -> None:
        """An epoch's line; `best` are its weights if none were better on the validation set before."""
        if self.is_main:
            if best is not None:
                save_weights(self.folder / "best.safetensors", best)
            path = self.folder / "metrics.jsonl"
            write_rows(path, [*read_rows(path), row])
            for name in row.keys() - CONDITIONS:
                self.board.add_scalar(name, row[name], row["epoch"])
            self.board.flush()
        self.say(
            f"epoch {row['epoch']}/{self.config.train.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}  "
            f"validation {row['validation_accuracy']:.4f}  {row['images_per_s']:.0f} images/s"
        )

    def checkpoint(self, progress: Progress, model: nn.Module, average: nn.Module | None, state: dict[str, Any]) -> None:
        self.check()
        if self.is_main:
            save_checkpoint(self.folder, progress, model, average, state)

    def finish(self, weights: nn.Module) -> None:
        """Writes the final weights, whose file marks the run as finished."""
        self.check()
        if self.is_main:
            save_weights(self.folder / "model.safetensors", weights)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def _forget_epochs_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        rows = read_rows(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{path} has a line without its step, so it cannot be continued; choose another --out")
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_rows(path, kept)


def open_board(folder: Path) -> Any:
    """TensorBoard events in folder/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training writes TensorBoard events: pip install 'sape2[train]'") from error
    return SummaryWriter(str(folder / "tensorboard"))
