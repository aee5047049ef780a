"""A chart that compares encodings with every seed as a point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sape2.viz.base import LINES, MARKERS, legend_names, picture, put_title, save, subplots

BySeed = Mapping[str, Mapping[int, float]]  # encoding -> seed -> value


Interval = tuple[float, float | None, float | None]  # mean difference and its ends, None for no interval


@picture
def plot_seeds(last: BySeed, best: BySeed, paired: Mapping[str, Interval], baseline: str, path: Path, about: str = "") -> None:
    """Left: accuracy of every seed, last epoch (filled) and best on validation (hollow). Right: differences to the baseline.

    One line an encoding, ordered as given; `best` may lack any of them. A seed has its marker in both panels; black: means,
    and 95 % intervals on the right.
    """
    height = 1.6 + 0.42 * len(last)
    figure, (left, right) = subplots(1, 2, figsize=(11, height), sharey=True)
    seeds = sorted({seed for values in last.values() for seed in values})
    markers = {seed: MARKERS[index % len(MARKERS)] for index, seed in enumerate(seeds)}
    for place, (encoding, values) in enumerate(last.items()):
        for seed, value in values.items():
            left.plot(value, place - 0.13, markers[seed], color=LINES[0], markersize=5, alpha=0.85)
        for seed, value in best.get(encoding, {}).items():
            left.plot(value, place + 0.17, markers[seed], color=LINES[1], markersize=5, markerfacecolor="none")
        mean = sum(values.values()) / len(values)
        left.plot(mean, place - 0.13, "|", color="black", markersize=13, markeredgewidth=2)
        if encoding in paired:
            _draw_difference(right, paired[encoding], values, last[baseline], markers, place)
    left.set_yticks(range(len(last)), list(legend_names(list(last)).values()))
    left.set_ylim(len(last) - 0.5, -0.5)
    left.set_xlabel("test accuracy (fraction)")
    right.set_xlabel(f"difference to {legend_names([baseline])[baseline]}, same seed (fraction)")
    right.axvline(0, color="0.4", linestyle="--", linewidth=1)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=5)
    figure.legend(handles=_legend(markers, bool(best)), loc="outside right upper", fontsize=8)
    put_title(figure, about)
    save(figure, path)


def _draw_difference(
    panel: Any, pair: Interval, values: Mapping[int, float], base: Mapping[int, float], markers: Mapping[int, str], place: int
) -> None:
    for seed in values.keys() & base.keys():
        panel.plot(values[seed] - base[seed], place + 0.13, markers[seed], color=LINES[0], markersize=5, alpha=0.85)
    mean, low, high = pair
    if low is not None and high is not None:
        panel.plot([low, high], [place - 0.13] * 2, color="black", linewidth=1.5)
    panel.plot(mean, place - 0.13, "|", color="black", markersize=11, markeredgewidth=2)


def _legend(markers: Mapping[int, str], with_best: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    plain: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    best = Line2D([], [], marker="o", color=LINES[1], markerfacecolor="none", label="best on validation", **plain)
    return [
        *(Line2D([], [], marker=marker, color="0.4", label=f"seed {seed}", **plain) for seed, marker in markers.items()),
        Line2D([], [], marker="o", color=LINES[0], label="last epoch", **plain),
        *([best] if with_best else []),
        Line2D([], [], marker="|", color="black", label="mean", linestyle="none", markersize=11, markeredgewidth=2),
        Line2D([], [], color="black", label="95 % interval", linewidth=1.5),
    ]
