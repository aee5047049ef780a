"""Figures about one image, each a list of drawings, placed side by side where there is room, on a page or in one file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from sape2.encodings.grid import Grid
from sape2.inspect.drawing import Drawing, Length, flow, framed, stack, text
from sape2.inspect.look import Patch
from sape2.inspect.panels import (
    FIRST,
    NARROW,
    SECOND,
    Mark,
    Over,
    heads_panel,
    image_panel,
    limits_of,
    line_panel,
    map_panel,
    matrix_panel,
)
from sape2.inspect.plots import bars_panel, by_distance, distance_panel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (FIRST, SECOND)
WIDER = 210.0  # of a map where there are few


def named_marks(patches: dict[str, Patch]) -> tuple[list[Mark], str]:
    """A mark with a letter for each patch, and which letter is which."""
    marks = [Mark(patch, LETTERS[at % len(LETTERS)], COLOURS[at % len(COLOURS)]) for at, patch in enumerate(patches.values())]
    return marks, "; ".join(f"{mark.letter}: {name}" for mark, name in zip(marks, patches, strict=True))


def answer_figure(
    pixels: np.ndarray, grid: Grid, marks: Sequence[Mark], maps: dict[str, Over], likely: Sequence[tuple[str, float]]
) -> list[Drawing]:
    """Figure 4 of the paper and the answer: the image with its marked patches, what the first of them sees drawn over it,

    map by map, and the most likely classes with their probabilities.
    """
    height, width = pixels.shape[-2:]
    plain = image_panel(pixels, grid, marks, "Image", f"{height}x{width} px, {grid[0]}x{grid[1]} patches")
    overlaid = [image_panel(pixels, grid, marks, title, over.unit, over=over) for title, over in maps.items()]
    names, values = zip(*likely, strict=True)
    return [plain, *overlaid, bars_panel(names, values, "Prediction", "class probability")]


def pairs_figure(
    layers: dict[str, Float[Tensor, "tokens tokens"]], grid: Grid, patches: dict[str, Patch], quantity: str = "bias (logits)"
) -> list[Drawing]:
    """The bias or the attention of the layers between all patches, and from each named patch (row, column) to all others.

    A drawing for each layer, or for each map of a single layer; one colour scale for all maps of a layer.
    """
    marks, found = named_marks(patches)[0], []
    width = NARROW if len(layers) > 4 else WIDER
    for name, pairs in layers.items():
        values = pairs.double().numpy()
        limits = limits_of([values])
        maps = [
            map_panel(values[y * grid[1] + x].reshape(grid), f"from patch {mark.letter}", quantity, [mark], limits, width=width)
            for mark, (y, x) in zip(marks, patches.values(), strict=True)
        ]
        parts = [matrix_panel(values, f"{name}: all pairs", quantity, limits, width), *maps]
        found += parts if len(layers) == 1 else [stack(parts, 8)]
    return found


def counts_figure(
    image: UInt8[Tensor, "channels height width"],
    maps: dict[str, dict[str, Float[Tensor, "heads _"]]],
    grid: Grid,
    patch: Patch,
) -> list[Drawing]:
    """The counts of one patch: gates and positions along each axis, one line per head, below the counted patches.

    `maps` is {"x": {"gates": ..., "positions": ...}, "y": ...}; a position that is read twice (counts from both ends) has
    twice as many places.
    """
    found = []
    for axis, values in maps.items():
        gates, positions = (values[kind].double().numpy() for kind in ("gates", "positions"))
        name = {"x": "Along the row", "y": "Along the column"}.get(axis, "Along the raster order")
        parts = [heads_panel(gates, f"{name}: gates", "0 to 1", 1.0)]
        for start in range(0, positions.shape[1], gates.shape[1]):
            end = "" if positions.shape[1] == gates.shape[1] else ", from the other end" if start else ", from one end"
            part = positions[:, start : start + gates.shape[1]]
            parts.append(heads_panel(part, f"{name}: positions{end}", "rows of the table", float(positions.max())))
        if axis in ("x", "y"):
            parts.insert(0, line_panel(image.numpy(), grid, patch, axis, {}, name, "a"))
        found += parts if len(maps) == 1 else [stack(parts, 8)]
    return found


def distance_figure(
    layers: dict[str, Float[Tensor, "maps tokens tokens"]], grid: Grid, quantity: str = "bias (logits)"
) -> list[Drawing]:
    """Each layer's bias (or attention) against the distance of the two patches, on one scale for all layers."""
    bands = {name: by_distance(maps.double().numpy(), grid) for name, maps in layers.items()}
    limits = limits_of(np.array([mean + sign * spread for mean, spread in bands.values() for sign in (1, -1)]))
    return [distance_panel(*band, name, quantity, limits) for name, band in bands.items()]


# --- several drawings as one -----------------------------------------------------------------------------------------


def even_columns(number: int, most: int) -> int:
    """Columns, at most so many, in which the rows of so many drawings are as full as can be."""
    return -(-number // -(-number // most))


def as_one(title: str, about: str, first: Sequence[Drawing], drawings: Sequence[Drawing]) -> Drawing:
    """One drawing for a file: a heading, the first drawings in a row, and below them the others in even rows of at most six."""
    columns = even_columns(len(drawings), 6)
    top, below = flow(first, 1e9), flow(drawings, columns * (max(d.width for d in drawings) + 16))
    width = max(top.width, below.width, 300.0)  # room for the words
    head = [written(wrapped(title, int(width / 12)), width, 18, True), written(wrapped(about, int(width / 7)), width, 12)]
    return framed(stack([*head, top, below], 16, title))


def written(lines: Sequence[str], width: Length, size: Length, bold: bool = False) -> Drawing:
    texts = [text(0, (at + 1) * 1.35 * size, line, size, bold=bold) for at, line in enumerate(lines)]
    return Drawing(width, 1.35 * size * len(lines) + 2, texts)


def wrapped(text: str, length: int) -> list[str]:
    """Lines of at most so many characters."""
    return textwrap.wrap(text, length) or [""]
