"""The numbers of one column of the page: those of one patch, taken from one pass of the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from sape2.encodings.grid import Grid
from sape2.inspect.explore.change import Change
from sape2.inspect.explore.state import State
from sape2.inspect.look import LayerLook, Look, Patch, of_head


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

    def to_json(self) -> str:
        """Every number that is drawn."""
        shown = {
            "state": asdict(self.state),
            "image": self.notes,
            "columns": [asdict(column) | {"distances": column.distances()} for column in self.columns],
            "moved": [asdict(change) for change in self.moved],
        }
        return json.dumps(shown, default=lambda value: value.tolist())  # of arrays and numbers of numpy


def column(seen: Look, classes: Sequence[str], name: str, encoding: str, state: State) -> Column:
    """What stands in one column: the layer, head and patches of the state."""
    layer = seen.layers[state.layer - 1]
    i, n = seen.token(state.patch), None if state.other is None else seen.token(state.other)

    def map_of(values: Tensor) -> np.ndarray:
        return of_head(values[:, :, i], state.head).reshape(seen.grid)

    return Column(
        name=name,
        encoding=encoding,
        grid=seen.grid,
        patch=state.patch,
        other=state.other,
        pixels=seen.pixels.numpy(),
        prediction=seen.likely(classes),
        axes={axis: _axis_view(layer, axis, state.head, i, n) for axis in layer.axes},
        bias=map_of(layer.maps["bias"]) if "bias" in layer.maps else None,
        attention=map_of(layer.among_all),
        attention_without_bias=map_of(layer.content),
        readout=layer.readout,
    )


def _axis_view(layer: LayerLook, axis: str, head: int, i: int, n: int | None) -> AxisView:
    def of(kind: str, token: int | None) -> np.ndarray | None:
        values = layer.along(axis, kind)
        return None if values is None or token is None else of_head(values[:, :, token], head)

    gates, positions = of("gates", i), of("positions", i)
    assert gates is not None
    assert positions is not None
    seen = layer.products.get(axis) if head else None  # a mean of heads is not read at a mean position
    return AxisView(
        gates, positions, of("vectors", i), None if seen is None else of_head(seen[:, :, i], head), of("vectors", n)
    )
