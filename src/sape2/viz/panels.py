"""Panels about one image under a model, each a `Drawing` narrow enough for a phone: what `explain` and `explore` are made of.

Arrays are numpy; a patch is (row, column). i is the patch that one looks from, n another one, m a place in i's line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sape2.viz.drawing import (
    DIVERGING,
    FAINT,
    INK,
    SEQUENTIAL,
    Dot,
    Drawing,
    Length,
    Line,
    Raster,
    Rect,
    Shape,
    Text,
    code,
    colour,
    ink_on,
)

Grid = tuple[int, int]
Patch = tuple[int, int]
Limits = tuple[Length, Length]

WIDE, NARROW = 340.0, 164.0  # one panel, or two, on a screen of 390 px
HEAD = 34.0  # of the title and the line below it
FIRST, SECOND = "#b84e00", "#0060a0"  # vermilion and blue, dark enough to be text on white (5:1)
LINE_NAMES = {"x": "row", "y": "column"}


@dataclass(frozen=True)
class Mark:
    """A frame around a patch and a letter beside it."""

    patch: Patch
    letter: str = "i"
    colour: str = FIRST


def number(value: Length, digits: int = 3) -> str:
    """For people: 0.123, 12.3, 1.2e-05."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 1, 1)}g}"
    return f"{value:.{max(0, digits - max(0, len(str(int(abs(value)))) - 1))}f}"


def place(patch: Patch) -> str:
    return f"row {patch[0]}, column {patch[1]}"


# --- the image -------------------------------------------------------------------------------------------------------


def image_panel(
    pixels: np.ndarray, grid: Grid, marks: Sequence[Mark], title: str, note: str = "", wide: Length = WIDE
) -> Drawing:
    """The image, (channels, height, width) uint8, with its patches; a click on one chooses it."""
    height, width = pixels.shape[-2:]
    side = (wide / width) * height
    shown = Raster(0, HEAD, wide, side, in_colour(pixels))
    cell_h, cell_w = side / grid[0], wide / grid[1]
    cells = [
        Rect(x * cell_w, HEAD + y * cell_h, cell_w, cell_h, "none", "#80808059", 0.5, place((y, x)), f"{y},{x}")
        for y, x in np.ndindex(*grid)
    ]
    frames = [shape for mark in marks for shape in _frame(mark, 0, HEAD, cell_w, cell_h)]
    return Drawing(wide, HEAD + side, (*_heading(title, note), shown, *cells, *frames), f"{title} {note}")


def in_colour(pixels: np.ndarray) -> np.ndarray:
    """(channels, height, width) -> (height, width, 3)."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def _frame(mark: Mark, x: Length, y: Length, width: Length, height: Length) -> Iterator[Shape]:
    """Coloured on white, so that it stands out from dark and from light, with its letter in the corner."""
    left, top = x + mark.patch[1] * width, y + mark.patch[0] * height
    yield Rect(left, top, width, height, "none", "#ffffff", 5)
    yield Rect(left, top, width, height, "none", mark.colour, 2.5)
    if min(width, height) >= 26:
        yield Rect(left, top, 12, 14, mark.colour)
        yield Text(left + 6, top + 11, mark.letter, 11, "#ffffff", "middle", bold=True)


def _heading(title: str, note: str) -> tuple[Shape, ...]:
    return (
        (Text(0, 12, title, 12.5, bold=True), Text(0, 27, note, 11, FAINT)) if note else (Text(0, 22, title, 12.5, bold=True),)
    )


# --- maps ------------------------------------------------------------------------------------------------------------


def limits_of(values: Sequence[np.ndarray] | np.ndarray, signed: bool = False) -> Limits:
    """From the smallest to the largest value; around 0 for differences."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if signed:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    return low, max(high, low + 1e-9)


def map_panel(
    values: np.ndarray,
    title: str,
    unit: str,
    marks: Sequence[Mark] = (),
    limits: Limits | None = None,
    signed: bool = False,
    width: Length = NARROW,
) -> Drawing:
    """One value for each patch, (H, W): in colour, in words where one points, and its scale below."""
    limits = limits or limits_of([values], signed)
    colours = DIVERGING if signed else SEQUENTIAL
    rows, columns = values.shape
    cell = min(width / columns, 1.5 * width / rows)
    shares = (values - limits[0]) / (limits[1] - limits[0])
    fills = colour(shares, colours)
    cells = [_cell((y, x), cell, code(fills[y, x]), f"{value:.5g} {unit}") for (y, x), value in np.ndenumerate(values)]
    frames = [shape for mark in marks for shape in _frame(mark, 0, HEAD, cell, cell)]
    bottom = HEAD + rows * cell
    shapes = (*_heading(title, unit), *cells, *frames, *_scale(limits, colours, bottom + 6, cell * columns))
    return Drawing(width, bottom + 28, shapes, f"{title} ({unit}), from {number(values.min())} to {number(values.max())}")


def _cell(patch: Patch, size: Length, fill: str, says: str) -> Rect:
    """A little larger than it is, so that no line shows between two."""
    y, x = patch
    return Rect(x * size, HEAD + y * size, size + 0.3, size + 0.3, fill, title=f"{place(patch)}: {says}", patch=f"{y},{x}")


def _scale(limits: Limits, colours: Sequence[str], y: Length, width: Length) -> Iterator[Shape]:
    yield Raster(0, y, width, 6, colour(np.linspace(0, 1, 64)[None], colours))
    yield Text(0, y + 18, number(limits[0]), 10.5, FAINT)
    yield Text(width, y + 18, number(limits[1]), 10.5, FAINT, "end")


def matrix_panel(values: np.ndarray, title: str, unit: str, limits: Limits | None = None, width: Length = NARROW) -> Drawing:
    """All pairs, (N, N), the patch that one looks from down, the other across; too many to point at."""
    limits = limits or limits_of([values])
    fills = colour((values - limits[0]) / (limits[1] - limits[0]))
    shapes = (
        *_heading(title, unit),
        Raster(0, HEAD, width, width, fills),
        *_scale(limits, SEQUENTIAL, HEAD + width + 6, width),
    )
    return Drawing(width, HEAD + width + 28, shapes, f"{title} ({unit})")


# --- lines -----------------------------------------------------------------------------------------------------------


def line_panel(
    pixels: np.ndarray,
    grid: Grid,
    patch: Patch,
    axis: Literal["x", "y"],
    quantities: dict[str, np.ndarray],
    title: str,
    letter: str = "i",
) -> Drawing:
    """What the patches of one line are to `patch`: themselves above, then a row of numbers for every quantity.

    A quantity with twice as many values as the line has patches (counts from both ends) gets two rows.
    """
    length, left, tall = grid[1] if axis == "x" else grid[0], 62.0, 24.0
    cell = (WIDE - left) / length
    tile = min(cell, 40.0)
    line = [(patch[0], m) if axis == "x" else (m, patch[1]) for m in range(length)]
    shapes: list[Shape] = [*_heading(title, "left to right" if axis == "x" else "top to bottom")]
    for m, (y, x) in enumerate(line):
        shapes.append(Raster(left + m * cell, HEAD, cell - 1, tile - 1, in_colour(_tile(pixels, grid, (y, x)))))
    at = line.index(patch)
    shapes += _frame(Mark((0, at), letter), left, HEAD, cell - 1, tile - 1)
    top = HEAD + tile + 4
    for name, values in _rows(quantities, length):
        limits = (0.0, 1.0) if name.startswith("gate") else limits_of([values], signed=values.min() < 0)
        fills = colour((values - limits[0]) / (limits[1] - limits[0]), DIVERGING if limits[0] < 0 else SEQUENTIAL)
        shapes.append(Text(left - 6, top + 16, name, 11, INK, "end"))
        for m, value in enumerate(values.tolist()):
            says = f"{place(line[m])}: {name} {value:.5g}"
            y, x = line[m]
            shapes.append(Rect(left + m * cell, top, cell - 1, tall - 1, code(fills[m]), title=says, patch=f"{y},{x}"))
            if cell >= 26:
                size, ink = (10.5 if cell > 33 or abs(value) < 9.995 else 9.5), ink_on(fills[m])
                shapes.append(Text(left + (m + 0.5) * cell - 0.5, top + 16, _short(value), size, ink, "middle"))
        top += tall
    return Drawing(WIDE, top, tuple(shapes), f"{title}: {', '.join(quantities)}")


def _rows(quantities: dict[str, np.ndarray], length: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in quantities.items():
        if len(values) == length:
            yield name, values
        else:
            yield f"{name} >", values[:length]
            yield f"{name} <", values[length:]


def _tile(pixels: np.ndarray, grid: Grid, patch: Patch) -> np.ndarray:
    height, width = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
    return pixels[:, patch[0] * height : (patch[0] + 1) * height, patch[1] * width : (patch[1] + 1) * width]


def _short(value: Length) -> str:
    """Two decimals in as little room as can be."""
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"
    return text.replace("-0.", "-.") if text.startswith("-0.") else text


def heads_panel(values: np.ndarray, title: str, note: str, largest: float | None = None) -> Drawing:
    """One line of cells for each head, (heads, places)."""
    heads, places = values.shape
    left, tall = 62.0, 20.0
    cell = (WIDE - left) / places
    largest = largest or max(float(values.max()), 1e-9)
    fills = colour(values / largest)
    shapes: list[Shape] = list(_heading(title, note))
    for head in range(heads):
        top = HEAD + head * tall
        shapes.append(Text(left - 6, top + 14, f"head {head + 1}", 11, INK, "end"))
        for m, value in enumerate(values[head].tolist()):
            says = f"head {head + 1}, place {m}: {value:.5g}"
            shapes.append(Rect(left + m * cell, top, cell - 1, tall - 1, code(fills[head, m]), title=says))
            if cell >= 26:
                ink = ink_on(fills[head, m])
                shapes.append(Text(left + (m + 0.5) * cell - 0.5, top + 14, _short(value), 10, ink, "middle"))
    return Drawing(WIDE, HEAD + heads * tall, tuple(shapes), f"{title}, {note}")


# --- curves ----------------------------------------------------------------------------------------------------------


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

    def axes(self, across: str, ticks: Sequence[Length]) -> Iterator[Shape]:
        """A frame of ticks: the ends of the vertical scale, zero, and `ticks` below."""
        bottom = self.top + self.height
        yield Line(((self.left, self.top), (self.left, bottom), (self.left + self.width, bottom)), "#808080")
        for value in sorted({*self.up, *([0.0] if self.up[0] < 0 < self.up[1] else [])}):
            y = self.at(self.across[0], value)[1]
            if value == 0 and min(abs(y - self.top), abs(y - bottom)) < 12:
                continue
            yield Line(((self.left - 3, y), (self.left, y)), "#808080")
            yield Text(self.left - 5, y + 4, number(value), 10.5, FAINT, "end")
        for value in ticks:
            x = self.at(value, self.up[0])[0]
            yield Line(((x, bottom), (x, bottom + 3)), "#808080")
            yield Text(x, bottom + 14, f"{value:g}", 10.5, FAINT, "middle")
        yield Text(self.left + self.width / 2, bottom + 29, across, 11, FAINT, "middle")


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
    shapes: list[Shape] = [
        *_heading(title, "grey: whole positions; coloured: where i's line reads"),
        *plot.axes("position p (rows of the table)", _ticks(last)),
        Line(tuple(plot.at(p, z) for p, z in enumerate(products.tolist())), "#808080", 1.5),
    ]
    for p, z in enumerate(products.tolist()):
        shapes.append(Dot(*plot.at(p, z), 3, "#808080", title=f"position {p}: {z:.5g}"))
    lengths = len(positions)
    for m, (p, z) in enumerate(zip(clamped.tolist(), values.tolist(), strict=True)):
        beyond = f", beyond the last row of the table ({positions[m]:.4g})" if positions[m] > last else ""
        says = f"{'column' if axis == 'x' else 'row'} {m % lengths}: position {p:.4g}{beyond}, value {z:.5g}"
        shapes.append(Dot(*plot.at(p, z), 4.5, FIRST, "#ffffff", says))
    return Drawing(WIDE, HEAD + 4 + 120 + 34, tuple(shapes), f"{title}, {last + 1} positions")


def pair_panel(first: np.ndarray, second: np.ndarray, axis: str, title: str, note: str) -> Drawing:
    """Eq. 12 and 15: two position vectors, place by place, and what each place adds to the squared distance."""
    size = len(first)
    limits = _widened(limits_of([first, second]))
    plot = Plot(62, HEAD + 4, WIDE - 70, 100, (-0.5, size - 0.5), limits)
    added = (first - second) ** 2
    bars = Plot(62, HEAD + 124, WIDE - 70, 40, (-0.5, size - 0.5), (0.0, max(float(added.max()), 1e-9)))
    shapes: list[Shape] = [*_heading(title, note), *plot.axes("", [])]
    shapes += bars.axes(f"place m in the {LINE_NAMES.get(axis, 'sequence')}", _ticks(size - 1))
    for letter, ink, values in (("i", FIRST, first), ("n", SECOND, second)):
        points = tuple(plot.at(m, z) for m, z in enumerate(values.tolist()))
        shapes.append(Line(points, ink, 1.5))
        shapes += [
            Dot(*point, 4, ink, "#ffffff", f"s_{letter} at place {m}: {values[m]:.5g}") for m, point in enumerate(points)
        ]
    wide = 0.7 * bars.width / size
    for m, value in enumerate(added.tolist()):
        x, y = bars.at(m, value)
        shapes.append(
            Rect(
                x - wide / 2, y, wide, bars.top + bars.height - y, "#808080", title=f"place {m}: squared difference {value:.5g}"
            )
        )
    return Drawing(WIDE, HEAD + 124 + 40 + 34, tuple(shapes), f"{title}, {note}")


def bars_panel(names: Sequence[str], values: Sequence[Length], title: str, note: str = "") -> Drawing:
    """Shares from 0 to 1, the name before and the number behind each bar."""
    left, tall, longest = 96.0, 24.0, WIDE - 96 - 58
    shapes: list[Shape] = list(_heading(title, note))
    for line, (name, value) in enumerate(zip(names, values, strict=True)):
        top = HEAD + line * tall
        name = name if len(name) <= 14 else f"{name[:13]}."
        shapes.append(Text(left - 6, top + 15, name, 11.5, INK, "end"))
        shapes.append(Rect(left, top + 3, max(value * longest, 0.5), tall - 8, FAINT, title=f"{name}: {value:.6f}"))
        shapes.append(Text(left + value * longest + 5, top + 15, f"{value:.1%}", 11.5))
    return Drawing(WIDE, HEAD + len(names) * tall, tuple(shapes), f"{title}: {names[0]} {values[0]:.1%}")


def distance_panel(maps: np.ndarray, grid: Grid, title: str, unit: str, limits: Limits | None = None) -> Drawing:
    """Values of all pairs, (maps, N, N), against the distance of the patches: mean, one standard deviation as a band."""
    middle, spread = by_distance(maps, grid)
    plot = Plot(48, HEAD + 4, WIDE / 2 + 20 - 56, 110, _widened((0.0, float(len(middle) - 1))),
                _widened(limits or limits_of([middle - spread, middle + spread])))  # fmt: skip
    up, down = ([plot.at(step, value) for step, value in enumerate((middle + sign * spread).tolist())] for sign in (1, -1))
    line = [plot.at(step, value) for step, value in enumerate(middle.tolist())]
    dots = [
        Dot(*point, 2.5, SECOND, title=f"{step} patches: mean {middle[step]:.5g}, standard deviation {spread[step]:.3g}")
        for step, point in enumerate(line)
    ]
    shapes = (
        *_heading(title, unit),
        Line((*up, *reversed(down)), "none", 0, "#c9dcea"),
        *plot.axes("distance (patches)", _ticks(len(middle) - 1)[::2]),
        Line(tuple(line), SECOND, 1.5),
        *dots,
    )
    return Drawing(WIDE / 2 + 20, HEAD + 4 + 110 + 34, shapes, f"{title} ({unit}) against distance")


def by_distance(maps: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of all values of pairs that are 0, 1, 2, ... patches apart (rounded)."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    apart = np.round(np.hypot(y[:, None] - y, x[:, None] - x)).astype(int)
    groups = [maps[:, apart == step] for step in range(apart.max() + 1)]
    return np.array([group.mean() for group in groups]), np.array([group.std() for group in groups])
