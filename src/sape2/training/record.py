"""Writes the run folder during training: settings, a line for each epoch, checkpoints, weights, TensorBoard events."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from sape2.config.extras import from_extra
from sape2.progress import say
from sape2.runs.checkpoint import Progress, save_checkpoint, save_weights
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.tables import Row

CONDITIONS = {"epoch", "step", "precision", "device", "processes"}  # of an epoch's line: no curve is drawn of them


class Record:
    """Writes the run folder in the main process; in other processes every method does nothing.

    Before it writes, it checks that this process still holds the folder. With `curves`, TensorBoard has the epochs too.
    """

    def __init__(self, run: Run, is_main: bool, quiet: bool, curves: bool = True) -> None:
        self.run, self.is_main, self.quiet, self.curves = run, is_main, quiet or not is_main, curves
        self.board: Any = None

    def check(self) -> None:
        if self.is_main:
            self.run.check_lock()

    def begin(self, progress: Progress, fingerprint: Row | None) -> None:
        """Creates the folder, or prepares it to resume at a step: lines of epochs that will be repeated are removed."""
        if self.is_main:
            self.run.start(fingerprint)
            self._forget_epochs_after(progress.step)
            if self.curves:
                self.board = open_board(self.run.folder, len(self.run.epochs()))
        self.say(f"{self.run.folder}: {f'going on from step {progress.step}' if progress.step else 'starting'}")

    def tell_change(self, where: Row) -> None:
        """Says in what the epochs so far were trained, if it is not `where` the next ones are: precision and device."""
        last = (self.run.epochs() if self.is_main else [])[-1:]
        changed = [f"{key} {row[key]} so far, {now} from here on" for row in last for key, now in where.items()
                   if row.get(key) not in (None, now)]  # fmt: skip
        if changed:
            self.say(f"the result will not be that of a run in one place: {'; '.join(changed)}")

    def epoch(self, row: Row, told: str, best: nn.Module | None = None) -> None:
        """The row of an epoch, `told` in a line; `best` are its weights if none were better on the validation set before."""
        if self.is_main:
            if best is not None:
                save_weights(self.run.weights("best"), best)
            path = self.run.folder / "metrics.jsonl"
            write_rows(path, [*read_rows(path), row])
            if self.board is not None:
                for name in row.keys() - CONDITIONS:
                    self.board.add_scalar(name, row[name], row["epoch"])
                self.board.flush()
        self.say(told)

    def checkpoint(self, progress: Progress, weights: list[nn.Module], state: dict[str, Any]) -> None:
        """`weights` are the model and, where there is one, its average."""
        self.check()
        if self.is_main:
            save_checkpoint(self.run.folder, progress, weights[0], weights[1] if len(weights) > 1 else None, state)

    def finish(self, weights: nn.Module) -> None:
        """Writes the final weights, whose file marks the run as finished."""
        self.check()
        if self.is_main:
            save_weights(self.run.weights("last"), weights)

    def close(self) -> None:
        """Ends the file and the thread of the TensorBoard events."""
        if self.board is not None:
            with contextlib.suppress(OSError, ValueError):  # what ended the training is told, not what follows from it
                self.board.close()
            self.board = None

    def say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def _forget_epochs_after(self, step: int) -> None:
        path = self.run.folder / "metrics.jsonl"
        rows = read_rows(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{path} has a line without its step, so it cannot be continued; choose another --out")
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_rows(path, kept)


def open_board(folder: Path, epochs: int = 0) -> Any:
    """TensorBoard events in folder/tensorboard, after so many epochs: those of later ones, which are repeated, do not count."""
    tensorboard = from_extra("train", "torch.utils.tensorboard", "training writes TensorBoard events")
    return tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=epochs + 1 if epochs else None)
