"""Charts of measured numbers, with units on axes and scales: `plot_*` take data and a file name and write the file."""

from __future__ import annotations

from sape2.viz.confusion import plot_confusion
from sape2.viz.curves import (
    Notes,
    NothingToDraw,
    Panel,
    plot_curves,
    plot_equivariance,
    plot_grouping,
    plot_health,
    plot_resolution,
    plot_rows,
    plot_shift,
)
from sape2.viz.growth import plot_growth
from sape2.viz.measures import plot_measures
from sape2.viz.probes import plot_examples, plot_probe
from sape2.viz.seeds import plot_seeds

__all__ = [
    "Notes",
    "NothingToDraw",
    "Panel",
    "plot_confusion",
    "plot_curves",
    "plot_equivariance",
    "plot_examples",
    "plot_grouping",
    "plot_growth",
    "plot_health",
    "plot_measures",
    "plot_probe",
    "plot_resolution",
    "plot_rows",
    "plot_seeds",
    "plot_shift",
]
