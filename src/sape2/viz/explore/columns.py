"""The numbers of one column of the page: those of one patch, taken from one pass of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sape2.encodings.grid import Grid
from sape2.viz.explore.change import Change
from sape2.viz.explore.looking import LayerMaps
from sape2.viz.explore.state import Patch, State


@dataclass(frozen=True)
class AxisView:
    """Along one axis from patch i: gates (S), positions and vector (S or 2S), table products (positions)."""

    gates: np.ndarray
    positions: np.ndarray
    vector: np.ndarray | None
    products: np.ndarray | None
    other_vector: np.ndarray | None


@dataclass(frozen=True)
class Column:
    """Everything about one patch in one layer and head of one model on one image. Maps are (H, W); None: there is none."""

    name: str
    encoding: str
    grid: Grid
    patch: Patch
    other: Patch | None
    pixels: np.ndarray
    prediction: list[tuple[str, float]]
    axes: dict[str, AxisView]
    bias: np.ndarray | None
    attention: np.ndarray
    attention_without_bias: np.ndarray
    readout: str | None

    def distances(self) -> dict[str, float]:
        """Eq. 15, one axis at a time: the distance of the vectors of i and n (squared where the encoding squares it)."""
        result = {}
        for axis, view in self.axes.items():
            if view.vector is not None and view.other_vector is not None and self.readout in ("distance", "squared_distance"):
                squared = float(((view.vector - view.other_vector) ** 2).sum())
                result[axis] = squared if self.readout == "squared_distance" else squared**0.5
        return result


@dataclass(frozen=True)
class View:
    """The contents of the page: one or two columns, and what moved between them."""

    state: State
    columns: list[Column]
    moved: list[Change]
    notes: str

    def to_dict(self) -> dict[str, Any]:
        """Every number that is drawn, for JSON."""
        return {
            "state": {field.name: getattr(self.state, field.name) for field in fields(State)},
            "image": self.notes,
            "columns": [_plain(column) | {"distances": column.distances()} for column in self.columns],
            "moved": [_plain(change) for change in self.moved],
        }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


def of_head(values: np.ndarray, head: int) -> np.ndarray:
    return values.mean(0) if head == 0 else values[head - 1]


def axes_of(maps: Mapping[str, np.ndarray]) -> list[str]:
    """x and y where the encoding counts along lines; raster, or nothing for CoPE, where along the whole sequence."""
    return [name.removeprefix("gates").removeprefix("_") for name in maps if name.startswith("gates")]


def axis_view(layer: LayerMaps, axis: str, head: int, i: int, n: int | None) -> AxisView:
    def of(kind: str, token: int | None) -> np.ndarray | None:
        values = layer.maps.get("_".join(filter(None, (kind, axis))))
        return None if values is None or token is None else of_head(values, head)[token]

    gates, positions = of("gates", i), of("positions", i)
    assert gates is not None
    assert positions is not None
    products = layer.products.get(axis)
    seen = None if products is None or head == 0 else products[head - 1, i]  # a mean of heads is not read at a mean position
    return AxisView(gates, positions, of("vectors", i), seen, of("vectors", n))
