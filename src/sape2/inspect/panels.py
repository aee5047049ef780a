"""Panels about one image under a model, patch by patch; with `plots` they make up `explain` and `explore`. Each is a
`Drawing` narrow enough for a phone.

Arrays are numpy; a patch is (row, column). i is the patch that attends, n another one, m a place in i's line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sape2.encodings.grid import Grid
from sape2.inspect.drawing import (
    DIVERGING,
    FAINT,
    INK,
    SEQUENTIAL,
    Drawing,
    Length,
    Raster,
    Rect,
    Shape,
    Text,
    code,
    colour,
    ink_on,
)
from sape2.inspect.look import Patch

Limits = tuple[Length, Length]

WIDE, NARROW = 340.0, 164.0  # one panel, or two, on a screen of 390 px
OVERLAID = 200.0  # of an image, with or without a map over it
PATCH_EDGE = "#80808059"
ROUNDING = 1e-5  # of a number: what is less apart is the same
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
    """A number as text for people: 0.123, 12.3, 1.2e-05."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 1, 1)}g}"
    return f"{value:.{max(0, digits - max(0, len(str(int(abs(value)))) - 1))}f}"


def ends_of(limits: Limits) -> tuple[str, str]:
    """Both ends of a scale, with enough digits to read their difference; the second is empty where that is rounding."""
    apart = limits[1] - limits[0]
    if apart <= 1.01 * ROUNDING * abs(limits[1]):
        return number(limits[0]), ""
    low, high = (0.0 if abs(end) < 1e-3 * apart else end for end in limits)
    digits = 3
    while abs(float(number(high, digits)) - float(number(low, digits)) - apart) > 0.1 * apart:
        digits += 1
    return number(low, digits), number(high, digits)


def place(patch: Patch) -> str:
    return f"row {patch[0]}, column {patch[1]}"


# --- the image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Over:
    """Values of the patches, (H, W), to be drawn over an image; opacity from 0, the image alone, to 1, the values alone."""

    values: np.ndarray
    unit: str
    limits: Limits | None = None
    opacity: Length = 0.6


def image_panel(
    pixels: np.ndarray,
    grid: Grid,
    marks: Sequence[Mark],
    title: str,
    note: str = "",
    width: Length = OVERLAID,
    over: Over | None = None,
) -> Drawing:
    """The image, (channels, height, width) uint8, with its patches; a click on one chooses it.

    With `over` its values lie over the image in colour, as in figure 4 of the paper, with their scale below.
    """
    tall, broad = pixels.shape[-2:]
    zoom = min(width / broad, 1.25 * width / tall)
    cell_h, cell_w = zoom * tall / grid[0], zoom * broad / grid[1]
    shown = Raster(0, HEAD, zoom * broad, zoom * tall, in_colour(pixels))
    fills = None if over is None else _fills(over)
    cells = []
    for y, x in np.ndindex(*grid):
        box = (x * cell_w, HEAD + y * cell_h, cell_w, cell_h)
        if over is None or fills is None:
            cells.append(Rect(*box, "none", PATCH_EDGE, 0.5, place((y, x)), f"{y},{x}"))
        else:
            says = f"{place((y, x))}: {over.values[y, x]:.5g} {over.unit}"
            cells.append(Rect(*box, code(fills[y, x]), PATCH_EDGE, 0.5, says, f"{y},{x}", over.opacity))
    frames = [shape for mark in marks for shape in _frame(mark, 0, HEAD, cell_w, cell_h)]
    shapes = (*heading(title, note), shown, *cells, *frames)
    bottom = HEAD + zoom * tall
    if over is None:
        return Drawing(width, bottom, shapes, f"{title} {note}")
    scale = _scale(over.limits or limits_of([over.values]), SEQUENTIAL, bottom + 6, zoom * broad)
    return Drawing(width, bottom + 28, (*shapes, *scale), f"{title} ({note}), over the image")


def _fills(over: Over) -> np.ndarray:
    low, high = over.limits or limits_of([over.values])
    return colour((over.values - low) / (high - low))


def in_colour(pixels: np.ndarray) -> np.ndarray:
    """(channels, height, width) -> (height, width, 3)."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def _frame(mark: Mark, x: Length, y: Length, width: Length, height: Length) -> Iterator[Shape]:
    """Coloured on white, so that it stands out from dark and from light, with its letter in the corner."""
    left, top = x + mark.patch[1] * width, y + mark.patch[0] * height
    yield Rect(left, top, width, height, "none", "#ffffff", 5)
    yield Rect(left, top, width, height, "none", mark.colour, 2.5)
    if min(width, height) >= 22:
        yield Rect(left, top, 12, 14, mark.colour)
        yield Text(left + 6, top + 11, mark.letter, 11, "#ffffff", "middle", bold=True)


def heading(title: str, note: str) -> tuple[Shape, ...]:
    return (
        (Text(0, 12, title, 12.5, bold=True), Text(0, 27, note, 11, FAINT)) if note else (Text(0, 22, title, 12.5, bold=True),)
    )


# --- maps ------------------------------------------------------------------------------------------------------------


def limits_of(values: Sequence[np.ndarray] | np.ndarray, signed: bool = False) -> Limits:
    """Limits of the colour scale: smallest and largest value, symmetric for differences; rounding noise is not stretched."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if signed:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    return low, max(high, low + 1e-9, low + ROUNDING * abs(high))


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
    shapes = (*heading(title, unit), *cells, *frames, *_scale(limits, colours, bottom + 6, cell * columns))
    return Drawing(width, bottom + 28, shapes, f"{title} ({unit}), from {number(values.min())} to {number(values.max())}")


def _cell(patch: Patch, size: Length, fill: str, says: str) -> Rect:
    """A little larger than it is, so that no line shows between two."""
    y, x = patch
    return Rect(x * size, HEAD + y * size, size + 0.3, size + 0.3, fill, title=f"{place(patch)}: {says}", patch=f"{y},{x}")


def _scale(limits: Limits, colours: str, y: Length, width: Length, x: Length = 0.0) -> Iterator[Shape]:
    yield Raster(x, y, width, 6, colour(np.linspace(0, 1, 64)[None], colours))
    low, high = ends_of(limits)
    yield Text(x, y + 18, low if high else f"{low} everywhere", 10.5, FAINT)
    yield Text(x + width, y + 18, high, 10.5, FAINT, "end")


def matrix_panel(values: np.ndarray, title: str, unit: str, limits: Limits | None = None, width: Length = NARROW) -> Drawing:
    """All pairs, (N, N), the patch that one looks from down, the other across; too many to point at."""
    limits = limits or limits_of([values])
    fills = colour((values - limits[0]) / (limits[1] - limits[0]))
    shapes = (
        *heading(title, unit),
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
    """The quantities of one line for `patch`: the patches above, then a row of numbers for each quantity.

    A quantity with twice as many values as the line has patches (counts from both ends) gets two rows.
    """
    length, left, tall = grid[1] if axis == "x" else grid[0], 62.0, 24.0
    cell = (WIDE - left) / length
    tile = min(cell, 40.0)
    line = [(patch[0], m) if axis == "x" else (m, patch[1]) for m in range(length)]
    limits = {name: _line_limits(name, values) for name, values in quantities.items()}
    shapes: list[Shape] = [*heading(title, "left to right" if axis == "x" else "top to bottom")]
    for m, (y, x) in enumerate(line):
        shapes.append(Raster(left + m * cell, HEAD, cell - 1, tile - 1, in_colour(_tile(pixels, grid, (y, x)))))
    at = line.index(patch)
    shapes += _frame(Mark((0, at), letter), left, HEAD, cell - 1, tile - 1)
    top = HEAD + tile + 4
    for name, values in _rows(quantities, length):
        low, high = limits[name.split()[0]]
        fills = colour((values - low) / (high - low), DIVERGING if low < 0 else SEQUENTIAL)
        shapes.append(Text(left - 6, top + 16, name, 11, INK, "end"))
        for m, value in enumerate(values.tolist()):
            says = f"{place(line[m])}: {name} {value:.5g}"
            y, x = line[m]
            shapes.append(Rect(left + m * cell, top, cell - 1, tall - 1, code(fills[m]), title=says, patch=f"{y},{x}"))
            if cell >= 26:
                size, ink = (10.5 if cell > 33 or abs(value) < 9.995 else 9.5), ink_on(fills[m])
                shapes.append(Text(left + (m + 0.5) * cell - 0.5, top + 16, _short(value), size, ink, "middle"))
        top += tall
    for at, (name, ends) in enumerate(limits.items()):
        x, colours = left + at * (WIDE - left) / 3, DIVERGING if ends[0] < 0 else SEQUENTIAL
        shapes += [Text(x, top + 18, UNITS[name], 10.5, FAINT), *_scale(ends, colours, top + 24, (WIDE - left) / 3 - 12, x)]
    return Drawing(WIDE, top + 46 * bool(limits), tuple(shapes), f"{title}: {', '.join(quantities)}")


UNITS = {"gate": "gate (share)", "position": "position (rows)", "vector": "vector (logits)"}


def _line_limits(name: str, values: np.ndarray) -> Limits:
    return (0.0, 1.0) if name == "gate" else limits_of([values], signed=bool(values.min() < 0))


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
    shapes: list[Shape] = list(heading(title, note))
    for head in range(heads):
        top = HEAD + head * tall
        shapes.append(Text(left - 6, top + 14, f"head {head + 1}", 11, INK, "end"))
        for m, value in enumerate(values[head].tolist()):
            says = f"head {head + 1}, place {m}: {value:.5g}"
            shapes.append(Rect(left + m * cell, top, cell - 1, tall - 1, code(fills[head, m]), title=says))
            if cell >= 26:
                ink = ink_on(fills[head, m])
                shapes.append(Text(left + (m + 0.5) * cell - 0.5, top + 14, _short(value), 10, ink, "middle"))
    bottom = HEAD + heads * tall
    shapes += _scale((0.0, largest), SEQUENTIAL, bottom + 6, WIDE - left, left)
    return Drawing(WIDE, bottom + 28, tuple(shapes), f"{title}, {note}")
