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
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding
from sape2.encodings.bias import PLACE_AXES, AttentionBias, Factors, Matrix, Places
from sape2.encodings.content import Content, Vectors
from sape2.encodings.counting import as_length, form_for, readable, rescaled
from sape2.encodings.distances import Distances
from sape2.encodings.grid import Axis, Grid, from_lines, line_coordinate, line_length, num_tokens, to_lines
from sape2.encodings.precision import full_precision, no_autocast
from sape2.encodings.sape2_options import PRESETS, VARIANTS, SaPE2Options, facts_of

# --- the equations ---------------------------------------------------------------------------------------------------


def line_products(
    q: Float[Tensor, "*lead tokens head_dim"], k: Float[Tensor, "*lead tokens head_dim"], grid: Grid, axis: Axis
) -> Float[Tensor, "*lead tokens length"]:
    """q_i^T k_j for every token i and every place j of its own line."""
    if axis == "raster":
        return q @ k.transpose(-2, -1)
    lines = to_lines(k, grid, axis) @ to_lines(q, grid, axis).transpose(-2, -1)  # (..., lines, S of j, S of i)
    by_place = lines.transpose(-2, -3)
    return (by_place if axis == "x" else by_place.transpose(-2, -1)).flatten(-2).transpose(-2, -1)


def content_gates(
    products: Float[Tensor, "*lead tokens length"], scale: float | Float[Tensor, "heads 1 1"]
) -> Float[Tensor, "*lead tokens length"]:
    """Eq. 9: g_ij = sigmoid(scale * q_i^T k_j) for i, j in one line. App. D scales by 1/sqrt(d), eq. 9 by 1."""
    return torch.sigmoid(products if isinstance(scale, float) and scale == 1.0 else scale * products)


def table_products(
    vector: Float[Tensor, "*lead tokens head_dim"], table: Float[Tensor, "positions head_dim"]
) -> Float[Tensor, "*lead tokens positions"]:
    """Eq. 13: z_i[p] = v_i^T e[p] for every integer position p, where v is the query or the key.

    Eq. 10, 11 and 14, counting and reading between integers, are in `encodings.counting`.
    """
    return (table.expand(*vector.shape[:-2], -1, -1) @ vector.transpose(-2, -1)).transpose(
        -2, -1
    )  # one product for each head is faster than one of all


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


def direct_bias(vectors: dict[Axis, Tensor], grid: Grid, counts: int = 1) -> AttentionBias:
    """b_in = z^x_i[column of n] + z^y_i[row of n], the read-out of CoPE (arXiv:2405.18719) along two axes.

    Vectors have `counts` values for every place, two for count=both, which are added up.
    """
    values = {axis: z if counts == 1 else z.unflatten(-1, (counts, -1)).sum(-2) for axis, z in vectors.items()}
    if "raster" in values:
        return AttentionBias(Matrix(values["raster"]))
    some = next(iter(values.values()))
    lengths = {axis: line_length(grid, axis) for axis in PLACE_AXES}
    return AttentionBias(Places(*(values.get(axis, some.new_zeros(*some.shape[:-1], n)) for axis, n in lengths.items())))


# --- the encoding ----------------------------------------------------------------------------------------------------


class LineMaps(NamedTuple):
    """Gates, positions and vectors of one axis: (B, h, N, S), twice S positions and vectors for count=both."""

    gates: Tensor
    positions: Tensor
    vectors: Tensor


class SaPE2(AttentionEncoding):
    """Semantic-aware position bias: two patches are compared by the distance of what they see along their lines.

    One table per axis, (num_positions, head_dim), shared by the heads, truncated normal of std 0.02 (App. D). The
    default number of positions is max(H, W) + 1 of the training `grid`, which every count of the paper fits in.
    Options: `SaPE2Options`. Raises ValueError for an option that is unknown, out of range or without effect.
    """

    name = "sape2"
    Options = SaPE2Options
    summary = "semantic positions: gated counts along rows and columns, compared by distance"
    source = "arXiv:2505.09466"
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    variants: ClassVar[dict[str, str]] = VARIANTS

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.axes: tuple[Axis, ...] = ("x", "y") if self.options.axes == "xy" else (self.options.axes,)
        longest = num_tokens(self.grid) if self.options.axes == "raster" else max(self.grid)
        self.num_positions = self.options.num_positions or longest + 1
        self.score_axes = self.axes if self.options.gates == "content" else ()
        self.gives_key_vectors = self._counts_alike and self.options.readout == "direct" and self.options.dot == "query"
        for axis in self.axes:
            table = nn.Parameter(torch.empty(self.num_positions, head_dim))
            self.register_parameter(f"table_{axis}", table)
            nn.init.trunc_normal_(table, std=self.options.table_std)
        if self.options.gate_scale == "learned":
            self.gate_scale = nn.Parameter(torch.full((num_heads,), head_dim**-0.5))
        if self.options.sign == "learned":
            gain = 1.0 if self.options.gain_init is None else self.options.gain_init
            self.gain = nn.Parameter(torch.full((num_heads,), gain))
        self.facts = facts_of(self.options)
        self.register_load_state_dict_post_hook(_warn_if_dead)

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
        self._check_input(content.q)
        with no_autocast(content.q):
            full = content.in_full_precision()
            if self.options.gates == "content" or full.visible is not None:
                form = form_for(full.q, full.k, *self._tables())
                vectors = {axis: maps.vectors for axis, maps in self._line_maps(full, form).items()}
            else:  # the same numbers by one product for each axis
                vectors = {axis: self._met(self._vector(full), full.grid, axis) for axis in self.axes}
            return self._read_out(vectors, full.grid, content.q.dtype)

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        """gates_*, positions_*, vectors_* per axis, (B, h, N, S) (2S for count=both), and bias, (B, h, N, N)."""
        self._check_input(content.q)
        with no_autocast(content.q):
            lines = self._line_maps(content.in_full_precision(), readable)
            result = {f"{name}_{axis}": value for axis, maps in lines.items() for name, value in maps._asdict().items()}
            vectors = {axis: maps.vectors for axis, maps in lines.items()}
            return result | {"bias": self._read_out(vectors, content.grid, content.q.dtype).dense()}

    def key_vectors(self, q: Vectors, grid: Grid) -> Float[Tensor, "*#heads tokens head_dim"]:
        """e_n, the tables read at the column and the row of n, where every query counts alike."""
        self._check_input(q)
        total = q.new_zeros((), dtype=full_precision(q).dtype)
        for axis in self.axes:
            read = self._rows_met(grid, axis)[:, 0].unflatten(-1, (-1, line_length(grid, axis))).sum(-2)  # (d, S)
            total = total + read.T.index_select(0, line_coordinate(grid, axis, q.device))
        return self._bias_scale() * total  # (N, d) or, with a gain, (h, N, d)

    def check_trainable(self) -> None:
        """Raises ValueError if a table is all zero: then every distance and every gradient is 0, for ever."""
        for axis in self.axes:
            if not getattr(self, f"table_{axis}").any():
                raise ValueError(
                    f"sape2: table_{axis} is all zero, a dead point: every distance and every gradient is 0, so it never "
                    "trains. Initialise it (std 0.02); to start without effect use sign=learned,gain_init=0"
                )

    # --- steps -------------------------------------------------------------------------------------------------------

    def _check_input(self, q: Tensor) -> None:
        if q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            raise ValueError(
                f"this SaPE2 has num_heads={self.num_heads}, head_dim={self.head_dim}; got q of shape {tuple(q.shape)}"
            )
        if q.device.type == "cpu" and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_if_dead(self)

    def _tables(self) -> list[Tensor]:
        return [full_precision(getattr(self, f"table_{axis}")) for axis in self.axes]

    def _vector(self, content: Content) -> Tensor:
        return content.q if self.options.dot == "query" else content.k

    def _line_maps(self, content: Content, form: ModuleType) -> dict[Axis, LineMaps]:
        """Equations 9 to 14 along every axis; `form` counts and reads, see `sape2.encodings.counting`."""
        products = table_products(self._vector(content), torch.cat(self._tables()))  # of all axes at once
        result: dict[Axis, LineMaps] = {}
        for axis, of_axis in zip(self.axes, products.split(self.num_positions, dim=-1), strict=True):
            gates, seen, length = self._gates(content, axis), content.seen(axis), line_length(content.grid, axis)
            if seen is not None:
                gates, length = gates * seen.own, seen.places.sum(-1, keepdim=True)
            place = line_coordinate(content.grid, axis, gates.device)
            counted = form.count_positions(gates, self.options.count, place)
            positions = rescaled(counted, self.options.beyond, line_length(self.grid, axis), length)
            vectors = self._normalized(form.interpolate(of_axis, positions), length)
            if seen is not None:
                vectors = (vectors.unflatten(-1, (-1, gates.shape[-1])) * seen.places.unsqueeze(-2)).flatten(-2)
            result[axis] = LineMaps(gates, positions, vectors)
        return result

    def _gates(self, content: Content, axis: Axis) -> Float[Tensor, "batch heads tokens length"]:
        """Content gates, or what is left without content."""
        q, scale = content.q, self._gate_scale()
        if self.options.gates != "content":
            return q.new_full((1, 1, 1, 1), self._gate()).expand(*q.shape[:3], line_length(content.grid, axis))
        if axis not in content.scores:
            return content_gates(line_products(q, content.k, content.grid, axis), scale)
        return content_gates(content.scores[axis], 1.0 if self.options.gate_scale == "sqrt_dim" else scale * self.head_dim**0.5)

    def _gate(self) -> float:
        """A gate without content: sigmoid(0) = 1/2 (constant), or 1, plain counting (none)."""
        return 0.5 if self.options.gates == "constant" else 1.0

    def _gate_scale(self) -> float | Tensor:
        if self.options.gate_scale == "learned":
            return full_precision(self.gate_scale)[:, None, None]
        return self.head_dim**-0.5 if self.options.gate_scale == "sqrt_dim" else 1.0

    @property
    def _counts_alike(self) -> bool:
        """True if all patches of a line get the same positions: gates without content, counted from the ends of the line."""
        return self.options.gates != "content" and self.options.count in ("suffix", "prefix", "both")

    def _met(self, vector: Tensor, grid: Grid, axis: Axis) -> Float[Tensor, "batch heads tokens places"]:
        """The vectors of an axis whose gates have no content: v_i^T e at the positions that are the same for all lines."""
        rows = self._rows_met(grid, axis)
        if self._counts_alike:
            return vector @ rows[:, 0]
        return from_lines(torch.einsum("bhlsd,dsm->bhlsm", to_lines(vector, grid, axis), rows), axis)

    def _rows_met(self, grid: Grid, axis: Axis) -> Float[Tensor, "head_dim length places"]:
        """The table read at the positions that a patch at each place of a line gives to the others, without content.

        One place stands for all where they count alike.
        """
        table, length = full_precision(getattr(self, f"table_{axis}")), line_length(grid, axis)
        place = torch.arange(1 if self._counts_alike else length, device=table.device)
        gates = table.new_full((1, 1), self._gate()).expand(place.shape[0], length)
        counted = readable.count_positions(gates, self.options.count, place)
        positions = rescaled(counted, self.options.beyond, line_length(self.grid, axis), length)
        products = table.T[:, None].expand(-1, place.shape[0], -1)  # (d, S, P)
        return self._normalized(readable.interpolate(products, positions.expand(self.head_dim, -1, -1)), length)

    def _normalized(self, vectors: Tensor, length: int | Tensor) -> Tensor:
        """Divided by sqrt(S), if asked for; in a tensor where an export leaves S open, for none takes the root of a symbol."""
        if self.options.normalize == "none":
            return vectors
        return vectors / (math.sqrt(length) if isinstance(length, int) else as_length(length, vectors).clamp_min(1).sqrt())

    def _read_out(self, vectors: dict[Axis, Tensor], grid: Grid, dtype: torch.dtype) -> AttentionBias:
        """Eq. 15 (or another read-out), the sign and the division of eq. 16."""
        if self.options.readout == "distance":
            bias = distance_bias(vectors)
        elif self.options.readout == "squared_distance":
            bias = squared_distance_bias(vectors)
        else:
            bias = direct_bias(vectors, grid, counts=2 if self.options.count == "both" else 1)
        return AttentionBias(*bias.scaled(self._bias_scale()).terms, dtype=dtype)

    def _bias_scale(self) -> float | Tensor:
        divisor = math.sqrt(self.head_dim) if self.options.divide_bias else 1.0
        if self.options.sign == "learned":
            return full_precision(self.gain)[:, None, None] / divisor
        return (1.0 if self.options.sign == "plus" else -1.0) / divisor


def _warn_if_dead(encoding: Any, *_: Any) -> None:
    """Also the hook after a state dict was loaded."""
    try:
        encoding.check_trainable()
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
