"""Biases computed by a small network from the offset between two patches; the same network serves every grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import AttentionBias, Matrix
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, num_offsets, offset_index
from sape2.encodings.options import check_positive
from sape2.encodings.precision import full_precision, no_autocast

MAX_WIDTH = 2**16
EPSILON = 1e-6  # FIRE's


class Layer(nn.Linear):
    """In float32 or better; of a class of its own, which `quantize_dynamic` leaves as it is."""

    def forward(self, input: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*lead outputs"]:
        return F.linear(input, full_precision(self.weight), None if self.bias is None else full_precision(self.bias))


class OffsetNetwork(nn.Module):
    """Two linear layers with a ReLU between, of two coordinates for each offset, in float32 or better.

    The second has no bias: it would be the same for all pairs of patches, and drop out of a softmax over patches.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.first = Layer(2, width)
        self.last = Layer(width, num_heads, bias=False)

    def forward(self, offsets: Float[Tensor, "rows columns 2"]) -> Float[Tensor, "rows columns heads"]:
        return self.last(F.relu(self.first(offsets)))


class OffsetFunction(AttentionEncoding):
    """b_in = f(offset), computed once for each offset of the grid; what f is is for the subclass to say."""

    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.network = OffsetNetwork(self.options.width, num_heads)

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        rows, columns = num_offsets(grid)
        with no_autocast(q):
            table = self.table(grid, full_precision(q)).flatten(0, 1).T  # (h, offsets)
            return AttentionBias(Matrix(table[:, offset_index(grid, rows, columns, q.device)]), dtype=q.dtype)

    def table(self, grid: Grid, like: Tensor) -> Float[Tensor, "rows columns heads"]:
        """f of every offset (dy, dx) from i to n, -(H - 1)..H - 1 by -(W - 1)..W - 1."""
        raise NotImplementedError


def _offsets(length: int, like: Tensor) -> Float[Tensor, " offsets"]:
    return torch.arange(1 - length, length, device=like.device).to(like.dtype)


def _pairs(dy: Float[Tensor, " rows"], dx: Float[Tensor, " columns"]) -> Float[Tensor, "rows columns 2"]:
    return torch.stack(torch.broadcast_tensors(dy[:, None], dx), dim=-1)


def _check_width(name: str, width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{name}:width must be from 1 to {MAX_WIDTH}; got {str(width)[:50]}")


# --- log-CPB ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogCPBOptions:
    """`width`: of the hidden layer."""

    width: int = 512

    def __post_init__(self) -> None:
        _check_width("log_cpb", self.width)


class LogCPB(OffsetFunction):
    """b_in = 16 sigmoid(f(u, v)), u = sign(dy) log2(1 + |8 dy / (H - 1)|) / log2(8), v alike: Swin V2 (arXiv:2111.09883).

    H and W are those of the training grid, also on others: Swin's `pretrained_window_size`. Offsets run from n to i, as in
    Swin, so its weights fit. The cosine attention of Swin V2 is not part of it.
    """

    name = "log_cpb"
    Options = LogCPBOptions
    summary = "a network of the offset on a logarithmic scale, between 0 and 16 (Swin V2)"
    source = "arXiv:2111.09883"

    def table(self, grid: Grid, like: Tensor) -> Float[Tensor, "rows columns heads"]:
        axes = [-_offsets(length, like) * 8 / max(trained - 1, 1) for length, trained in zip(grid, self.grid, strict=True)]
        logarithms = [along.sign() * torch.log2(1 + along.abs()) / math.log2(8) for along in axes]
        return 16 * torch.sigmoid(self.network(_pairs(*logarithms)))


# --- FIRE ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FIREOptions:
    """`width`: of the hidden layer; `c`: how fast the logarithm bends at the start, log(1 + c distance)."""

    width: int = 32
    c: float = 0.1

    def __post_init__(self) -> None:
        _check_width("fire", self.width)
        check_positive("fire:c", self.c)


class FIRE(OffsetFunction):
    """b_in = f(u, v), u = sign(dy) log(1 + c |dy|) / log(1 + c max(L_y, H - 1)), v alike with W: FIRE (arXiv:2310.04418).

    FIRE is for text: the distance is divided by the largest that the query sees, and never by less than a learned L, so
    longer texts are interpolated. Here, ours, f takes the signed distances along both axes, the largest is that of the
    grid, and L is a learned multiple of the training size. c and the multiple are learned, one each.
    """

    name = "fire"
    Options = FIREOptions
    summary = "a network of the offset over the size of the grid, on a learned logarithmic scale (FIRE)"
    source = "arXiv:2310.04418, 2D here"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.c = nn.Parameter(torch.tensor([self.options.c]))
        self.threshold = nn.Parameter(torch.ones(1))  # L in training sizes

    def table(self, grid: Grid, like: Tensor) -> Float[Tensor, "rows columns heads"]:
        c, threshold = full_precision(self.c).abs(), full_precision(self.threshold).abs()
        axes = []
        for length, trained in zip(grid, self.grid, strict=True):
            offset, largest = -_offsets(length, like), torch.clamp(threshold * trained, min=length - 1)
            axes.append(offset.sign() * torch.log1p(c * offset.abs()) / (torch.log1p(c * largest) + EPSILON))
        return self.network(_pairs(*axes))
