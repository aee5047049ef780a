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
from sape2.inspect.drawing import DIVERGING, FAINT, INK, SEQUENTIAL, Drawing, Length, code, colour, ink_on, raster, rect, text
from sape2.inspect.look import Patch

Limits = tuple[Length, Length]

WIDE, NARROW = 340.0, 164.0  # one panel, or two, on a screen of 390 px
OVERLAID = 200.0  # of an image, with or without a map over it
PATCH_EDGE = "#80808059"
ROUNDING = 1e-5  # of a number: what is less apart is the same
HEAD = 34.0  # of the title and the line below it
LEFT = 62.0  # of rows of cells, room for their names
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
    pixels: np.ndarray, grid: Grid, marks: Sequence[Mark], title: str, note: str = "", over: Over | None = None
) -> Drawing:
    """The image, (channels, height, width) uint8, with its patches; a click on one chooses it.

    With `over` its values lie over the image in colour, as in figure 4 of the paper, with their scale below.
    """
    tall, broad = pixels.shape[-2:]
    zoom = min(OVERLAID / broad, 1.25 * OVERLAID / tall)
    cell_h, cell_w = zoom * tall / grid[0], zoom * broad / grid[1]
    shown = raster(0, HEAD, zoom * broad, zoom * tall, in_colour(pixels))
    limits = (0.0, 1.0) if over is None else over.limits or limits_of([over.values])
    fills = None if over is None else colour(_shares(over.values, limits))
    cells = []
    for y, x in np.ndindex(*grid):
        box = (x * cell_w, HEAD + y * cell_h, cell_w, cell_h)
        if over is None or fills is None:
            cells.append(rect(*box, "none", PATCH_EDGE, 0.5, place((y, x)), f"{y},{x}"))
        else:
            says = f"{place((y, x))}: {over.values[y, x]:.5g} {over.unit}"
            cells.append(rect(*box, code(fills[y, x]), PATCH_EDGE, 0.5, says, f"{y},{x}", over.opacity))
    frames = [shape for mark in marks for shape in _frame(mark, 0, HEAD, cell_w, cell_h)]
    shapes = (*heading(title, note), shown, *cells, *frames)
    bottom = HEAD + zoom * tall
    if over is None:
        return Drawing(OVERLAID, bottom, shapes, f"{title} {note}")
    scale = _scale(limits, SEQUENTIAL, bottom + 6, zoom * broad)
    return Drawing(OVERLAID, bottom + 28, (*shapes, *scale), f"{title} ({note}), over the image")


def in_colour(pixels: np.ndarray) -> np.ndarray:
    """(channels, height, width) -> (height, width, 3)."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def _frame(mark: Mark, x: Length, y: Length, width: Length, height: Length) -> Iterator[str]:
    """Coloured on white, so that it stands out from dark and from light, with its letter in the corner."""
    left, top = x + mark.patch[1] * width, y + mark.patch[0] * height
    yield rect(left, top, width, height, "none", "#ffffff", 5)
    yield rect(left, top, width, height, "none", mark.colour, 2.5)
    if min(width, height) >= 22:
        yield rect(left, top, 12, 14, mark.colour)
        yield text(left + 6, top + 11, mark.letter, 11, "#ffffff", "middle", bold=True)


def heading(title: str, note: str) -> tuple[str, ...]:
    return (
        (text(0, 12, title, 12.5, bold=True), text(0, 27, note, 11, FAINT)) if note else (text(0, 22, title, 12.5, bold=True),)
    )


# --- maps ------------------------------------------------------------------------------------------------------------


def limits_of(values: Sequence[np.ndarray] | np.ndarray, signed: bool = False) -> Limits:
    """Limits of the colour scale: smallest and largest value, symmetric for differences; rounding noise is not stretched."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if signed:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    return low, max(high, low + 1e-9, low + ROUNDING * abs(high))


def _shares(values: np.ndarray, limits: Limits) -> np.ndarray:
    return (values - limits[0]) / (limits[1] - limits[0])


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
    fills = colour(_shares(values, limits), colours)
    cells = [_cell((y, x), cell, code(fills[y, x]), f"{value:.5g} {unit}") for (y, x), value in np.ndenumerate(values)]
    frames = [shape for mark in marks for shape in _frame(mark, 0, HEAD, cell, cell)]
    bottom = HEAD + rows * cell
    shapes = (*heading(title, unit), *cells, *frames, *_scale(limits, colours, bottom + 6, cell * columns))
    return Drawing(width, bottom + 28, shapes, f"{title} ({unit}), from {number(values.min())} to {number(values.max())}")


def _cell(patch: Patch, size: Length, fill: str, says: str) -> str:
    """A little larger than it is, so that no line shows between two."""
    y, x = patch
    return rect(x * size, HEAD + y * size, size + 0.3, size + 0.3, fill, title=f"{place(patch)}: {says}", patch=f"{y},{x}")


def _scale(limits: Limits, colours: str, y: Length, width: Length, x: Length = 0.0) -> Iterator[str]:
    yield raster(x, y, width, 6, colour(np.linspace(0, 1, 64)[None], colours))
    low, high = ends_of(limits)
    yield text(x, y + 18, low if high else f"{low} everywhere", 10.5, FAINT)
    yield text(x + width, y + 18, high, 10.5, FAINT, "end")


def matrix_panel(values: np.ndarray, title: str, unit: str, limits: Limits, width: Length) -> Drawing:
    """All pairs, (N, N), the patch that one looks from down, the other across; too many to point at."""
    fills = colour(_shares(values, limits))
    shapes = (*heading(title, unit), raster(0, HEAD, width, width, fills), *_scale(limits, SEQUENTIAL, HEAD + width + 6, width))
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
    patches = [(patch[0], x) for x in range(grid[1])] if axis == "x" else [(y, patch[1]) for y in range(grid[0])]
    cell, tall = (WIDE - LEFT) / len(patches), 24.0
    tile = min(cell, 40.0)
    limits = {name: _line_limits(name, values) for name, values in quantities.items()}
    shapes = list(heading(title, "left to right" if axis == "x" else "top to bottom"))
    for m, at in enumerate(patches):
        shapes.append(raster(LEFT + m * cell, HEAD, cell - 1, tile - 1, in_colour(_tile(pixels, grid, at))))
    shapes += _frame(Mark((0, patches.index(patch)), letter), LEFT, HEAD, cell - 1, tile - 1)
    top = HEAD + tile + 4
    for name, values in _rows(quantities, len(patches)):
        says = [f"{place(at)}: {name}" for at in patches]
        shapes += _row(name, values, limits[name.split()[0]], top, tall, says, [f"{y},{x}" for y, x in patches])
        top += tall
    for at, (name, ends) in enumerate(limits.items()):
        x, wide = LEFT + at * (WIDE - LEFT) / 3, (WIDE - LEFT) / 3 - 12
        shapes += [text(x, top + 18, UNITS[name], 10.5, FAINT), *_scale(ends, _colours(ends), top + 24, wide, x)]
    return Drawing(WIDE, top + 46 * bool(limits), shapes, f"{title}: {', '.join(quantities)}")


UNITS = {"gate": "gate (share)", "position": "position (rows)", "vector": "vector (logits)"}


def _line_limits(name: str, values: np.ndarray) -> Limits:
    return (0.0, 1.0) if name == "gate" else limits_of([values], signed=bool(values.min() < 0))


def _colours(limits: Limits) -> str:
    return DIVERGING if limits[0] < 0 else SEQUENTIAL


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


def _row(
    name: str, values: np.ndarray, limits: Limits, top: Length, tall: Length, says: Sequence[str], patches: Sequence[str] = ()
) -> Iterator[str]:
    """A cell for each value, in words where one points, with its number where there is room."""
    cell, base = (WIDE - LEFT) / len(values), top + tall / 2 + 4
    yield text(LEFT - 6, base, name, 11, INK, "end")
    for m, (value, fill) in enumerate(zip(values.tolist(), colour(_shares(values, limits), _colours(limits)), strict=True)):
        patch = patches[m] if patches else ""
        yield rect(LEFT + m * cell, top, cell - 1, tall - 1, code(fill), title=f"{says[m]} {value:.5g}", patch=patch)
        if cell >= 26:
            size = 10.5 if cell > 33 or abs(value) < 9.995 else 9.5
            yield text(LEFT + (m + 0.5) * cell - 0.5, base, _short(value), size, ink_on(fill), "middle")


def _short(value: Length) -> str:
    """Two decimals in as little room as can be."""
    words = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"
    return words.replace("-0.", "-.") if words.startswith("-0.") else words


def heads_panel(values: np.ndarray, title: str, note: str, largest: float) -> Drawing:
    """One line of cells for each head, (heads, places), in colours from 0 to `largest`."""
    limits, tall = (0.0, max(largest, 1e-9)), 20.0
    shapes = list(heading(title, note))
    for head, of_head in enumerate(values, 1):
        says = [f"head {head}, place {m}:" for m in range(len(of_head))]
        shapes += _row(f"head {head}", of_head, limits, HEAD + (head - 1) * tall, tall, says)
    bottom = HEAD + len(values) * tall
    shapes += _scale(limits, SEQUENTIAL, bottom + 6, WIDE - LEFT, LEFT)
    return Drawing(WIDE, bottom + 28, shapes, f"{title}, {note}")
