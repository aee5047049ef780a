"""Pictures. Each function takes data and a file name, and writes the file; units stand at the axes and colour bars."""

from __future__ import annotations

from sape2.viz.curves import (
    Panel,
    plot_confusion,
    plot_curves,
    plot_layers,
    plot_resolution,
    plot_rows,
    plot_shift,
)
from sape2.viz.growth import plot_growth
from sape2.viz.maps import plot_bias, plot_counts, plot_distance, plot_pairs

__all__ = [
    "Panel",
    "plot_bias",
    "plot_confusion",
    "plot_counts",
    "plot_curves",
    "plot_distance",
    "plot_growth",
    "plot_layers",
    "plot_pairs",
    "plot_resolution",
    "plot_rows",
    "plot_shift",
]
