"""Relative encodings: a bias that depends on the offset (dy, dx) from query patch i to key patch n.

`rpe` reads a number per head and offset from a table. `rpe_contextual` reads a vector, whose dot product with the query is
the bias; `rpe_decomposed` does so with one vector per row offset and one per column offset. `alibi` has no table: its bias
is a slope times the distance.
Tables cover the offsets of the training grid, -(H - 1)..H - 1 by -(W - 1)..W - 1. The option
`beyond` decides for other grids: clamp takes the nearest offset that the table has; resize resamples the table to the
offsets of the new grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import PLACE_AXES, AttentionBias, Matrix, Places
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, from_lines, is_symbolic, line_length, num_offsets, offset_index, offsets, to_lines
from sape2.encodings.precision import full_precision, no_autocast
from sape2.encodings.resample import resample

Beyond = Literal["resize", "clamp"]


def resized(table: Float[Tensor, "channels rows columns"], grid: Grid) -> Float[Tensor, "channels new_rows new_columns"]:
    """The table resampled as an image to the offsets of `grid`, bicubic, as Swin's own code does for other windows.

    timm's `resize_rel_pos_bias_table`, which its Swin uses, is another rule: it spaces the offsets geometrically.
    """
    if not is_symbolic(grid) and table.shape[-2:] == num_offsets(grid):
        return table
    return resample(table, num_offsets(grid), "bicubic", antialias=False)


# --- one number per head and offset ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelativeTableOptions:
    """`beyond`: the rule for other grids; resize is what the source does."""

    beyond: Beyond = "resize"


class RelativeTable(AttentionEncoding):
    """b_in = table[head, dy, dx]: the bias table of Swin (arXiv:2103.14030), here over the whole grid as one window.

    `table` is (h, 2H - 1, 2W - 1), truncated normal of std 0.02. Offsets run from i to n; Swin's run from n to i, so
    its table is ours turned by half a turn.
    """

    name = "rpe"
    Options = RelativeTableOptions
    summary = "a learned number per head and offset (Swin)"
    source = "arXiv:2103.14030"
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.table = nn.Parameter(torch.empty(num_heads, *num_offsets(self.grid)))
        nn.init.trunc_normal_(self.table, std=0.02)

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        table = full_precision(self.table)
        if self.options.beyond == "resize":
            table = resized(table, grid)
        index = offset_index(grid, table.shape[1], table.shape[2], q.device)
        return AttentionBias(Matrix(table.flatten(1)[:, index]), dtype=q.dtype)  # (h, N, N)


# --- one vector per offset -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelativeContextualOptions:
    """`heads`: one table for all heads or one each; `divide_bias`: by sqrt(d), as the logits; `beyond`: for other grids."""

    heads: Literal["shared", "each"] = "shared"
    divide_bias: bool = True
    beyond: Beyond = "clamp"


class RelativeContextual(AttentionEncoding):
    """b_in = q_i^T e[dy, dx] / sqrt(d): iRPE on keys, contextual mode, "product" offsets (arXiv:2107.14222).

    iRPE scales q before both products, so its bias is divided by sqrt(d) with the logits (Shaw, arXiv:1803.02155, too).
    It maps far offsets to shared buckets; here every offset has its own row and, as in Shaw, offsets beyond the table
    take its last one. `table` is (1 or h, 2H - 1, 2W - 1, d), zero at the start as in iRPE, shared by the heads as in
    its published "product" models.
    """

    name = "rpe_contextual"
    Options = RelativeContextualOptions
    summary = "query times a learned vector per offset (iRPE product, Shaw)"
    source = "arXiv:2107.14222, arXiv:1803.02155"
    facts = Facts(content_dependent=True, translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        tables = 1 if self.options.heads == "shared" else num_heads
        self.table = nn.Parameter(torch.zeros(tables, *num_offsets(self.grid), head_dim))

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        with no_autocast(q):
            table = self._table(grid)  # (1 or h, rows, columns, d)
            products = full_precision(q) @ table.flatten(1, 2).transpose(-1, -2)  # (B, h, N, offsets)
            index = offset_index(grid, table.shape[1], table.shape[2], q.device)
            bias = products.gather(-1, index.expand(*q.shape[:2], -1, -1))  # (B, h, N, N)
            divisor = math.sqrt(q.shape[-1]) if self.options.divide_bias else 1.0
            return AttentionBias(Matrix(bias / divisor), dtype=q.dtype)

    def _table(self, grid: Grid) -> Float[Tensor, "tables rows columns head_dim"]:
        table = full_precision(self.table)
        if self.options.beyond == "clamp":
            return table
        images = table.permute(0, 3, 1, 2)  # (tables, d, rows, columns)
        return torch.stack([resized(image, grid) for image in images]).permute(0, 2, 3, 1)


# --- one vector per row offset, one per column offset ----------------------------------------------------------------


@dataclass(frozen=True)
class RelativeDecomposedOptions:
    """`beyond`: the rule for other grids; resize, linear, is what the source does."""

    beyond: Beyond = "resize"


class RelativeDecomposed(AttentionEncoding):
    """b_in = q_i^T R_y[dy] + q_i^T R_x[dx], not divided by sqrt(d): MViTv2 (arXiv:2112.01526), SAM (arXiv:2304.02643).

    It is a value per query and row plus a value per query and column (`sape2.encodings.bias.Places`), so it needs no map.
    Tables are (2H - 1, d) and (2W - 1, d), shared by the heads, zero at the start as in SAM; theirs run from n to i,
    so they are ours upside down.
    """

    name = "rpe_decomposed"
    Options = RelativeDecomposedOptions
    summary = "query times a vector per row offset and one per column offset (MViTv2, SAM)"
    source = "arXiv:2112.01526, arXiv:2304.02643"
    facts = Facts(content_dependent=True, translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        rows, columns = num_offsets(self.grid)
        self.table_y = nn.Parameter(torch.zeros(rows, head_dim))
        self.table_x = nn.Parameter(torch.zeros(columns, head_dim))

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        with no_autocast(q):
            return AttentionBias(Places(*(self._values(full_precision(q), axis, grid) for axis in PLACE_AXES)), dtype=q.dtype)

    def _values(self, q: Tensor, axis: Literal["x", "y"], grid: Grid) -> Float[Tensor, "batch heads tokens length"]:
        """q_i^T R[m - s] for the place s of i in its line and every place m."""
        lines = to_lines(q, grid, axis)  # (B, h, lines, S, d)
        return from_lines(torch.einsum("bhlsd,smd->bhlsm", lines, self._vectors(axis, grid)), axis)

    def _vectors(self, axis: Literal["x", "y"], grid: Grid) -> Float[Tensor, "length length head_dim"]:
        """R[m - s] for the places s and m of a line."""
        table = full_precision(getattr(self, f"table_{axis}"))
        length = line_length(grid, axis)
        if self.options.beyond == "resize" and (is_symbolic(grid) or len(table) != 2 * length - 1):
            table = resample(table.T[:, None], (1, 2 * length - 1), "bilinear", antialias=False)[:, 0].T
        place = torch.arange(length, device=table.device)
        last = table.shape[0] // 2
        return table[(place[None] - place[:, None]).clamp(-last, last) + last]


# --- no table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ALiBiOptions:
    """`metric`: the distance between two patches; `slopes`: as the source has them, or learned from there."""

    metric: Literal["euclidean", "manhattan"] = "euclidean"
    slopes: Literal["fixed", "learned"] = "fixed"


class ALiBi(AttentionEncoding):
    """b_in = -slope_head * distance(i, n): ALiBi (arXiv:2108.12409) with the distance of the plane, in patches.

    Slopes are ALiBi's, a geometric sequence 2^(-8/h), 2^(-16/h), ... for h a power of two (else: `alibi_slopes`). ALiBi
    fixes them; learned ones are free, so a head may come to prefer what is far.
    """

    name = "alibi"
    Options = ALiBiOptions
    summary = "a slope per head times the distance in the plane"
    source = "arXiv:2108.12409, 2D here"
    facts = Facts(translation=True, flip=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        if self.options.slopes == "learned":
            self.slopes = nn.Parameter(alibi_slopes(num_heads, torch.zeros(())))

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        like = full_precision(q)
        learned = self.options.slopes == "learned"
        slopes = full_precision(self.slopes) if learned else alibi_slopes(self.num_heads, like)
        distance = self._distance(grid, like)
        return AttentionBias(Matrix(-slopes[:, None, None] * distance), dtype=q.dtype)  # (h, N, N)

    def _distance(self, grid: Grid, like: Tensor) -> Float[Tensor, "tokens tokens"]:
        step = offsets(grid, like.device).to(like.dtype)
        return step.abs().sum(-1) if self.options.metric == "manhattan" else step.square().sum(-1).sqrt()


def alibi_slopes(num_heads: int, like: Tensor) -> Float[Tensor, " heads"]:
    """2^(-8 m / h) for m = 1 to h. If h is no power of two: those of the power p below, then every second one of 2 p."""
    power = 2 ** int(math.log2(num_heads))
    own = torch.arange(1, power + 1, device=like.device) * (8 / power)
    between = torch.arange(1, 2 * (num_heads - power) + 1, 2, device=like.device) * (4 / power)
    return torch.exp2(-torch.cat([own, between]).to(like.dtype))
