"""Pictures. Each function takes data and a file name, and writes the file; units stand at the axes and colour bars."""

from __future__ import annotations

from sape2.viz.curves import (
    NothingToDraw,
    Panel,
    plot_confusion,
    plot_curves,
    plot_equivariance,
    plot_grouping,
    plot_health,
    plot_resolution,
    plot_rows,
    plot_shift,
)
from sape2.viz.growth import plot_growth
from sape2.viz.maps import plot_bias, plot_counts, plot_distance, plot_pairs
from sape2.viz.measures import plot_measures
from sape2.viz.probes import plot_examples, plot_probe

__all__ = [
    "NothingToDraw",
    "Panel",
    "plot_bias",
    "plot_confusion",
    "plot_counts",
    "plot_curves",
    "plot_distance",
    "plot_equivariance",
    "plot_examples",
    "plot_grouping",
    "plot_growth",
    "plot_health",
    "plot_measures",
    "plot_pairs",
    "plot_probe",
    "plot_resolution",
    "plot_rows",
    "plot_shift",
]
