"""Passes one image through a model once and records everything that the microscope may show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sape2.attention import encode
from sape2.encodings import AttentionEncoding
from sape2.encodings.base import full_precision
from sape2.encodings.cope import CoPE
from sape2.encodings.grid import Grid
from sape2.encodings.sape2 import SaPE2, table_products
from sape2.models.vit import ViT


@dataclass(frozen=True)
class LayerMaps:
    """One layer: the encoding's maps, (h, N, ...), and what `maps` does not hold. `content` is attention without the bias.

    `attention` and `content` are of grid tokens among all tokens, so a row sums to 1 less what prefix tokens get.
    `products` are z_i[p], (h, N, positions), of each axis that has a table.
    """

    maps: dict[str, np.ndarray]
    attention: np.ndarray
    content: np.ndarray
    products: dict[str, np.ndarray]
    leaving: np.ndarray
    readout: str | None


@dataclass(frozen=True)
class Seen:
    """One image after one pass through one model: pixels as the model took them, (C, height, width) uint8."""

    pixels: np.ndarray
    grid: Grid
    probabilities: np.ndarray
    layers: list[LayerMaps]


@torch.no_grad()
def look(model: ViT, images: Tensor) -> tuple[np.ndarray, list[LayerMaps]]:
    """Probabilities and all layers of one normalised image (1, C, height, width)."""
    device = next(model.parameters()).device
    x, grid = model.embed(images.to(device))
    first, layers = model.num_prefix_tokens, []
    for block, maps in zip(model.layers(), model.maps(images.to(device)), strict=True):
        encoding = block.attn.encoding
        tokens = block.norm1(x)
        q, k, _ = block.attn.project(tokens)
        x = maps["tokens"]
        rotated_q, rotated_k, _ = encode(q, k, grid, encoding, tokens)
        content = (rotated_q * q.shape[-1] ** -0.5 @ rotated_k.transpose(-1, -2)).softmax(-1)
        named = {name: _array(value) for name, value in maps.items() if name not in ("tokens", "attention")}
        counting = [part for part in _parts(encoding) if isinstance(part, (SaPE2, CoPE))]
        products = {} if not counting else _products(counting[-1], q[:, :, first:], k[:, :, first:])
        readout = counting[-1].options.readout if counting and isinstance(counting[-1], SaPE2) else None
        attention = maps["attention"]
        layers.append(
            LayerMaps(
                named, _array(attention[:, :, first:, first:]), _array(content[:, :, first:, first:]), products,
                _array(x[:, first:]), readout,
            )
        )  # fmt: skip
    probabilities = model(images.to(device))[0].double().softmax(-1)
    return probabilities.cpu().numpy(), layers


def _parts(encoding: AttentionEncoding) -> list[torch.nn.Module]:
    return [part for part in encoding.modules() if isinstance(part, AttentionEncoding)]


def _products(encoding: SaPE2 | CoPE, q: Tensor, k: Tensor) -> dict[str, np.ndarray]:
    """Eq. 13 for every patch: the table as i sees it, for each axis."""
    vector = full_precision(k if isinstance(encoding, SaPE2) and encoding.options.dot == "key" else q)
    if isinstance(encoding, CoPE):
        return {"": _array(table_products(vector, full_precision(encoding.table)))}
    tables = {axis: full_precision(getattr(encoding, f"table_{axis}")) for axis in encoding.axes}
    return {axis: _array(table_products(vector, table)) for axis, table in tables.items()}


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor without its batch dimension, in float64."""
    return tensor[0].detach().cpu().double().numpy()
