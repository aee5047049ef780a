"""One image after one pass through a model: the record that explain, explore and the pictures of bias are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from sape2.attention import encode
from sape2.encodings.cope import CoPE
from sape2.encodings.grid import Grid
from sape2.encodings.precision import full_precision
from sape2.encodings.sape2 import SaPE2, table_products
from sape2.evaluation.base import answered, evaluating
from sape2.evaluation.layers import Layer, as_layers
from sape2.models.vit import Block, ViT

Patch = tuple[int, int]  # (row, column)


@dataclass(frozen=True, eq=False)
class LayerLook(Layer):
    """A layer of one image with what `maps` does not hold, all tensors on the CPU and with their batch dimension of 1.

    `among_all` is the attention between grid tokens, a share of that among all tokens, so a row sums to 1 less what prefix
    tokens get; `content` the same without the bias. `products` are z_i[p], (1, h, N, positions), of each axis with a table.
    """

    content: Float[Tensor, "1 heads tokens tokens"]
    products: dict[str, Float[Tensor, "1 heads tokens positions"]]
    readout: str | None

    @property
    def among_all(self) -> Float[Tensor, "1 heads tokens tokens"]:
        return self.maps["attention"][:, :, self.num_prefix :, self.num_prefix :]

    @property
    def encoded(self) -> dict[str, Tensor]:
        """The maps of the encoding: bias, and along each axis gates, positions, vectors."""
        return {name: values for name, values in self.maps.items() if name not in ("tokens", "attention")}

    @property
    def axes(self) -> list[str]:
        """x and y where the encoding counts along lines; raster, or nothing for CoPE, where along the whole sequence."""
        return [name.removeprefix("gates").removeprefix("_") for name in self.maps if name.startswith("gates")]

    def along(self, axis: str, kind: str) -> Tensor | None:
        """The gates, positions or vectors along an axis, (1, h, N, places)."""
        return self.maps.get("_".join(filter(None, (kind, axis))))


@dataclass(frozen=True, eq=False)
class Look:
    """One image, as the model took it, after one pass: what the model answers, and what each layer did."""

    pixels: UInt8[Tensor, "channels height width"]
    grid: Grid
    probabilities: Float[Tensor, " classes"]
    layers: list[LayerLook]

    def likely(self, classes: Sequence[str], most: int = 5) -> list[tuple[str, float]]:
        """The most likely classes and their probabilities."""
        top = self.probabilities.topk(min(most, len(classes)))
        return [(classes[at], value) for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)]

    def token(self, patch: Patch) -> int:
        return patch[0] * self.grid[1] + patch[1]


def look(model: ViT, images: Float[Tensor, "1 channels height width"], pixels: UInt8[Tensor, "channels height width"]) -> Look:
    """Passes one normalised image through the model once; `pixels` is the same image for people."""
    with evaluating(model) as device:
        tokens, grid = model.embed(images.to(device))
        maps = model.maps_from(tokens, grid)
        logits = model.head(model.pool(model.norm(maps[-1]["tokens"])))
        layers = [_look(*both) for both in zip(model.layers(), as_layers(tokens, grid, maps), strict=True)]
    return Look(pixels, grid, answered(logits)[0].cpu().double().softmax(-1), layers)


def _look(block: Block, layer: Layer) -> LayerLook:
    attention, first = block.attn, layer.num_prefix
    tokens = block.norm1(layer.before)
    q, k, _ = attention.project(tokens)
    rotated_q, rotated_k, _ = encode(q, k, layer.grid, attention.encoding, tokens)
    content = (rotated_q * q.shape[-1] ** -0.5 @ rotated_k.transpose(-1, -2)).softmax(-1)[:, :, first:, first:]
    counting = [part for part in attention.encoding.modules() if isinstance(part, (SaPE2, CoPE))]
    products = _products(counting[-1], q[:, :, first:], k[:, :, first:]) if counting else {}
    readout = counting[-1].options.readout if counting and isinstance(counting[-1], SaPE2) else None
    maps = {name: values.cpu() for name, values in layer.maps.items()}
    return LayerLook(layer.number, layer.grid, layer.before.cpu(), maps, content.cpu(), products, readout)


def _products(encoding: SaPE2 | CoPE, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Eq. 13 for every patch: the table as i sees it, for each axis."""
    vector = full_precision(k if isinstance(encoding, SaPE2) and encoding.options.dot == "key" else q)
    tables = {"": encoding.table} if isinstance(encoding, CoPE) else {a: getattr(encoding, f"table_{a}") for a in encoding.axes}
    return {axis: table_products(vector, full_precision(table)).cpu() for axis, table in tables.items()}


def of_head(values: Float[Tensor, "1 heads *rest"], head: int | None) -> np.ndarray:
    """One head, counted from 1, of the one image; for 0 or None the mean of all. In float64."""
    values = values[0].double()
    return (values[head - 1] if head else values.mean(0)).numpy()
