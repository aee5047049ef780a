"""SaPE2, the 2D semantic-aware position encoding (arXiv:2505.09466), equations 9 to 15 in the paper's order.

All counts run along lines (see `sape2.encodings.grid`): for axis x the rows, for axis y the columns. In the shapes below
`lines` is the number of lines and `length` (S) the number of patches in one; i, j, m are places within a line,
n is any patch of the grid.

The paper's equations and the listing in its appendix D differ; `SaPE2.listing` (the default) uses scaled gates and
adds the bias undivided, `SaPE2.equations` uses unscaled gates and divides the bias by sqrt(d).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import MAX_POSITIONS, AttentionEncoding, Facts
from sape2.encodings.bias import PLACE_AXES, AttentionBias, Factors, Matrix, Places
from sape2.encodings.content import Content
from sape2.encodings.counting import Count, CountedVectors, count_positions, interpolate, rescaling
from sape2.encodings.distances import Distances
from sape2.encodings.grid import (
    Axis,
    Grid,
    check_grid,
    check_tokens,
    from_lines,
    line_coordinate,
    line_length,
    num_tokens,
    places_to_lines,
    to_lines,
)
from sape2.encodings.options import make_options
from sape2.encodings.precision import full_precision, no_autocast

PRESETS: dict[str, dict[str, Any]] = {"listing": {}, "equations": {"gate_scale": "none", "divide_bias": True}}


# --- the equations ---------------------------------------------------------------------------------------------------


def content_gates(
    q: Float[Tensor, "*lead length head_dim"], k: Float[Tensor, "*lead length head_dim"], scale: float | Tensor
) -> Float[Tensor, "*lead length length"]:
    """Eq. 9: g_ij = sigmoid(scale * q_i^T k_j) for i, j in one line. App. D scales by 1/sqrt(d), eq. 9 by 1."""
    return torch.sigmoid(scale * (q @ k.transpose(-1, -2)))


def table_products(
    vector: Float[Tensor, "*lead length head_dim"], table: Float[Tensor, "positions head_dim"]
) -> Float[Tensor, "*lead length positions"]:
    """Eq. 13: z_i[p] = v_i^T e[p] for every integer position p, where v is the query or the key.

    Eq. 11 and 14, the same at fractional positions, is `encodings.counting.interpolate`.
    """
    return vector @ table.transpose(-1, -2)


def distance_bias(vectors: dict[Axis, Tensor]) -> AttentionBias:
    """Eq. 15: b_in = sum over the axes of ||s_i - s_n||_2."""
    return AttentionBias(Distances(tuple(vectors.values())))


def squared_distance_bias(vectors: dict[Axis, Tensor]) -> AttentionBias:
    """b_in = sum over the axes of ||s_i - s_n||^2 = [-2 s_i, 1, ||s_i||^2] . [s_n, ||s_n||^2, 1], so it factors.

    The row constant ||s_i||^2 is kept: prefix tokens have bias 0, so it does not drop out of the softmax.
    """
    s = torch.cat(list(vectors.values()), dim=-1)
    s = s - s.mean(-2, keepdim=True)  # distances ignore a common shift; smaller norms round less
    norm = (s * s).sum(-1, keepdim=True)
    one = torch.ones_like(norm)
    return AttentionBias(Factors(torch.cat([-2 * s, one, norm], dim=-1), torch.cat([s, norm, one], dim=-1)))


def direct_bias(vectors: dict[Axis, Tensor], grid: Grid) -> AttentionBias:
    """b_in = z^x_i[column of n] + z^y_i[row of n], the read-out of CoPE (arXiv:2405.18719) along two axes."""
    values = {}
    for axis, z in vectors.items():
        values[axis] = z.unflatten(-1, (-1, line_length(grid, axis))).sum(-2)  # `both` has two values for every place
    if "raster" in values:
        return AttentionBias(Matrix(values["raster"]))
    some = next(iter(values.values()))
    lengths = {axis: line_length(grid, axis) for axis in PLACE_AXES}
    return AttentionBias(Places(*(values.get(axis, some.new_zeros(*some.shape[:-1], n)) for axis, n in lengths.items())))


# --- the encoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaPE2Options:
    """Every switch; the first value of each is the paper's listing (App. D). What each is for: docs/method.md."""

    dot: Literal["query", "key"] = "query"
    gates: Literal["content", "constant", "none"] = "content"
    gate_scale: Literal["sqrt_dim", "none", "learned"] = "sqrt_dim"
    count: Count = "suffix"
    axes: Literal["xy", "x", "y", "raster"] = "xy"
    readout: Literal["distance", "squared_distance", "direct"] = "distance"
    sign: Literal["plus", "minus", "learned"] = "plus"
    divide_bias: bool = False
    normalize: Literal["none", "sqrt_length"] = "none"
    num_positions: int | None = None
    beyond: Literal["clamp", "rescale"] = "clamp"
    gain_init: float | None = None
    table_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_positions is not None and not 2 <= self.num_positions <= MAX_POSITIONS:
            wanted = f"at least 2, to interpolate between, and at most {MAX_POSITIONS}"
            raise ValueError(f"sape2:num_positions must be {wanted}; got {str(self.num_positions)[:50]}")
        if not self.table_std > 0:
            raise ValueError(
                f"sape2:table_std must be above 0: an all-zero table makes every distance and every gradient 0 and "
                f"never trains; got {self.table_std}. To start without effect use sign=learned,gain_init=0"
            )
        if self.gain_init is not None and self.sign != "learned":
            raise ValueError(f"sape2:gain_init needs sign=learned; with sign={self.sign} there is no gain to set")
        if self.gates != "content" and self.gate_scale == "learned":
            raise ValueError(f"sape2:gate_scale=learned has no effect with gates={self.gates}")


def _facts(o: SaPE2Options) -> Facts:
    """The symmetries of a count, by the patches it depends on: a whole line, the part to one end of it, or only i to n."""
    static, direct, raster = o.gates != "content", o.readout == "direct", o.axes == "raster"
    if static and not direct and o.count in ("suffix", "prefix", "both"):  # P2: every i counts the same
        return Facts(True, True, True, True, True, True)
    offset_only = (o.count == "between" and not raster) or (static and o.count in ("between", "cyclic"))
    return Facts(
        content_dependent=True,
        translation=(direct and offset_only) or (static and o.count == "cyclic"),
        row_permutation=o.axes == "x",  # P4: whole rows may be permuted for b^x, whole columns for b^y
        column_permutation=o.axes == "y",
        circular_shift=o.count == "cyclic" and not raster,  # P10
        flip=o.count in ("both", "between") and not raster,  # a flip only swaps what the two ends count
    )


class LineMaps(NamedTuple):
    """Gates (.., S, S), positions (.., S, S or 2S) and vectors (.., S, S or 2S) of one axis, each (B, h, lines, ..)."""

    gates: Tensor
    positions: Tensor
    vectors: Tensor


class SaPE2(AttentionEncoding):
    """Semantic-aware position bias: two patches are compared by the distance of what they see along their lines.

    One table per axis, (num_positions, head_dim), shared by the heads, truncated normal of std 0.02 (App. D). The
    default number of positions is max(H, W) + 1 of the training `grid`, which every count of the paper fits in.
    Options: `SaPE2Options`. Raises ValueError for an option that is unknown, out of range or without effect.
    """

    Options = SaPE2Options
    summary = "semantic positions: gated counts along rows and columns, compared by distance"
    source = "arXiv:2505.09466"
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    variants: ClassVar[dict[str, str]] = {
        "preset=equations": "unscaled gates, bias divided by sqrt(d): eq. 9 and 16 instead of the listing of App. D",
        "dot=key": "the key meets the table instead of the query: SaPE2(K) in the text of the paper",
        "num_positions=10": "ten positions on every grid: the development code, clamps long counts",
        "gate_scale=learned": "one learned gate scale per head, between eq. 9 and App. D",
        "gates=constant": "every gate 1/2: what is left without content (ablation)",
        "gates=none": "every gate 1, plain counting (ablation)",
        "gates=none,count=between,readout=direct": "no gates at all: contextual relative columns and rows (ablation)",
        "axes=x": "rows only (ablation of the 2D decomposition)",
        "axes=y": "columns only (ablation of the 2D decomposition)",
        "axes=raster": "one line through the whole image, as in CoPE (ablation of the 2D decomposition)",
        "count=prefix": "counts from the start of the line to the patch (ablation)",
        "count=both": "counts from both ends, exact under flips (ours)",
        "count=between": "counts from the patch itself to the other, either way (ours, after CoPE)",
        "count=cyclic": "counts that go round at the end of the line, exact under circular shifts (ours)",
        "readout=squared_distance": "squared distances, a dot product: no N x N map (ours)",
        "readout=direct": "z_i at the column and row of the other patch, a dot product: CoPE's read-out on two axes (ours)",
        "readout=direct,count=between": "CoPE carried to two axes, exact under translation (ours)",
        "sign=minus": "similar patches attend to each other: the prose instead of eq. 16",
        "sign=learned": "one learned gain per head decides (ours)",
        "normalize=sqrt_length": "vectors divided by the root of the line length, so that larger grids are not sharper (ours)",
    }

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, preset: str = "listing", **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        if preset not in PRESETS:
            raise ValueError(f"sape2:preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        self.options = make_options(SaPE2Options, "sape2", PRESETS[preset] | options, "preset")
        self.num_heads, self.head_dim, self.grid = num_heads, head_dim, check_grid(grid)
        self.axes: tuple[Axis, ...] = ("x", "y") if self.options.axes == "xy" else (self.options.axes,)
        longest = num_tokens(grid) if self.options.axes == "raster" else max(grid)
        self.num_positions = self.options.num_positions or longest + 1
        self.score_axes = self.axes if self.options.gates == "content" else ()
        for axis in self.axes:
            table = nn.Parameter(torch.empty(self.num_positions, head_dim))
            self.register_parameter(f"table_{axis}", table)
            nn.init.trunc_normal_(table, std=self.options.table_std)
        if self.options.gate_scale == "learned":
            self.gate_scale = nn.Parameter(torch.full((num_heads,), head_dim**-0.5))
        if self.options.sign == "learned":
            gain = 1.0 if self.options.gain_init is None else self.options.gain_init
            self.gain = nn.Parameter(torch.full((num_heads,), gain))
        self.facts = _facts(self.options)
        self.register_load_state_dict_post_hook(_warn_after_loading)

    @classmethod
    def listing(cls, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> SaPE2:
        """The preset of App. D: gates on scaled logits, bias added undivided."""
        return cls(num_heads, head_dim, grid, preset="listing", **options)

    @classmethod
    def equations(cls, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> SaPE2:
        """The preset of eq. 9 and 16: gates on unscaled logits, bias divided by sqrt(d)."""
        return cls(num_heads, head_dim, grid, preset="equations", **options)

    # --- hooks -------------------------------------------------------------------------------------------------------

    def make_bias(self, content: Content) -> AttentionBias:
        """The bias of every pair in logits, float32 or better inside."""
        q, k, grid, scores = content.q, content.k, content.grid, content.scores
        self._check_input(q, grid)
        with no_autocast(q):
            q_full, k_full = full_precision(q), full_precision(k)
            if self._counts_alike:  # the same numbers as `_all_lines`, by one product for each axis
                vector = q_full if self.options.dot == "query" else k_full
                return self._read_out({axis: vector @ self._read_alike(grid, axis) for axis in self.axes}, grid, q.dtype)
            if scores and self.options.count in ("suffix", "prefix"):
                return self._read_out(self._counted_vectors(q_full, k_full, grid, scores), grid, q.dtype)
            lines = self._all_lines(q_full, k_full, grid, scores)
            return self._read_out({axis: from_lines(maps.vectors, axis) for axis, maps in lines.items()}, grid, q.dtype)

    def key_vectors(
        self, q: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> Float[Tensor, "*#heads tokens head_dim"] | None:
        """e_n, the tables read at the column and the row of n, if every query counts alike and the bias is q_i . e_n."""
        if not (self._counts_alike and self.options.readout == "direct" and self.options.dot == "query"):
            return None
        self._check_input(q, grid)
        total = q.new_zeros((), dtype=full_precision(q).dtype)
        for axis in self.axes:
            read = self._read_alike(grid, axis).unflatten(-1, (-1, line_length(grid, axis))).sum(-2)  # (d, S)
            total = total + read.index_select(-1, line_coordinate(grid, axis, q.device))
        return self._bias_scale() * total.T  # (N, d) or, with a gain, (h, N, d)

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        """gates_*, positions_*, vectors_* per axis, (B, h, N, S) (2S for count=both), and bias, (B, h, N, N)."""
        q, k, grid = content.q, content.k, content.grid
        self._check_input(q, grid)
        result: dict[str, Tensor] = {}
        with no_autocast(q):
            lines = self._all_lines(full_precision(q), full_precision(k), grid)
            for axis, maps in lines.items():
                for name, value in maps._asdict().items():
                    result[f"{name}_{axis}"] = from_lines(value, axis)
            vectors: dict[Axis, Tensor] = {axis: result[f"vectors_{axis}"] for axis in self.axes}
            result["bias"] = self._read_out(vectors, grid, q.dtype).dense()
        return result

    def check_trainable(self) -> None:
        """Raises ValueError if a table is all zero: then every distance and every gradient is 0, for ever."""
        for axis in self.axes:
            if not getattr(self, f"table_{axis}").any():
                raise ValueError(
                    f"sape2: table_{axis} is all zero, a dead point: every distance and every gradient is 0, so it never "
                    "trains. Initialise it (std 0.02); to start without effect use sign=learned,gain_init=0"
                )

    # --- steps -------------------------------------------------------------------------------------------------------

    def _check_input(self, q: Tensor, grid: Grid) -> None:
        check_tokens(q, check_grid(grid))
        if q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            raise ValueError(
                f"this SaPE2 has num_heads={self.num_heads}, head_dim={self.head_dim}; got q of shape {tuple(q.shape)}"
            )
        if q.device.type == "cpu" and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_if_dead(self)

    def _all_lines(self, q: Tensor, k: Tensor, grid: Grid, scores: Mapping[Axis, Tensor] | None = None) -> dict[Axis, LineMaps]:
        """Equations 9 to 14 along every axis; `scores` are the products q.k / sqrt(d) within lines, if they are known."""
        vector = q if self.options.dot == "query" else k
        tables = torch.cat([full_precision(getattr(self, f"table_{axis}")) for axis in self.axes])
        products = table_products(vector, tables).split(self.num_positions, dim=-1)  # of all axes at once, (B, h, N, P)
        result: dict[Axis, LineMaps] = {}
        for axis, of_axis in zip(self.axes, products, strict=True):
            gates = self._gates(q, k, grid, axis, scores)
            positions = count_positions(gates, self.options.count) * self._position_scale(grid, axis, q)
            vectors = self._normalized(interpolate(to_lines(of_axis, grid, axis), positions), grid, axis)
            result[axis] = LineMaps(gates, positions, vectors)
        return result

    @property
    def _counts_alike(self) -> bool:
        """True if all patches of a line get the same positions: gates without content, counted from the ends of the line."""
        return self.options.gates != "content" and self.options.count in ("suffix", "prefix", "both")

    def _read_alike(self, grid: Grid, axis: Axis) -> Float[Tensor, "head_dim places"]:
        """The table at the positions of a line whose gates have no content: the vectors that z_im is the product with."""
        table = full_precision(getattr(self, f"table_{axis}"))
        length = line_length(grid, axis)
        positions = count_positions(table.new_full((1, length), self._gate()), self.options.count)
        read = interpolate(table.T, (positions * self._position_scale(grid, axis, table)).expand(self.head_dim, -1))
        return self._normalized(read, grid, axis)

    def _counted_vectors(self, q: Tensor, k: Tensor, grid: Grid, scores: Mapping[Axis, Tensor]) -> dict[Axis, Tensor]:
        """The vectors of all axes, (B, h, N, S), from scores that are known: the same numbers as `_all_lines`, faster."""
        vector = q if self.options.dot == "query" else k
        tables = torch.cat([full_precision(getattr(self, f"table_{axis}")) for axis in self.axes])
        tables = tables.expand(*vector.shape[:2], -1, -1)  # one product for each head is faster than one of all tokens
        products = (tables @ vector.transpose(-1, -2)).split(self.num_positions, dim=-2)  # (B, h, P, N) for each axis
        result: dict[Axis, Tensor] = {}
        for axis, of_axis in zip(self.axes, products, strict=True):
            scale: Any = self._position_scale(grid, axis, q)
            of_line = self._relative(scores[axis].flatten(-2))
            vectors = CountedVectors.apply(of_line, of_axis, self.options.count == "suffix", scale).transpose(-1, -2)
            result[axis] = self._normalized(vectors, grid, axis)
        return result

    def _normalized(self, vectors: Tensor, grid: Grid, axis: Axis) -> Tensor:
        """Divided by sqrt(S), if asked for; in a tensor where an export leaves S open, for none takes the root of a symbol."""
        if self.options.normalize == "none":
            return vectors
        length = line_length(grid, axis)
        return vectors / (math.sqrt(length) if isinstance(length, int) else vectors.new_full((), length).sqrt())

    def _relative(self, scores: Tensor) -> Tensor:
        """Scores, which are divided by sqrt(d), as the gates scale them."""
        if self.options.gate_scale == "sqrt_dim":
            return scores
        scale = self._gate_scale()
        scale = scale.view(-1, *[1] * (scores.dim() - 2)) if isinstance(scale, Tensor) else scale
        return scale * self.head_dim**0.5 * scores

    def _gates(
        self, q: Tensor, k: Tensor, grid: Grid, axis: Axis, scores: Mapping[Axis, Tensor] | None
    ) -> Float[Tensor, "batch heads lines length length"]:
        """Content gates, or what is left without content."""
        if self.options.gates != "content":
            lines, length = num_tokens(grid) // line_length(grid, axis), line_length(grid, axis)
            return q.new_full((1, 1), self._gate()).expand(*q.shape[:2], lines, length, length)
        if not scores:
            return content_gates(to_lines(q, grid, axis), to_lines(k, grid, axis), self._gate_scale())
        return torch.sigmoid(self._relative(places_to_lines(scores[axis], axis)))

    def _gate(self) -> float:
        """A gate without content: sigmoid(0) = 1/2 (constant), or 1, plain counting (none)."""
        return 0.5 if self.options.gates == "constant" else 1.0

    def _gate_scale(self) -> float | Tensor:
        if self.options.gate_scale == "learned":
            return full_precision(self.gate_scale)[:, None, None, None]
        return self.head_dim**-0.5 if self.options.gate_scale == "sqrt_dim" else 1.0

    def _position_scale(self, grid: Grid, axis: Axis, like: Tensor) -> float | Tensor:
        """Rule for lines longer than in training: clamp leaves positions alone, rescale maps them onto the trained range."""
        clamp = self.options.beyond == "clamp"
        return 1.0 if clamp else rescaling(line_length(self.grid, axis), line_length(grid, axis), like)

    def _read_out(self, vectors: dict[Axis, Tensor], grid: Grid, dtype: torch.dtype) -> AttentionBias:
        """Eq. 15 (or another read-out), the sign and the division of eq. 16."""
        if self.options.readout == "distance":
            bias = distance_bias(vectors)
        elif self.options.readout == "squared_distance":
            bias = squared_distance_bias(vectors)
        else:
            bias = direct_bias(vectors, grid)
        return AttentionBias(*bias.scaled(self._bias_scale()).terms, dtype=dtype)

    def _bias_scale(self) -> float | Tensor:
        divisor = math.sqrt(self.head_dim) if self.options.divide_bias else 1.0
        if self.options.sign == "learned":
            return full_precision(self.gain)[:, None, None] / divisor
        return (1.0 if self.options.sign == "plus" else -1.0) / divisor


def _warn_if_dead(encoding: SaPE2) -> None:
    try:
        encoding.check_trainable()
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)


def _warn_after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, SaPE2):
        _warn_if_dead(module)
