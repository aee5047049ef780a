"""The charts made from the rows of each measure, for one run or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from sape2.viz.curves import (
    PLAIN,
    Notes,
    NothingToDraw,
    Runs,
    plot_equivariance,
    plot_grouping,
    plot_health,
    plot_resolution,
    plot_shift,
)

PICTURES: dict[str, dict[str, Callable[..., None]]] = {
    "shift": {"shift": plot_shift, "equivariance": plot_equivariance},
    "resolution": {"resolution": plot_resolution},
    "grouping": {"grouping": plot_grouping},
    "health": {"health": plot_health},
}


def plot_measures(
    runs: Runs, measures: Iterable[str], folder: Path, ending: str = "", notes: Notes = PLAIN, beginning: str = ""
) -> list[Path]:
    """Draws the named measures as far as they have rows; returns the files, `beginning` + NAME + `ending` + .png."""
    written = []
    for measure in measures:
        rows = {run: [row for row in found if row["measure"] == measure] for run, found in runs.items()}
        for name, plot in PICTURES.get(measure, {}).items():
            path = folder / f"{beginning}{name}{ending}.png"
            try:
                plot(rows, path, notes=notes)
            except NothingToDraw:  # a model that cannot be looked into has no rows by layer
                continue
            written.append(path)
    return written
