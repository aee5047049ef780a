"""Figures about one image, each a list of drawings: beside each other as far as there is room, on a page or in one file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from sape2.viz.drawing import Drawing, flow, framed, stack
from sape2.viz.panels import (
    FIRST,
    NARROW,
    SECOND,
    Mark,
    heads_panel,
    image_panel,
    limits_of,
    line_panel,
    map_panel,
    matrix_panel,
)
from sape2.viz.plots import by_distance, distance_panel

Grid = tuple[int, int]
Patch = tuple[int, int]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (FIRST, SECOND)


def pairs_figure(
    image: UInt8[Tensor, "channels height width"],
    layers: dict[str, Float[Tensor, "tokens tokens"]],
    grid: Grid,
    patches: dict[str, Patch],
    quantity: str = "bias (logits)",
) -> list[Drawing]:
    """Figure 4 of the paper: what the layers give between all patches, and from each named patch (row, column) to all others.

    The image, then a drawing for each layer; one colour scale for all maps of a layer.
    """
    marks = [Mark(patch, LETTERS[at % len(LETTERS)], COLOURS[at % len(COLOURS)]) for at, patch in enumerate(patches.values())]
    note = "; ".join(f"{mark.letter}: the {name}" for mark, name in zip(marks, patches, strict=True))
    found = [image_panel(image.numpy(), grid, marks, "Image", note)]
    for name, pairs in layers.items():
        values = pairs.double().numpy()
        limits = limits_of([values])
        maps = [
            map_panel(values[y * grid[1] + x].reshape(grid), f"from {mark.letter}", quantity, [mark], limits)
            for mark, (y, x) in zip(marks, patches.values(), strict=True)
        ]
        found.append(stack([matrix_panel(values, f"{name}: all pairs", quantity, limits), *maps], 8))
    return found


def counts_figure(
    image: UInt8[Tensor, "channels height width"],
    maps: dict[str, dict[str, Float[Tensor, "heads _"]]],
    grid: Grid,
    patch: Patch,
) -> list[Drawing]:
    """What one patch counts: its gates and its positions along each axis, a line a head, below the patches that are counted.

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
        found.append(stack(parts, 8))
    return found


def distance_figure(
    layers: dict[str, Float[Tensor, "maps tokens tokens"]], grid: Grid, quantity: str = "bias (logits)"
) -> list[Drawing]:
    """Each layer's bias (or attention) against the distance of the two patches, on one scale for all layers."""
    values = {name: maps.double().numpy() for name, maps in layers.items()}
    bands = [by_distance(maps, grid) for maps in values.values()]
    limits = limits_of(np.array([mean + sign * spread for mean, spread in bands for sign in (1, -1)]))
    return [distance_panel(maps, grid, name, quantity, limits) for name, maps in values.items()]


def as_one(drawings: Sequence[Drawing], columns: int = 6) -> Drawing:
    """For a file: at most so many narrow drawings beside each other."""
    return framed(flow(drawings, columns * (NARROW + 16)))
