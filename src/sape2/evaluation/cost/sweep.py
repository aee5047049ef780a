"""Measures the cost of encodings over grids, batches and dtypes, for `sape2 cost`.

In a point (one level, dtype, batch, grid) all encodings take turns, beside two yardsticks: `none`, the same code without
an encoding, and at the level of attention `plain`, softmax(q k^T / sqrt(d)) v written with matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sape2.config import model_config
from sape2.config.names import unknown
from sape2.encodings import canonical_name, create_encodings, parse_encoding
from sape2.encodings.grid import Grid, check_grid, num_tokens
from sape2.evaluation.cost.measure import count_parameters
from sape2.evaluation.cost.memory import peak_bytes, within_available
from sape2.evaluation.cost.rows import LEVELS, PHASES, Row, counted_rows, growth_rows, timed_rows
from sape2.evaluation.cost.subjects import DTYPES, NONE, PLAIN, Point, Subject, attention_subject, model_subject
from sape2.evaluation.cost.timing import alternate
from sape2.runs.files import write_text
from sape2.tables import json_text
from sape2.training.memory_errors import is_out_of_memory

WARMUP = 2
SUBJECTS = {"attention": attention_subject, "model": model_subject}


# --- what to measure -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep. Raises ValueError for names, sizes and combinations that are not possible."""

    encodings: tuple[str, ...]
    grids: tuple[Grid, ...]
    batches: tuple[int, ...] = (4,)
    dtypes: tuple[str, ...] = ("fp32",)
    model: str = "vit_small"
    levels: tuple[str, ...] = LEVELS
    repeats: int = 7
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "encodings", tuple(dict.fromkeys(map(canonical_name, self.encodings))))
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise unknown("dtype", dtype, DTYPES)
        config = model_config(self.model)
        for grid in map(check_grid, self.grids):
            for encoding in self.encodings:
                with torch.device("meta"):  # what cannot be made is found before anything is measured
                    create_encodings(encoding, config.num_heads, config.head_dim, grid, config.depth)

    def points(self) -> list[Point]:
        """The points, in the order in which they are measured."""
        return [
            Point(level, self.model, dtype, batch, grid, self.device)
            for level in self.levels
            for dtype in self.dtypes
            for batch in self.batches
            for grid in self.grids
        ]

    def settings(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.loads(json.dumps(values | {"device": self.device.type}))

    @property
    def rounds(self) -> int:
        """Total number of timing rounds, for a progress bar."""
        return len(self.points()) * 2 * (WARMUP + self.repeats)


def parse_grid(text: str) -> Grid:
    """ "8x14" -> (8, 14): rows, columns."""
    sides = text.strip().lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"a grid is rows x columns, both at least 1, as in 8x8 or 14x24; got {text.strip()!r}")
    return int(sides[0]), int(sides[1])


def attention_part(name: str) -> str:
    """The parts of a name that act in one attention layer: "ape+sape2:every=2" -> "sape2"; "none" if there are none."""
    parts = [part for part in parse_encoding(name) if not part.acts_on_tokens]
    options = [",".join(f"{key}={value}" for key, value in part.options.items()) for part in parts]
    return "+".join(part.name + f":{text}" * bool(text) for part, text in zip(parts, options, strict=True)) or NONE


# --- measuring -------------------------------------------------------------------------------------------------------


def run_sweep(
    sweep: Sweep, path: Path, conditions: Row, on_round: Callable[[], None] = lambda: None
) -> Iterator[tuple[Point | None, list[Row]]]:
    """The rows of every point as they come and, last, for None, the growth exponents; all are also written to `path`,
    which holds the points so far or, before the first, what it held.
    """
    everything: list[Row] = []
    for point in (*sweep.points(), None):
        rows = growth_rows(everything) if point is None else measure(point, sweep, conditions, on_round)
        everything += rows
        write_text(path, "".join(json_text(row) + "\n" for row in everything))
        yield point, rows


def measure(point: Point, sweep: Sweep, conditions: Row, on_round: Callable[[], None] = lambda: None) -> list[Row]:
    """All rows of a point, the yardsticks first. At the level of attention, names that differ in what acts on the tokens
    alone are one subject, timed once; `timed_as` names it.
    """
    names = dict.fromkeys((NONE, *sweep.encodings))
    timed_as = {name: attention_part(name) if point.level == "attention" else name for name in names}
    if point.level == "attention":
        timed_as = {PLAIN: PLAIN} | timed_as
    subjects = {name: SUBJECTS[point.level](name, point) for name in dict.fromkeys(timed_as.values())}
    results = {phase: _measure_phase(phase, subjects, sweep, on_round) for phase in PHASES[point.level]}
    rows = []
    for name, timed in timed_as.items():
        subject, about = subjects[timed], {"encoding": name, "timed_as": timed} | _about(point) | conditions
        paths = [result[timed].get("path") for result in results.values()]
        found = counted_rows(count_parameters(subject.module), subject.macs, paths[0])
        for phase, result in results.items():
            found += timed_rows(phase, timed, result, point.batch)
        rows += [row | about for row in found]
    return rows


def _about(point: Point) -> Row:
    config = model_config(point.model)
    return {
        "level": point.level,
        "model": point.model if point.level == "model" else None,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "grid": f"{point.grid[0]}x{point.grid[1]}",
        "tokens": num_tokens(point.grid),
        "batch": point.batch,
        "dtype": point.dtype,
        "device": point.device.type,
    }


def _measure_phase(phase: str, subjects: dict[str, Subject], sweep: Sweep, on_round: Callable[[], None]) -> dict[str, Row]:
    """Measures `seconds`, `bytes` and `path` of every subject, or gives a `note` on why it was not run."""
    results: dict[str, Row] = {}
    for name, subject in subjects.items():
        note = _out_of_memory(subject.steps[phase], sweep.device)
        results[name] = {"note": note} if note else {"path": subject.describe(phase)}
    steps = {name: subject.steps[phase] for name, subject in subjects.items() if "note" not in results[name]}
    if sweep.device.type in ("cpu", "cuda"):
        for name, step in steps.items():
            results[name]["bytes"] = peak_bytes(step, sweep.device)
    for name, seconds in alternate(steps, sweep.repeats, WARMUP, on_round).items():
        results[name]["seconds"] = seconds
    return results


def _out_of_memory(step: Callable[[], object], device: torch.device) -> str | None:
    """Runs a step once; why it cannot run, if memory ends."""
    try:
        with within_available(device):
            step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return f"out of memory: {' '.join(str(error).split())}"
    return None
