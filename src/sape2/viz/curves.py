"""Charts of runs: training curves, and results against shift, size or layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sape2.viz.base import LINES, MARKERS, as_text, legend_below, line_style, picture, put_title, save, subplots, whole_ticks

Runs = Mapping[str, Sequence[dict[str, Any]]]  # name of a run -> its rows


class Notes(NamedTuple):
    """The text of a chart: the meaning of its bands and, in the title, the conditions that all curves share."""

    band: str = "95 % interval over images"
    about: str = ""


PLAIN = Notes()


@picture
def plot_curves(runs: Runs, path: Path, about: str = "") -> None:
    """Loss and accuracy against the epoch, for the metrics.jsonl rows of each named run; `about` is the title."""
    runs = {as_text(name): rows for name, rows in runs.items()}
    figure, axes = subplots(1, 2, figsize=(11, 3.6))
    from matplotlib.lines import Line2D

    panels = (("loss", "validation_loss", "cross-entropy (nats)"), ("accuracy", "validation_accuracy", "accuracy (fraction)"))
    for panel, (train, validation, label) in zip(axes, panels, strict=True):
        for index, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            style = {"color": LINES[index % len(LINES)], "linewidth": 1.3}
            marked = index >= len(LINES) or len(rows) == 1  # a line of one point cannot be seen
            marker = {"marker": MARKERS[index // len(LINES) % len(MARKERS)], "markersize": 4} if marked else {}
            every = 1 if len(rows) == 1 else 0.1
            panel.plot(epochs, [row[validation] for row in rows], label=name, markevery=every, **style, **marker)
            hollow = marker | {"markerfacecolor": "none"} if len(rows) == 1 else {}
            panel.plot(epochs, [row[train] for row in rows], linestyle=":", **style, **hollow)
        panel.set_xlabel("epoch")
        whole_ticks(panel)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_title("training loss includes label smoothing and mixup, where used", fontsize=8, loc="left")
    put_title(figure, about)
    kinds = [Line2D([], [], color="black", label="validation"), Line2D([], [], color="black", ls=":", label="training")]
    handles = [*axes[0].get_legend_handles_labels()[0], *kinds]
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    save(figure, path)


# --- curves of rows --------------------------------------------------------------------------------------------------


class NothingToDraw(ValueError):
    """Raised if no row has the numbers that a picture shows."""


class Panel(NamedTuple):
    """One picture of curves: which rows, the field that runs along x, and what stands at the axes, with units."""

    name: str
    value: str  # label of the y axis
    title: str
    along: str
    label: str  # of the x axis
    where: dict[str, Any]


@picture
def plot_rows(runs: Runs, panels: Sequence[Panel], path: Path, notes: Notes = PLAIN) -> None:
    """The rows that each panel names, one line a run, with their intervals and the level of chance.

    Panels that no run has rows for are left out. A size "32x48" stands at its height, and of several proportions the most
    common one is shown. Raises NothingToDraw, a ValueError, if no panel is left.
    """
    runs = {as_text(name): rows for name, rows in runs.items()}
    found = [(panel, {run: _curve(rows, panel) for run, rows in runs.items()}) for panel in panels]
    found = [(panel, curves) for panel, curves in found if any(curves.values())]
    if not found:
        names = " or ".join(dict.fromkeys(panel.name for panel in panels))
        raise NothingToDraw(f"no run has a row {names} to draw; measure it first")
    width = len(found) if len(found) <= 3 else 2
    height = -(-len(found) // width)
    alike = len({panel.value for panel, _ in found}) == 1
    size = (1.6 + 4.0 * width, 0.4 + 3.1 * height)
    figure, axes = subplots(height, width, figsize=size, sharey=alike, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    first: dict[str, Any] = {}  # label of the y axis -> its first panel, whose scale the others share
    for axis, (panel, curves) in zip(axes.flat, found, strict=False):  # the last row may be longer
        if not alike and first.setdefault(panel.value, axis) is not axis:
            axis.sharey(first[panel.value])
        _draw_curves(axis, curves)
        axis.set_xlabel(panel.label)
        axis.set_title(panel.title, fontsize=9)
        if axis in axes[:, 0] or not alike:
            axis.set_ylabel(panel.value)
        if "fraction" in panel.value or "error" in panel.value:
            _start_at_zero(axis, [curves for other, curves in found if other.value == panel.value])
    named = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(named, key=lambda text: [*runs, CHANCE].index(text))
    handles = [named[text] for text in order]
    legend_below(figure, handles, order, title=f"band: {notes.band}", title_fontsize=7)
    put_title(figure, notes.about)
    save(figure, path)


def _start_at_zero(axis: Any, shown: Sequence[dict[str, list[Point]]]) -> None:
    """Starts the axis at zero unless a value is negative, so that small values look small; if all are zero it ends at 1."""
    points = [point for curves in shown for curve in curves.values() for point in curve]
    top = 1.08 * max(point.high for point in points) or 1.0
    if min(point.low for point in points) >= 0:
        axis.set_ylim(-0.03 * top, top)


def plot_shift(runs: Runs, path: Path, notes: Notes = PLAIN) -> None:
    """Accuracy against the shift, along both axes, with both borders."""
    value, px = "shift accuracy (fraction)", "shift (px)"
    panels = [
        Panel("shift_accuracy", value, f"shift along {axis}, {words}", "shift_px", px, {"axis": axis, "border": border})
        for border, words in (("circular", "circular border"), ("reflect", "reflected border"))
        for axis in ("x", "y")
    ]
    plot_rows(runs, panels, path, notes)


def by_layer(name: str, value: str, title: str, **where: Any) -> Panel:
    return Panel(name, value, title, "layer", "layer", where)


def plot_equivariance(runs: Runs, path: Path, notes: Notes = PLAIN) -> None:
    """Relative equivariance error of features and biases under a circular shift by one patch, by layer."""
    shortest = {run: _shortest_shift(rows) for run, rows in runs.items()}
    panels = [
        by_layer(f"{what}_equivariance_error", "relative error", f"{title}, shift along {axis}", axis=axis)
        for what, title in (("feature", "features"), ("bias", "row-centred bias"))
        for axis in ("x", "y")
    ]
    plot_rows(shortest, panels, path, notes)


def _shortest_shift(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The equivariance errors of the smallest shift, which is one patch."""
    errors = [row for row in rows if row["name"].endswith("_equivariance_error")]
    smallest = min((row["shift_px"] for row in errors), default=None)
    return [row for row in errors if row["shift_px"] == smallest]


def plot_resolution(runs: Runs, path: Path, notes: Notes = PLAIN) -> None:
    """Accuracy against the test size, images resized or padded; of every run with its own position rule."""
    shown = {run: _by_canvas(rows) for run, rows in runs.items()}
    trained = sorted({str(row["size"]) for rows in shown.values() for row in rows if row["trained"]})
    label = f"image height (px), trained at {', '.join(trained)}" if trained else "image height (px)"
    panels = [
        Panel("accuracy_at_size", "accuracy (fraction)", canvas, "size", label, {"canvas": canvas}) for canvas in CANVASES
    ]
    plot_rows(shown, panels, path, notes)


CANVASES = {  # title -> (transform, border)
    "image resized": ("scaled", "none"),
    "image padded by reflection": ("padded", "reflect"),
    "image padded with the mean colour": ("padded", "mean"),
}


def _by_canvas(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The accuracies under the model's own rule, with the `canvas` they belong to; the size trained at belongs to all.

    Sizes below that are cut out of the image whatever the border.
    """
    own = _own_rule(rows)
    changed = {row["size"] for row in own if row["name"] == "accuracy_drop"}
    found = []
    for row in (row for row in own if row["name"] == "accuracy_at_size"):
        trained = row["size"] not in changed
        for canvas, (transform, border) in CANVASES.items():
            if trained or (row["transform"] == transform and row["border"] in (border, "none")):
                found.append(row | {"canvas": canvas, "trained": trained})
    return found


def _own_rule(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `resolution` under the rule that comes first, which is the model's own."""
    ruled = [row for row in rows if "rule" in row]
    return [row for row in ruled if row["rule"] == ruled[0]["rule"]]


def plot_grouping(runs: Runs, path: Path, notes: Notes = PLAIN) -> None:
    """Attention and bias between patches of the same and of other objects, those of scenes; by layer, mean of heads."""

    def panel(name: str, value: str, title: str, far: str, **where: Any) -> Panel:
        return by_layer(name, value, f"{title}\n{PAIRS[far]}, scenes", head=None, masks="scenes", distance=far, **where)

    score = ("bias_auroc", "AUROC", "negative bias as a score for the same object")
    panels = [
        panel("same_label_lift", "lift over uniform attention", "attention to patches of the same object", "far"),
        panel("bias_separation", "d' (standard deviations)", "bias, same object against others", "all"),
        *(panel(*score, far, sign="minus") for far in ("near", "far")),
    ]
    plot_rows(runs, panels, path, notes)


PAIRS = {"near": "neighbouring patches", "far": "patches further apart", "all": "all pairs of patches"}


def plot_health(runs: Runs, path: Path, notes: Notes = PLAIN) -> None:
    """Health of the encoding by layer: share of the bias, saturated gates, clamped positions, position read from tokens."""
    probe = "linear probe of tokens for row and column,\nmean of axes, patches shuffled"
    panels = [
        by_layer("bias_variance_share", "fraction", "share of the bias in the variance of the logits"),
        by_layer("gate_saturated_share", "fraction", "saturated gates (below 0.01 or above 0.99),\nmean of axes"),
        by_layer("position_clamped_share", "fraction", "positions clamped at the end of the table,\nmean of axes"),
        by_layer("position_r2", "R²", probe, patches="shuffled"),
    ]
    plot_rows({run: _mean_of_axes(rows) for run, rows in runs.items()}, panels, path, notes)


def _mean_of_axes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a layer for the numbers that come once an axis; without an interval, which theirs do not give."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("layer") is not None and row["value"] is not None:
            groups.setdefault((row["name"], row["layer"], row.get("patches")), []).append(row)
    return [
        group[0]
        if len(group) == 1
        else {"name": name, "layer": layer, "patches": patches, "value": sum(row["value"] for row in group) / len(group)}
        | {"chance": group[0].get("chance")}
        for (name, layer, patches), group in groups.items()
    ]


CHANCE = "chance"


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
        style = line_style(index)
        axis.plot(place, value, label=run, **style)
        axis.fill_between(place, low, high, color=style["color"], alpha=0.15, linewidth=0)
    chance = [point.chance for curve in curves.values() for point in curve if point.chance is not None]
    if chance and max(chance) - min(chance) < 0.05:  # chance that hangs on predictions differs a little between runs
        axis.axhline(sum(chance) / len(chance), color="0.4", linestyle=":", linewidth=1, label=CHANCE)
    _mark_places(axis, sorted({point.place for curve in curves.values() for point in curve}))
    axis.grid(alpha=0.3)


def _mark_places(axis: Any, places: Sequence[float]) -> None:
    """A tick at each of a few whole numbers, with a label where it does not touch the one before."""
    if not all(place.is_integer() for place in places):
        return
    if len(places) > 12:
        whole_ticks(axis)
        return
    span, labelled = (places[-1] - places[0]) or 1.0, list(places[:1])
    for place in places[1:]:
        if place - labelled[-1] >= LABEL * len(f"{place:.0f}") * span:
            labelled.append(place)
    axis.set_xticks(labelled, [f"{place:.0f}" for place in labelled])
    axis.set_xticks([place for place in places if place not in labelled], minor=True)


LABEL = 0.036  # width of a digit, with its share of the gap, in widths of the narrowest panel


def _curve(rows: Sequence[dict[str, Any]], panel: Panel) -> list[Point]:
    """The points in the order of their places."""
    chosen = [
        row
        for row in rows
        if row["name"] == panel.name
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
