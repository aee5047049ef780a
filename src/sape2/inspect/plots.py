"""Panels with axes: a table and the positions where it is read, two vectors, shares, values against distance.

Arrays are numpy, as in `panels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sape2.encodings.grid import Grid
from sape2.inspect.drawing import FAINT, INK, Drawing, Length, dot, line, rect, text
from sape2.inspect.panels import FIRST, HEAD, LINE_NAMES, OVERLAID, SECOND, WIDE, Limits, ends_of, heading, limits_of
from sape2.viz.base import shortened


class Plot(NamedTuple):
    """An area with two scales."""

    left: Length
    top: Length
    width: Length
    height: Length
    across: Limits
    up: Limits

    def at(self, x: Length, y: Length) -> tuple[Length, Length]:
        share_x = (x - self.across[0]) / (self.across[1] - self.across[0])
        share_y = (y - self.up[0]) / (self.up[1] - self.up[0])
        return self.left + share_x * self.width, self.top + (1 - share_y) * self.height

    def curve(self, values: np.ndarray) -> list[tuple[Length, Length]]:
        """Where the values of 0, 1, 2, ... lie."""
        return [self.at(x, y) for x, y in enumerate(values.tolist())]

    def axes(self, across: str, ticks: Sequence[Length]) -> Iterator[str]:
        """A frame of ticks: the ends of the vertical scale, zero, and `ticks` below."""
        bottom = self.top + self.height
        texts = dict(zip(self.up, ends_of(self.up), strict=True))
        yield line(((self.left, self.top), (self.left, bottom), (self.left + self.width, bottom)), "#808080")
        for value in sorted({*self.up, *([0.0] if self.up[0] < 0 < self.up[1] else [])}):
            y = self.at(self.across[0], value)[1]
            if value == 0 and min(abs(y - self.top), abs(y - bottom)) < 12:
                continue
            yield line(((self.left - 3, y), (self.left, y)), "#808080")
            yield text(self.left - 5, y + 4, texts.get(value, "0"), 10.5, FAINT, "end")
        for value in ticks:
            x = self.at(value, self.up[0])[0]
            yield line(((x, bottom), (x, bottom + 3)), "#808080")
            yield text(x, bottom + 14, f"{value:g}", 10.5, FAINT, "middle")
        yield text(self.left + self.width / 2, bottom + 29, across, 11, FAINT, "middle")


def _ticks(largest: int) -> list[Length]:
    step = max(1, -(-largest // 8))
    return [float(value) for value in range(0, largest + 1, step)]


def _widened(limits: Limits) -> Limits:
    """With some room, so that no dot lies on the frame."""
    margin = 0.06 * (limits[1] - limits[0])
    return limits[0] - margin, limits[1] + margin


def table_panel(products: np.ndarray, positions: np.ndarray, axis: str, title: str) -> Drawing:
    """Eq. 13 and 14: z_i[p] at the whole positions (grey), read between them at the positions counted (in colour)."""
    last = len(products) - 1
    plot = Plot(62, HEAD + 4, WIDE - 70, 120, _widened((0.0, float(last))), _widened(limits_of([products])))
    clamped = positions.clip(0, last)
    values = np.interp(clamped, np.arange(last + 1), products)
    shapes: list[str] = [
        *heading(title, "grey: rows of the table; orange: positions of the line of i"),
        *plot.axes("position p (rows of the table)", _ticks(last)),
        line(plot.curve(products), "#808080", 1.5),
    ]
    for p, z in enumerate(products.tolist()):
        shapes.append(dot(*plot.at(p, z), 3, "#808080", title=f"position {p}: {z:.5g}"))
    for m, (p, z) in enumerate(zip(clamped.tolist(), values.tolist(), strict=True)):
        beyond = f", beyond the last row of the table ({positions[m]:.4g})" if positions[m] > last else ""
        says = f"{'column' if axis == 'x' else 'row'} {m}: position {p:.4g}{beyond}, value {z:.5g}"
        shapes.append(dot(*plot.at(p, z), 4.5, FIRST, "#ffffff", says))
    return Drawing(WIDE, HEAD + 4 + 120 + 34, shapes, f"{title}, {last + 1} positions")


def pair_panel(first: np.ndarray, second: np.ndarray, axis: str, title: str, note: str) -> Drawing:
    """Eq. 12 and 15: two position vectors, place by place, and what each place adds to the squared distance."""
    size = len(first)
    limits = _widened(limits_of([first, second]))
    plot = Plot(62, HEAD + 4, WIDE - 70, 100, (-0.5, size - 0.5), limits)
    added = (first - second) ** 2
    bars = Plot(62, HEAD + 124, WIDE - 70, 40, (-0.5, size - 0.5), (0.0, max(float(added.max()), 1e-9)))
    shapes: list[str] = [*heading(title, note), *plot.axes("", [])]
    shapes += bars.axes(f"place m in the {LINE_NAMES.get(axis, 'sequence')}", _ticks(size - 1))
    for letter, ink, values in (("i", FIRST, first), ("n", SECOND, second)):
        points = plot.curve(values)
        shapes.append(line(points, ink, 1.5))
        shapes += [
            dot(*point, 4, ink, "#ffffff", f"s_{letter} at place {m}: {values[m]:.5g}") for m, point in enumerate(points)
        ]
    wide = 0.7 * bars.width / size
    for m, value in enumerate(added.tolist()):
        x, y = bars.at(m, value)
        shapes.append(
            rect(
                x - wide / 2, y, wide, bars.top + bars.height - y, "#808080", title=f"place {m}: squared difference {value:.5g}"
            )
        )
    return Drawing(WIDE, HEAD + 124 + 40 + 34, shapes, f"{title}, {note}")


def bars_panel(names: Sequence[str], values: Sequence[Length], title: str, note: str = "") -> Drawing:
    """Shares from 0 to 1, each a bar below its name and its number."""
    width, tall = OVERLAID, 34.0
    shapes: list[str] = list(heading(title, note))
    for at, (name, short, value) in enumerate(zip(names, shortened(names, 24), values, strict=True)):
        top = HEAD + at * tall
        shapes += [text(0, top + 15, short, 12), text(width, top + 15, f"{value:.1%}", 12, INK, "end")]
        shapes.append(rect(0, top + 20, width, 7, "#e4e4e4", title=f"{name}: {value:.6f}"))
        shapes.append(rect(0, top + 20, max(value * width, 0.5), 7, SECOND, title=f"{name}: {value:.6f}"))
    return Drawing(width, HEAD + len(names) * tall, shapes, f"{title}: {names[0]} {values[0]:.1%}")


def distance_panel(middle: np.ndarray, spread: np.ndarray, title: str, unit: str, limits: Limits) -> Drawing:
    """What `by_distance` gives against the distance of the patches: mean, one standard deviation as a band."""
    across = _widened((0.0, float(len(middle) - 1)))
    plot = Plot(48, HEAD + 4, WIDE / 2 + 20 - 56, 110, across, _widened(limits))
    up, means, down = (plot.curve(middle + sign * spread) for sign in (1, 0, -1))
    dots = [
        dot(*point, 2.5, SECOND, title=f"{step} patches: mean {middle[step]:.5g}, standard deviation {spread[step]:.3g}")
        for step, point in enumerate(means)
    ]
    shapes = (
        *heading(title, unit),
        line((*up, *reversed(down)), "none", 0, "#c9dcea"),
        *plot.axes("distance (patches)", _ticks(len(middle) - 1)[::2]),
        line(means, SECOND, 1.5),
        *dots,
    )
    return Drawing(WIDE / 2 + 20, HEAD + 4 + 110 + 34, shapes, f"{title} ({unit}) against distance")


def by_distance(maps: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of all values of pairs that are 0, 1, 2, ... patches apart (rounded)."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    apart = np.round(np.hypot(y[:, None] - y, x[:, None] - x)).astype(int)
    groups = [maps[:, apart == step] for step in range(apart.max() + 1)]
    return np.array([group.mean() for group in groups]), np.array([group.std() for group in groups])
