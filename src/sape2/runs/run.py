"""One run: a folder, its settings, and everything that commands and studies ask about it.

The folder holds config.json, data.json (which images, `data.fingerprint`), checkpoint/step-N/ (resume), metrics.jsonl (a line
per epoch), best.safetensors (best epoch on the validation set), model.safetensors (last epoch; its presence says that
the run is finished), results.jsonl and figures/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Generic, Literal

from torch import nn

from sape2.config import RunConfig
from sape2.config.command import command
from sape2.data.pixels import RULE
from sape2.runs.checkpoint import keep_only, last_checkpoint, load_weights
from sape2.runs.files import holds_files, read_text, write_text
from sape2.runs.images import other_images, other_rule
from sape2.runs.lock import Lock, hold, one_at_a_time
from sape2.runs.rows import EPOCH, RESULT, read_rows, shown, with_new, write_rows
from sape2.runs.settings import NAME, Config, canonical, check_same, read_config, write_config
from sape2.tables import Row

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}  # last epoch, best epoch on the validation set
OF_A_RUN = (NAME, *WEIGHTS.values(), "data.json", "metrics.jsonl", "results.jsonl")
NEW_RUN = "choose another --out for a new run"


class Run(Generic[Config]):
    """The run of `config` in `folder`. Settings and images are read once; state, checkpoint and rows are those of the moment.

    Nothing is read or written when it is made: `open` and `check_settings` read, `start` makes the folder. `lock` is what this
    process holds the folder with, None if it does not.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config: Config = canonical(config)
        self.lock: Lock | None = None
        self._is_checked = False
        self._seen: Row | None = None
        self._same_images: Row | None = None

    @staticmethod
    def open(folder: str | Path) -> Run[RunConfig]:
        """The run that a folder holds, in whatever state. Raises OSError or ValueError for what is no run folder."""
        return Run(Path(folder), read_config(Path(folder), RunConfig))

    @staticmethod
    def open_finished(folder: str | Path) -> Run[RunConfig]:
        """Raises ValueError for an unfinished run, with its progress and the command that resumes it."""
        run = Run.open(folder)
        if run.state != "finished":
            words = run.command
            go_on = f"go on with: {words}" if words else "give its sape2 train command again to go on"
            raise ValueError(f"the run in {run.folder} is not finished: {run.progress}; {go_on}")
        return run

    # --- settings and state --------------------------------------------------------------------------------------------

    def check_settings(self) -> None:
        """Raises ValueError if the folder holds another run, or something that is not a run. Changes nothing."""
        if self._is_checked or (not holds_files(self.folder) and (self.folder.is_dir() or not self.folder.exists())):
            return
        check_same(self.folder, read_config(self.folder, type(self.config)), self.config)
        self._is_checked = True

    @property
    def state(self) -> Literal["new", "interrupted", "finished"]:
        if self.weights("last").exists():
            return "finished"
        return "interrupted" if (self.folder / "config.json").exists() else "new"

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint."""
        return last_checkpoint(self.folder)

    @property
    def reached(self) -> str:
        """Name of the last checkpoint, for a person or to compare with an earlier one."""
        return self.checkpoint.name if self.checkpoint else "no checkpoint yet"

    @property
    def progress(self: Run[RunConfig]) -> str:
        """ "at step 40 of 60, in epoch 2 of 3"; the total is known after the first epoch."""
        last, epochs, done = self.checkpoint, self.config.train.epochs, self.epochs()
        if last is None:
            return f"no checkpoint yet of its {epochs} epochs"
        step = int(last.name.removeprefix("step-"))
        if not done:
            return f"at step {step}, in epoch 1 of {epochs}"
        steps = done[-1]["step"] // done[-1]["epoch"]  # of an epoch
        return f"at step {step} of {steps * epochs}, in epoch {min(step // steps + 1, epochs)} of {epochs}"

    @property
    def command(self: Run[RunConfig]) -> str | None:
        """The `sape2 train` command that made it and resumes it; None for a recipe that is not known here."""
        return command(self.config, self.folder)

    # --- the folder ------------------------------------------------------------------------------------------------------

    def hold(self) -> Lock:
        """Locks the folder, which is created if necessary; a `with` block releases it. Raises Held if it is taken."""
        self.lock = hold(self.folder, note=self.reached)
        return self.lock

    def check_lock(self) -> None:
        """Raises OSError if this process held the folder and has lost it."""
        if self.lock is not None:
            self.lock.check()

    def start(self, fingerprint: Row | None = None) -> None:
        """Writes the settings and the fingerprint of the images, unless they are there, and keeps only the last checkpoint."""
        if checkpoint := self.checkpoint:
            keep_only(checkpoint)
        if self.state == "new":
            write_config(self.folder, self.config)
        if fingerprint is not None and not self._images.exists():
            write_text(self._images, json.dumps(fingerprint, indent=2) + "\n")

    # --- images ----------------------------------------------------------------------------------------------------------

    @property
    def _images(self) -> Path:
        return self.folder / "data.json"

    @property
    def seen(self) -> Row:
        """The fingerprint of the images that it saw; {} if it is not known. Raises ValueError if data.json is damaged."""
        if self._seen is None and self._images.exists():
            try:
                found = json.loads(read_text(self._images))
            except (ValueError, RecursionError) as error:
                raise self._damaged(error) from error
            if not isinstance(found, dict):
                raise self._damaged("it is no JSON object")
            self._seen = found
        return self._seen or {}

    def _damaged(self, reason: object) -> ValueError:
        return ValueError(
            f"{self._images} is damaged ({reason}); remove it if you know that --data holds the images of this run"
        )

    def check_images(self, fingerprint: Row | None, way_out: str = NEW_RUN) -> None:
        """Raises ValueError if the run saw other images, as far as `data.fingerprint` can tell.

        Before it is finished it must also have read them by the rule of now: by two rules, one run would see two kinds of
        pixels. A finished run of another rule may be measured, with `note_of_rule`.
        """
        if fingerprint is None or fingerprint == self._same_images or not self._images.exists():
            return
        try:
            found = other_images(self.seen, fingerprint)
        except (TypeError, AttributeError, KeyError) as error:
            raise self._damaged(error) from error
        if found is not None:
            raise ValueError(f"{self.folder} saw other images: {found}. Give the --data it began with, or {way_out}")
        rule = other_rule(self.seen, fingerprint.get("reading_rule"))
        if rule is not None and self.state != "finished":
            raise ValueError(
                f"{self.folder} read its images by rule {rule}, now it is rule {fingerprint['reading_rule']} (docs/data.md), "
                "which can give other pixels. Finish it with the version that began it, choose another --out, or, if every "
                f"image is opaque, upright and of 8 bits, remove {self._images}"
            )
        self._same_images = fingerprint

    @property
    def note_of_rule(self) -> str | None:
        """A note that the run read its images by another rule than the present version does; None if it did not."""
        if (rule := other_rule(self.seen, RULE)) is None:
            return None
        return f"{self.folder} read its training images by rule {rule}; here images are read by rule {RULE} (docs/data.md)"

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits; None if unknown."""
        known = self.seen.get("classes")
        return list(map(str, known)) if isinstance(known, list) and len(known) == self.config.model.num_classes else None

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the logits, or their numbers."""
        return self.class_names or list(map(str, range(self.config.model.num_classes)))

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of some training images in their files; the model's where that is not known."""
        train = self.seen.get("train")
        found = train.get("sizes") if isinstance(train, dict) else None
        sizes = [(each[0], each[1]) for each in found if _is_size(each)] if isinstance(found, list) else []
        return sizes or [self.config.model.image_size]

    # --- weights and rows ------------------------------------------------------------------------------------------------

    def weights(self, which: str) -> Path:
        """The file of the "last" or the "best" weights. Raises ValueError for any other word."""
        if which not in WEIGHTS:
            raise ValueError(f"weights are {' or '.join(WEIGHTS)}; got {which!r}")
        return self.folder / WEIGHTS[which]

    def load(self, model: nn.Module, which: str = "last") -> None:
        """Loads its weights into the model in place; raises OSError or ValueError as `load_weights`."""
        load_weights(self.weights(which), model)

    def epochs(self) -> list[Row]:
        """The lines of its epochs so far."""
        return read_rows(self.folder / "metrics.jsonl", EPOCH)

    def results(self) -> list[Row]:
        """What was measured on its own images; of each measurement the rows over most images."""
        return shown(read_rows(self.folder / "results.jsonl", RESULT))

    def add_results(self, rows: list[Row]) -> None:
        """Puts rows into results.jsonl, in place of earlier ones over as many images or fewer (`rows.with_new`).

        Raises FileNotFoundError if the folder is gone.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was removed while it was being measured; nothing is written there")
        path = self.folder / "results.jsonl"
        with one_at_a_time(self.folder):  # several commands may measure a run at once
            write_rows(path, with_new(read_rows(path, RESULT), rows))

    @property
    def is_measured(self) -> bool:
        """True if it is finished and has the last rows that `train` writes: accuracy on all test images, with both weights."""
        if self.state != "finished":
            return False
        rows = (row for row in self.results() if (row.get("measure"), row.get("name")) == ("accuracy", "accuracy"))
        return set(WEIGHTS) <= {r.get("weights") for r in rows if r.get("split") == "test" and r.get("limit") is None}


def trained_in(epochs: list[Row]) -> str | None:
    """The precision of these epochs; "bf16, then fp32" of a run that went on where `auto` is another; None if not known."""
    return ", then ".join(dict.fromkeys(row["precision"] for row in epochs if row.get("precision"))) or None


def check_output(file: Path, *read: Path) -> None:
    """Raises ValueError for a file of a run or a model, or one of those that the command reads: it would be lost."""
    if file.name in OF_A_RUN and (file.parent / NAME).exists():
        raise ValueError(f"{file} belongs to the run or model in that folder; choose another --out")
    if file.exists() and any(path.exists() and file.samefile(path) for path in read):
        raise ValueError(f"{file} is read by this command, and would be lost; choose another --out")


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)
