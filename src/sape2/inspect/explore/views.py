"""Turns a view into sections of panels and text, for the page and for files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sape2.inspect.drawing import Drawing, flow, framed, stack
from sape2.inspect.explore.columns import Column, View
from sape2.inspect.figures import answer_figure, wrapped, written
from sape2.inspect.panels import FIRST, OVERLAID, SECOND, Limits, Mark, Over, limits_of, line_panel, map_panel, number, place
from sape2.inspect.plots import pair_panel, table_panel
from sape2.inspect.templates import template

BIAS, WEIGHT = "logits", "attention weight"
AXIS_TITLES = {"x": "Along the row", "y": "Along the column"}
TABLE_TITLES = {"x": "Table of the rows", "y": "Table of the columns", "raster": "Table", "": "Table"}
LINES = (
    "A gate, from 0 to 1, is how much patch i counts a patch of its row or column. A position is a sum of gates along the "
    "line. The position vector holds the values of the position table at these positions."
)
TABLES = (
    "Grey: the product of the query (or key) of patch i with each row of the position table. Orange: its value at the "
    "positions of the line of i, which lie between whole rows; in the order of the line they are its position vector."
)
MAPS = "Without the bias: the softmax of the content logits alone. A high bias raises the attention, a low one lowers it."


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, panels for each column, and perhaps a table."""

    key: str
    title: str
    words: str
    panels: list[list[Drawing]]
    table: list[dict[str, Any]] | None = None


def sections(view: View) -> list[Section]:
    """The sections of a view; sections without content are left out."""
    columns = view.columns
    limits, opacity = _shared_limits(columns), view.state.opacity / 100
    found = [
        Section("answer", "Bias, attention and prediction", _words(view), [_answer(c, limits, opacity) for c in columns]),
        Section("lines", "Gates, positions and position vectors", LINES, [list(_lines(c)) for c in columns]),
        Section("tables", "Position table, interpolated", TABLES, [list(_tables(c)) for c in columns]),
        Section("maps", "Attention with and without the bias", MAPS, [list(_maps(c, limits)) for c in columns]),
        Section("pair", "Distance between patches i and n", _pair_words(columns[0]), [list(_pairs(c)) for c in columns]),
    ]
    shown = [section for section in found if any(section.panels) or (section.key == "pair" and columns[0].other)]
    if view.moved:
        shown.insert(1, Section("moved", "Change after the shift", _moved_words(view), [], list(_moved_table(view))))
    return shown


# --- panels ----------------------------------------------------------------------------------------------------------


def _marks(column: Column) -> list[Mark]:
    other = [] if column.other is None else [Mark(column.other, "n", SECOND)]
    return [Mark(column.patch, "i", FIRST), *other]


def _answer(column: Column, limits: dict[str, Limits], opacity: float) -> list[Drawing]:
    """The image, over it the bias and the attention from patch i, and the prediction."""
    maps = {"Attention from i": Over(column.attention, WEIGHT, limits["attention"], opacity)}
    if column.bias is not None:
        maps = {"Bias from i": Over(column.bias, BIAS, limits["bias"], opacity)} | maps
    return answer_figure(column.pixels, column.grid, _marks(column), maps, column.prediction)


def _lines(column: Column) -> Iterator[Drawing]:
    for axis, seen in column.axes.items():
        if axis in ("x", "y"):
            found = {"gate": seen.gates, "position": seen.positions, "vector": seen.vector}
            shown = {name: values for name, values in found.items() if values is not None}
            yield line_panel(column.pixels, column.grid, column.patch, axis, shown, AXIS_TITLES[axis])
            continue
        for name, values in (("Gates", seen.gates), ("Positions", seen.positions), ("Position vector", seen.vector)):
            if values is not None and len(values) == column.grid[0] * column.grid[1]:
                unit = "rows of the table" if name == "Positions" else "0 to 1" if name == "Gates" else "logits"
                yield map_panel(values.reshape(column.grid), name, unit, _marks(column))


def _tables(column: Column) -> Iterator[Drawing]:
    for axis, seen in column.axes.items():
        if seen.products is not None:
            yield table_panel(seen.products, seen.positions, axis, TABLE_TITLES[axis])


def _shared_limits(columns: Sequence[Column]) -> dict[str, Limits]:
    """One scale for the bias and one for the attention in all columns, so that colours can be compared."""
    limits = {"attention": limits_of([m for c in columns for m in (c.attention, c.attention_without_bias)])}
    biases = [column.bias for column in columns if column.bias is not None]
    if biases:
        limits["bias"] = limits_of(biases)
        limits["change"] = limits_of([c.attention - c.attention_without_bias for c in columns], signed=True)
    return limits


def _maps(column: Column, limits: dict[str, Limits]) -> Iterator[Drawing]:
    if column.bias is None:
        return
    marks = _marks(column)
    yield map_panel(column.attention_without_bias, "Without the bias", WEIGHT, marks, limits["attention"], width=OVERLAID)
    yield map_panel(column.attention, "With the bias", WEIGHT, marks, limits["attention"], width=OVERLAID)
    change = column.attention - column.attention_without_bias
    yield map_panel(change, "Difference", WEIGHT, marks, limits["change"], signed=True, width=OVERLAID)


def _pairs(column: Column) -> Iterator[Drawing]:
    distances = column.distances()
    for axis, distance in distances.items():
        seen = column.axes[axis]
        squared = "squared " if column.readout == "squared_distance" else ""
        if seen.vector is not None and seen.other_vector is not None:
            note = f"{squared}distance {number(distance)}; below: squared differences"
            yield pair_panel(seen.vector, seen.other_vector, axis, AXIS_TITLES.get(axis, "Along the image"), note)


# --- words -----------------------------------------------------------------------------------------------------------


def _words(view: View) -> str:
    column, image = view.columns[0], f"{view.notes[:1].upper()}{view.notes[1:]}"
    attention = "the attention is how much patch i attends to each patch"
    if column.bias is None:
        return f"{image}. The encoding {column.encoding} adds no bias in this layer; {attention}."
    gates = "" if column.axes else " It has no gates and no positions."
    return f"{image}. The bias is what {column.encoding} adds to the attention logits of patch i; {attention}.{gates}"


def _pair_words(column: Column) -> str:
    if column.other is None:
        return ""
    distances, at = column.distances(), column.other
    pair = f"i (orange) is {place(column.patch)}, n (blue) is {place(at)}. "
    attention = f"Attention from i to n: {number(float(column.attention[at]))}"
    if column.bias is None:
        return f"{pair}There is no bias between them. {attention}."
    without = number(float(column.attention_without_bias[at]))
    bias = f"Bias: {number(float(column.bias[at]))} logits. {attention}, without the bias {without}."
    if not distances:
        return pair + bias
    squared = "squared distance" if column.readout == "squared_distance" else "distance"
    parts = [f"{squared} of the vectors {_along(axis)} {number(value)}" for axis, value in distances.items()]
    total = f", together {number(sum(distances.values()))}" if len(parts) > 1 else ""
    return f"{pair}{' and '.join(parts).capitalize()}{total}. {bias}"


def _along(axis: str) -> str:
    return {"x": "along the rows", "y": "along the columns"}.get(axis, "along the image")


def _moved_words(view: View) -> str:
    (dy, dx), border, column = view.state.shift, view.state.border, view.columns[0]
    rule = "circularly" if border == "circular" else "with a mirror image at the border"
    sides = zip(view.state.shift, view.state.size, column.grid, strict=True)
    down, right = (round(shift * cells / side) for shift, side, cells in sides)
    return (
        f"Shifted by {dx} px to the right and {dy} px down ({rule}), about {right} and {down} patches. The numbers are "
        "relative changes in this layer and head: the norm of the difference over the norm before; 0 means unchanged. "
        "In place: each patch is compared with itself. Moved along: each patch is compared with the patch that it came from."
    )


def _moved_table(view: View) -> Iterator[dict[str, Any]]:
    for change in view.moved:
        moved = "-" if change.moved is None else _change(change.moved)
        yield {"quantity": change.what, "in place": _change(change.in_place), "moved along": moved}


def _change(value: float) -> str:
    """Formats a change; differences within single-precision rounding count as none."""
    return "0 (rounding)" if value < 1e-5 else f"{value:.3f}"


# --- page and files --------------------------------------------------------------------------------------------------


def to_html(view: View) -> tuple[str, str]:
    """HTML of the view in two parts: the first section, and all others; panels keep the data for clicks and pointers."""
    write, names = template("explore.html").module.section, [column.name for column in view.columns]
    first, *rest = (str(write(section, names)) for section in sections(view))
    return first, "".join(rest)


def to_drawing(view: View) -> Drawing:
    """The whole view as one picture."""
    width = 700.0 if len(view.columns) == 1 else 340.0
    total = 700.0
    title = f"{view.columns[0].name}; {view.columns[0].encoding}; {view.notes}"
    parts: list[Drawing] = [written(wrapped(title, 75), total, 14, True)]
    for section in sections(view):
        parts.append(written([section.title], total, 14, True))
        parts.append(written(wrapped(section.words, 108), total, 11.5))
        if section.table:
            told = [(row["quantity"], row["in place"], row["moved along"]) for row in section.table]
            lines = [f"{quantity}:  in place {still}   moved along {along}" for quantity, still, along in told]
            parts.append(written(lines, total, 11.5))
        if any(section.panels):
            named = len(view.columns) > 1
            columns = [
                stack([*([written([column.name], width, 12, True)] if named else []), flow(panels, width)], 6)
                for column, panels in zip(view.columns, section.panels, strict=True)
            ]
            parts.append(flow(columns, 2 * total, 20))
    return framed(stack(parts, 12, f"{view.columns[0].name}: {view.notes}"))
