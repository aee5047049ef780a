"""Pictures of runs: training curves, the confusion of classes, and results against shift, size or layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sape2.viz.base import DASHES, LINES, MAP_COLOURS, MARKERS, pyplot, save

Runs = Mapping[str, Sequence[dict[str, Any]]]  # name of a run -> its rows


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and accuracy against the epoch, for the metrics.jsonl rows of each named run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    panels = (("loss", "validation_loss", "cross-entropy (nats)"), ("accuracy", "validation_accuracy", "accuracy"))
    for panel, (train, validation, label) in zip(axes, panels, strict=True):
        for index, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            colour = LINES[index % len(LINES)]
            panel.plot(epochs, [row[validation] for row in rows], color=colour, label=f"{name}, validation")
            panel.plot(epochs, [row[train] for row in rows], color=colour, linestyle=":", label=f"{name}, training")
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    axes[0].set_title("training targets are smoothed and mixed, so their loss is higher", fontsize=8, loc="left")
    save(figure, path)


def plot_confusion(counts: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Rows: the true class; columns: the model's answer; shades: the share of the row."""
    plt = pyplot()
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    figure, panel = plt.subplots(figsize=(0.5 * len(classes) + 2, 0.5 * len(classes) + 1.5))
    image = panel.imshow(share.numpy(), cmap=MAP_COLOURS, vmin=0, vmax=1)
    panel.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    panel.set_yticks(range(len(classes)), classes)
    panel.set_xlabel("answer")
    panel.set_ylabel("true class")
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "black" if share[row, column] > 0.6 else "white"
                panel.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=panel, label="share of the true class", fraction=0.046)
    save(figure, path)


# --- curves of rows --------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One picture of curves: the field that runs along x, its label with the unit, and which rows are meant."""

    title: str
    along: str
    label: str
    where: dict[str, Any]


def plot_rows(runs: Runs, name: str, label: str, panels: Sequence[Panel], path: Path) -> None:
    """The rows called `name` of every run, one line a run, with their 95 % intervals and the level of chance.

    `label` is that of the y axis, with its unit. A size "32x48" stands at its height, and of several proportions the most
    common one is shown. Raises ValueError if no run has such a row.
    """
    plt = pyplot()
    found = [{run: _curve(rows, name, panel) for run, rows in runs.items()} for panel in panels]
    if not any(curve for curves in found for curve in curves.values()):
        wanted = " or ".join(str(panel.where) for panel in panels)
        raise ValueError(f"no run has a row {name} with {wanted} to draw; measure it first")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 4.2 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel, curves in zip(axes[0], panels, found, strict=True):
        _draw_curves(axis, curves)
        axis.set_xlabel(panel.label)
        axis.set_title(panel.title, fontsize=9)
    axes[0, 0].set_ylabel(label)
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, title="band: 95 %", title_fontsize=7)
    save(figure, path)


def plot_shift(runs: Runs, path: Path, name: str = "shift_accuracy", border: str = "circular") -> None:
    """Accuracy (or shift_agreement) against the shift, along both axes."""
    panels = [
        Panel(f"shifted along {axis}, {border} border", "shift_px", "shift (px)", {"axis": axis, "border": border})
        for axis in ("x", "y")
    ]
    plot_rows(runs, name, name.replace("_", " ") + " (fraction)", panels, path)


def plot_resolution(runs: Runs, path: Path, name: str = "accuracy_at_size") -> None:
    """Accuracy against the test size, content scaled and canvas padded; of every run the rule that it was built with."""
    own = {run: _first_rule(rows, name) for run, rows in runs.items()}
    panels = [
        Panel(f"content {transform}", "size", "height of the image (px)", {"transform": transform})
        for transform in ("scaled", "padded")
        if any(row["name"] == name and row.get("transform") == transform for rows in own.values() for row in rows)
    ]
    plot_rows(own, name, "accuracy (fraction)", panels or [Panel("", "size", "height (px)", {})], path)


def plot_layers(runs: Runs, path: Path, name: str, label: str, title: str = "", **where: Any) -> None:
    """A number of `grouping` or `health` against the layer, mean of heads; `where` as in masks="scenes", distance="far"."""
    plot_rows(runs, name, label, [Panel(title, "layer", "layer", {"head": None} | where)], path)


def _first_rule(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of the rule that comes first, which is the model's own."""
    named = [row for row in rows if row["name"] == name]
    return [row for row in named if row.get("rule") == named[0].get("rule")]


class Point(NamedTuple):
    place: float
    value: float
    low: float
    high: float
    chance: float | None


def _draw_curves(axis: Any, curves: dict[str, list[Point]]) -> None:
    for index, (run, curve) in enumerate(curves.items()):
        if not curve:
            continue
        place, value, low, high = np.array([point[:4] for point in curve]).T
        style = {"color": LINES[index % len(LINES)], "linestyle": DASHES[index // len(LINES) % len(DASHES)]}
        axis.plot(place, value, marker=MARKERS[(index + index // len(LINES)) % len(MARKERS)], markersize=4, label=run, **style)
        axis.fill_between(place, low, high, color=style["color"], alpha=0.15, linewidth=0)
    chance = [point.chance for curve in curves.values() for point in curve if point.chance is not None]
    if chance and max(chance) - min(chance) < 0.05:  # chance that hangs on predictions differs a little between runs
        axis.axhline(sum(chance) / len(chance), color="0.4", linestyle=":", linewidth=1, label="chance")
    places = sorted({point.place for curve in curves.values() for point in curve})
    if len(places) <= 12 and all(place.is_integer() for place in places):
        axis.set_xticks(places, [f"{place:.0f}" for place in places])
    axis.grid(alpha=0.3)


def _curve(rows: Sequence[dict[str, Any]], name: str, panel: Panel) -> list[Point]:
    """The points in the order of their places."""
    chosen = [
        row
        for row in rows
        if row["name"] == name
        and panel.along in row
        and row["value"] is not None
        and all(row.get(key) == value for key, value in panel.where.items())
    ]
    shapes = [_proportion(row[panel.along]) for row in chosen]
    common = max(shapes, key=shapes.count, default=None)
    points = []
    for row, shape in zip(chosen, shapes, strict=True):
        if shape == common:
            place, value = float(str(row[panel.along]).split("x")[0]), row["value"]
            points.append(Point(place, value, row.get("ci_low", value), row.get("ci_high", value), row.get("chance")))
    return sorted(points)


def _proportion(place: Any) -> float | None:
    """Height over width of "32x48"; None for a number."""
    height, cross, width = str(place).partition("x")
    return float(height) / float(width) if cross else None
