"""A study: encodings x seeds under one recipe, a run folder each; the work on it, shared by any number of processes.

OUT/study.json holds the settings that all runs share, OUT/ENCODING-sSEED the runs, OUT/rows.jsonl a line for each that is
finished or has failed. What is to be done follows from these files alone, so a process may stop, or be killed, at any moment.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sape2.checkpoint import check_run, difference, standing
from sape2.claim import Claim, ClaimLost, Held, Watcher
from sape2.config import RunConfig
from sape2.files import write_text
from sape2.rawrows import FAILED, Row, digest_of, failure, finished_rows, gather, is_done, note_failure, shared_settings

DEATHS = 3  # so many processes that vanished in a run without a new checkpoint: it is not tried a further time
LOOK_S = 2.0  # between looks at runs that others hold


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.config.model.encoding} seed {self.config.seed}"

    @property
    def digest(self) -> str:
        return digest_of(self.config.identity())


@dataclass(frozen=True)
class Study:
    """`config` without its encoding and seed, which the grid gives. Raises ValueError for an empty or ambiguous grid."""

    config: RunConfig
    encodings: tuple[str, ...]
    seeds: int
    folder: Path

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1; got {self.seeds}")
        names = [cell.folder.name for cell in self.cells()]
        if len(set(names)) < len(names):
            raise ValueError(f"two of these encodings would share a folder: {', '.join(self.encodings)}; give one of them")

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a study that is stopped has about as many seeds of every encoding."""
        return [self._cell(encoding, seed) for seed in range(self.seeds) for encoding in self.encodings]

    def _cell(self, encoding: str, seed: int) -> Cell:
        config = replace(self.config, model=replace(self.config.model, encoding=encoding), seed=seed)
        return Cell(config, self.folder / f"{safe_name(encoding)}-s{seed}")

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def settings(self) -> dict[str, Any]:
        return json.loads(json.dumps(shared_settings(self.config.identity())))

    def check(self) -> None:
        """Raises ValueError if the folder holds another study or something else. Changes nothing."""
        path = self.folder / "study.json"
        if not path.exists():
            if self.folder.is_dir() and any(not there.name.startswith(".") for there in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no study (no study.json); choose another --out")
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"{self.folder} is a file, not a folder")
            return
        try:
            there = RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))).identity()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or of another version of sape2: {error}") from error
        there = json.loads(json.dumps(shared_settings(there)))
        if there != self.settings():
            raise ValueError(
                f"{self.folder} holds another study, which differs in {difference(there, self.settings())}; "
                "choose another --out, or give the same settings to go on"
            )
        for cell in self.cells():
            check_run(cell.folder, cell.config)

    def start(self) -> None:
        """Makes the folder, or takes it up if it holds this study."""
        self.check()
        if not (self.folder / "study.json").exists():
            write_text(self.folder / "study.json", json.dumps(self.settings(), indent=2) + "\n")

    def settled(self) -> set[str]:
        """The digests of the cells that are finished or have failed; a finished one may have lost its folder."""
        done = {row["digest"] for row in finished_rows(self.rows)}
        left = [cell for cell in self.cells() if cell.digest not in done]
        return done | {cell.digest for cell in left if is_done(cell.folder) or failure(cell.folder)}

    def gather(self) -> list[Row]:
        """OUT/rows.jsonl, brought up to date."""
        return gather(self.rows, {cell.folder: cell.config for cell in self.cells()})


def safe_name(encoding: str) -> str:
    """ "ape+sape2:count=cyclic" -> "ape+sape2_count=cyclic"."""
    name = re.sub(r"[^\w+=.-]+", "_", encoding)
    return name if len(name) <= 120 else f"{name[:100]}-{digest_of({'encoding': encoding})}"


# --- work ------------------------------------------------------------------------------------------------------------

Run = Callable[[Cell, Claim], None]  # trains and measures one cell, from where it stands
Tell = Callable[[str, Cell, list[Row]], None]  # hears what happens to which cell, and the rows there are then


class Stopped(Exception):
    """The process was asked to stop, by this signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped; the same command goes on from there")
        self.signal_number = signal_number


def work(
    study: Study,
    run: Run,
    tell: Tell = lambda what, cell, rows: None,
    caught: Sequence[int] = (),
    watcher: Watcher | None = None,
) -> list[Row]:
    """Does what is left of the study together with other processes, and returns the rows when nothing is left.

    A run that another process holds is skipped and looked at again at the end: waited for, or taken over if that process
    is gone. A run that raises is noted as failed, and the rest goes on; only OSError (a full disk, a folder that is gone)
    stops the work. `tell` hears "starting", "finished", "failed" or "waiting". Raises Stopped before the next run, or while
    waiting, once a signal is in `caught`.
    """
    watcher = watcher or Watcher()
    for cell in _until_settled(study, caught, tell):
        try:
            claim = watcher.claim(cell.folder, note=standing(cell.folder))
        except Held:
            continue
        with claim:
            if is_done(cell.folder) or failure(cell.folder):  # by another process, since we looked
                continue
            tell("starting", cell, [])
            what = _attempt(cell, claim, run)
            if what:
                tell(what, cell, study.gather())
    return study.gather()


def _until_settled(study: Study, caught: Sequence[int], tell: Tell) -> Iterator[Cell]:
    """The cells that are not settled, again and again until there are none, with a pause where a round settled none."""
    settled = study.settled()
    while left := [cell for cell in study.cells() if cell.digest not in settled]:
        for cell in left:
            if caught:
                raise Stopped(caught[0])
            yield cell
        before, settled = settled, study.settled()
        if settled == before:
            tell("waiting", left[0], [])
            time.sleep(LOOK_S)


def _attempt(cell: Cell, claim: Claim, run: Run) -> str | None:
    """Runs the cell; "finished", or "failed" with the reason noted, or None if another process took it over."""
    if claim.holder.deaths >= DEATHS:
        reason = f"{DEATHS} processes in turn vanished in it at {claim.holder.note}; killed for want of memory, perhaps"
        note_failure(cell.folder, cell.config, reason)
        return "failed"
    try:
        run(cell, claim)
    except ClaimLost:
        return None
    except (OSError, Stopped):
        raise
    except Exception as error:
        claim.check()
        note_failure(cell.folder, cell.config, reason_of(error))
        return "failed"
    return "finished"


def reason_of(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"[:500]


def forget_failures(study: Study) -> None:
    """So that failed runs are tried again, from their last checkpoint."""
    for cell in study.cells():
        (cell.folder / FAILED).unlink(missing_ok=True)


def seconds_left(study: Study, rows: list[Row], workers: int, present: tuple[Cell, float, float] | None) -> float | None:
    """From the training time of finished runs: the mean of the same encoding, else of all; None if nothing is known.

    `present` is the run under way, the share of it that is done, and the seconds that the whole of it takes at this pace;
    `workers` share the rest evenly.
    """
    finished = [row for row in rows if "failed" not in row]
    took: dict[str, list[float]] = {}
    for row in finished:
        took.setdefault(row["encoding"], []).append(row["training_s"])
    if present:
        took.setdefault(present[0].config.model.encoding, [present[2]])
    everything = [seconds for some in took.values() for seconds in some]
    if not everything:
        return None
    settled = {row["digest"] for row in rows}
    left = 0.0
    for cell in study.cells():
        if cell.digest not in settled:
            known = took.get(cell.config.model.encoding, everything)
            done = present[1] if present and present[0] == cell else 0.0
            left += sum(known) / len(known) * (1 - done)
    return left / max(1, workers)
