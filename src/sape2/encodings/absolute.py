"""Absolute encodings: one vector per grid place, added to the tokens once or before every block, or to keys in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts, TokenEncoding
from sape2.encodings.bias import AttentionBias, Factors, Places
from sape2.encodings.content import Content, Vectors
from sape2.encodings.grid import Grid, check_tokens, coordinates, is_symbolic
from sape2.encodings.options import check_positive
from sape2.encodings.precision import full_precision, no_autocast
from sape2.encodings.resample import Kernel, resample


def resampled(
    table: Float[Tensor, "tables height width channels"], grid: Grid, mode: Kernel = "bicubic"
) -> Float[Tensor, "tables rows columns channels"]:
    """Tables resampled as images to `grid`, with antialiasing as in timm; the very same table on its own grid."""
    if not is_symbolic(grid) and table.shape[1:3] == tuple(grid):
        return table
    images = full_precision(table).permute(0, 3, 1, 2)
    return resample(images, grid, mode, antialias=True).permute(0, 2, 3, 1)


# --- on the tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedAbsoluteOptions:
    """`resize`: how the table is resampled to another grid; `every_layer`: a table of its own before every block."""

    resize: Kernel = "bicubic"
    every_layer: bool = False


class LearnedAbsolute(TokenEncoding):
    """x_i + e[i], one learned vector per place of the training grid (ViT, arXiv:2010.11929); normal of std 0.02.

    On another grid the table is resampled as an image, from its own (H, W), never from a guessed square. With
    `every_layer` a model has one of these modules for every block, each added to the tokens that enter it: the control
    that tells whether a gain comes from meeting a table in every layer.
    """

    name = "ape"
    Options = LearnedAbsoluteOptions
    summary = "learned absolute table, resampled to other grids"
    source = "arXiv:2010.11929"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.every_layer = self.options.every_layer
        self.table = nn.Parameter(torch.empty(*self.grid, self.dim))  # (H, W, D)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(tokens, grid)
        return tokens + self.resampled(grid).flatten(0, 1).to(tokens.dtype)

    def resampled(self, grid: Grid) -> Float[Tensor, "height width dim"]:
        return resampled(self.table[None], grid, self.options.resize)[0]


@dataclass(frozen=True)
class SinCosOptions:
    """`temperature`: the longest wavelength is 2 pi times it."""

    temperature: float = 10_000.0

    def __post_init__(self) -> None:
        check_positive("sincos:temperature", self.temperature)


class SinCos(TokenEncoding):
    """x_i + [sin(x w), cos(x w), sin(y w), cos(y w)], fixed, w = temperature^(-f / (D/4)) (MoCo v3, arXiv:2104.02057)."""

    name = "sincos"
    Options = SinCosOptions
    summary = "fixed sine-cosine of x and y, any grid"
    source = "arXiv:1706.03762, 2D as in arXiv:2104.02057"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        if self.dim % 4:
            raise ValueError(f"sincos needs a width divisible by 4; got {self.dim}")

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(tokens, grid)
        return tokens + self.table(grid).to(tokens)

    def table(self, grid: Grid) -> Float[Tensor, "tokens dim"]:
        """All vectors, in float64 on the CPU."""
        frequencies, cpu = self.dim // 4, torch.device("cpu")
        omega = self.options.temperature ** (-torch.arange(frequencies, device=cpu).double() / frequencies)
        y, x = coordinates(grid, cpu).double().unbind(-1)
        angles = [x[:, None] * omega, y[:, None] * omega]
        return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)


# --- on the keys of every layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyTableOptions:
    """`by`: a vector for every row and one for every column, or one for every place; `to`: keys alone, or vectors of their
    own for queries, too; `heads`: vectors of its own for each head, or the same for all; `divide_bias`: by sqrt(d).
    """

    by: Literal["axis", "token"] = "axis"
    to: Literal["keys", "both"] = "keys"
    heads: Literal["each", "shared"] = "each"
    divide_bias: bool = True


class KeyTable(AttentionEncoding):
    """b_in = q_i^T e_n / sqrt(d), what a learned vector e_n of place n adds to the logits when it is added to the key.

    With to=both, (q_i + a_i)^T (k_n + e_n) takes the place of q_i^T k_n. By axis, e_n is the vector of n's row plus that
    of its column. The control of `sape2:readout=direct`: the query meets a table of places in every layer, and no gate
    counts. Vectors start as those of `ape`, normal of std 0.02, and are resampled like them on other grids.
    """

    name = "key_table"
    Options = KeyTableOptions
    summary = "a learned vector per row and column, or per place, added to the keys in every layer"
    source = "the control of SaPE2's read-out (ours)"
    variants: ClassVar[dict[str, str]] = {
        "by=token": "a vector for every place instead of its row and its column",
        "to=both": "vectors of their own for the queries, too",
        "heads=shared,divide_bias=false": "one table for all heads, read undivided, as in sape2:readout=direct",
    }
    facts = Facts(content_dependent=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        height, width = self.grid
        self.gives_key_vectors = self.options.to == "keys"
        tables = num_heads if self.options.heads == "each" else 1
        shapes = {"": (height, width)} if self.options.by == "token" else {"_y": (height, 1), "_x": (1, width)}
        for side in ("keys", "queries") if self.options.to == "both" else ("keys",):
            for axis, places in shapes.items():
                table = nn.Parameter(torch.empty(tables, *places, head_dim))  # (h or 1, rows, columns, d)
                self.register_parameter(side + axis, table)
                nn.init.trunc_normal_(table, std=0.02)

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        with no_autocast(q):
            scale = self._scale(q)
            terms = [self._met_by(scale * full_precision(q), grid)]
            if self.options.to == "both":
                terms.append(
                    Factors(scale * self._vectors("queries", grid), full_precision(content.k) + self._vectors("keys", grid))
                )
            return AttentionBias(*terms, dtype=q.dtype)

    def key_vectors(self, q: Vectors, grid: Grid) -> Float[Tensor, "*#heads tokens head_dim"]:
        return self._scale(q) * self._vectors("keys", grid)

    def _scale(self, q: Tensor) -> float:
        return q.shape[-1] ** -0.5 if self.options.divide_bias else 1.0

    def _met_by(self, q: Float[Tensor, "batch heads tokens head_dim"], grid: Grid) -> Factors | Places:
        """q_i^T e_n for all places n."""
        if self.options.by == "token":
            return Factors(q, self._vectors("keys", grid))
        rows, columns = (table.flatten(1, 2).transpose(-1, -2) for table in self._tables("keys", grid))
        return Places(q @ rows, q @ columns)

    def _vectors(self, side: str, grid: Grid) -> Float[Tensor, "tables tokens head_dim"]:
        """The vector of every place."""
        return reduce(torch.add, self._tables(side, grid)).expand(-1, *grid, -1).flatten(1, 2)

    def _tables(self, side: str, grid: Grid) -> list[Float[Tensor, "tables rows columns head_dim"]]:
        """One of (H, W) places, or one of (H, 1) and one of (1, W)."""
        height, width = grid
        if self.options.by == "token":
            return [resampled(full_precision(getattr(self, side)), grid)]
        along_y, along_x = (full_precision(getattr(self, f"{side}_{axis}")) for axis in "yx")
        return [resampled(along_y, (height, 1)), resampled(along_x, (1, width))]
