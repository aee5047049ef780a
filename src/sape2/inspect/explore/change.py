"""Compares the maps of an image before and after a shift, patch by patch: which quantities move with the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sape2.encodings.grid import Grid
from sape2.inspect.look import Patch

NAMES = {"gates": "gates", "positions": "positions", "vectors": "position vectors", "bias": "bias", "attention": "attention"}
WHERE = {"x": " along rows", "y": " along columns", "raster": " along the image", "": ""}


@dataclass(frozen=True)
class Change:
    """Relative change of a quantity after a shift: at the same place, and at the place moved with the image.

    0 is "the same", 1 about "as different as nothing would be". `moved` is None for quantities without a place.
    """

    what: str
    in_place: float
    moved: float | None


def changes(
    tables: Sequence[dict[str, np.ndarray]],
    tokens: Sequence[np.ndarray],
    probabilities: Sequence[np.ndarray],
    grid: Grid,
    steps: Patch,
    border: str,
) -> list[Change]:
    """||after - before|| / ||before|| of every map, before moved by `steps` whole patches (down, right) or not at all.

    Each argument is a pair (before, after): maps of one layer and head, tokens (N, D) that leave it, class probabilities.
    With a border that is not circular only patches count that were inside the image before and after.
    """
    before, after = tables
    found = []
    for name in before:
        kind, _, axis = name.partition("_")
        sides = ("token", axis if axis in ("x", "y") else "token")
        found.append(_change(NAMES[kind] + WHERE[axis], before[name], after[name], sides, grid, steps, border))
    found.append(_change("tokens that leave the layer", tokens[0], tokens[1], ("token", "feature"), grid, steps, border))
    difference = np.linalg.norm(probabilities[1] - probabilities[0]) / np.linalg.norm(probabilities[0])
    return [*found, Change("probabilities of the classes", float(difference), None)]


def _change(
    what: str, before: np.ndarray, after: np.ndarray, sides: Sequence[str], grid: Grid, steps: Patch, border: str
) -> Change:
    moved, expected = before, after
    for dimension, side in enumerate(sides):
        source, inside = _source(side, before.shape[dimension], grid, steps, border)
        moved = moved.take(source, dimension).compress(inside, dimension)
        expected = expected.compress(inside, dimension)
    return Change(what, _relative(after, before), _relative(expected, moved) if moved.size else None)


def _relative(after: np.ndarray, before: np.ndarray) -> float:
    return float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-12))


def _source(side: str, length: int, grid: Grid, steps: Patch, border: str) -> tuple[np.ndarray, np.ndarray]:
    """For each index, the index before the shift that it corresponds to, and whether that lies inside the image."""
    if side == "feature":
        return np.arange(length), np.ones(length, dtype=bool)
    if side == "token":
        y, x = np.divmod(np.arange(length), grid[1])
        (from_y, in_y), (from_x, in_x) = (_along(p, s, g, border) for p, s, g in zip((y, x), steps, grid, strict=True))
        return from_y * grid[1] + from_x, in_y & in_x
    size, step = (grid[1], steps[1]) if side == "x" else (grid[0], steps[0])
    found, inside = _along(np.arange(length) % size, step, size, border)
    return found + np.arange(length) // size * size, inside  # counts from both ends: twice the line


def _along(places: np.ndarray, step: int, size: int, border: str) -> tuple[np.ndarray, np.ndarray]:
    was = places - step
    return was % size, (was >= 0) & (was < size) | (border == "circular")
