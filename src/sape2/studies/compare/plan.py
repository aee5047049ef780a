"""The plan of a study: encodings x seeds under one recipe, with one run folder each.

OUT/study.json holds the settings that all runs share, OUT/ENCODING-sSEED the runs, OUT/rows.jsonl a line for each that is
finished or has failed. The remaining work follows from these files alone, so a process may stop, or be killed, at any time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sape2.config import RunConfig
from sape2.encodings import canonical_name
from sape2.runs.files import digest_of, holds_files, safe_name, write_text
from sape2.runs.run import Run
from sape2.runs.settings import how_it_differs
from sape2.studies.compare.rawrows import Row, failure, finished_rows, gather, shared_settings


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.config.model.encoding} seed {self.config.seed}"

    @cached_property
    def run(self) -> Run[RunConfig]:
        return Run(self.folder, self.config)

    @cached_property
    def digest(self) -> str:
        return digest_of(self.config.identity())


@dataclass(frozen=True)
class Study:
    """`config` without its encoding and seed, which the grid gives. Raises ValueError for an ambiguous grid."""

    config: RunConfig
    encodings: tuple[str, ...]
    seeds: int
    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "encodings", tuple(map(canonical_name, self.encodings)))
        names = [cell.folder.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two of these encodings are one, or would share a folder: {', '.join(self.encodings)}; give one of them"
            )

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells, seed by seed, so that an interrupted study has about equally many seeds of every encoding."""
        return tuple(self._cell(encoding, seed) for seed in range(self.seeds) for encoding in self.encodings)

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
            if holds_files(self.folder):
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
            raise ValueError(f"{self.folder} holds another study, {how_it_differs(there, self.settings())}")
        for cell in self.cells:
            cell.run.check_settings()

    def start(self) -> None:
        """Makes the folder, or takes it up if it holds this study."""
        self.check()
        if not (self.folder / "study.json").exists():
            write_text(self.folder / "study.json", json.dumps(self.settings(), indent=2) + "\n")

    def settled(self) -> set[str]:
        """The digests of the cells that are finished or have failed; a finished one may have lost its folder."""
        done = {row["digest"] for row in finished_rows(self.rows)}
        left = [cell for cell in self.cells if cell.digest not in done]
        return done | {cell.digest for cell in left if cell.run.is_measured or failure(cell.run)}

    def gather(self) -> list[Row]:
        """OUT/rows.jsonl, brought up to date."""
        return gather(self.rows, [cell.run for cell in self.cells])
