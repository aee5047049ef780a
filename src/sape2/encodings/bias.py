"""A bias of attention, a sum of terms, and the kinds of terms; distances, the last kind, are in `distances`.

Axes: B images, h heads, N grid tokens, m rows (queries) of a block, r rank.
In blocks, images and heads are one axis C = B * h.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.grid import Grid, line_coordinate, line_length
from sape2.encodings.precision import no_autocast

Pair = tuple[Tensor, Tensor]
PLACE_AXES: tuple[Literal["y", "x"], ...] = ("y", "x")


class Term:
    """What a bias is a sum of: added to logits, and differentiated, without a copy of the map in memory."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the term is made of."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The whole map, under autograd."""
        raise NotImplementedError

    def scaled(self, scale: float | Tensor) -> Term:
        raise NotImplementedError

    def factors(self) -> Pair | None:
        """The two sides, if the term is a dot product: with them any fused attention kernel can compute it."""
        return None

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        """Adds some rows of the map to a block of logits, (C, m, N), in place; `work` is space in its shape."""
        raise NotImplementedError

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        """Adds to `grads`, in the order of `tensors()`, what the gradient of a block of logits gives."""
        raise NotImplementedError


class AttentionBias:
    """A bias in logits, added after the 1/sqrt(d) scale: a sum of terms, see `sape2.encodings.bias` for the kinds.

    `AttentionBias(Matrix(b))` is a map that is there already; the other kinds need no N x N map in memory.
    """

    def __init__(self, *terms: Term, dtype: torch.dtype | None = None) -> None:
        if not terms:
            raise ValueError("an AttentionBias needs at least one term")
        self.terms, self.dtype = terms, dtype

    def dense(self) -> Float[Tensor, "*batch_heads tokens tokens"]:
        """The whole bias as one map, in `dtype` if one was given, else as precise as its terms."""
        with no_autocast(self.tensors()[0]):
            total = functools.reduce(operator.add, [term.dense() for term in self.terms])
        return total if self.dtype is None else total.to(self.dtype)

    def __add__(self, other: AttentionBias) -> AttentionBias:
        return AttentionBias(*self.terms, *other.terms, dtype=self.dtype or other.dtype)

    def scaled(self, scale: float | Tensor) -> AttentionBias:
        """`scale` times the bias; a tensor must broadcast against both a map and its rows, (h, 1, 1) for one per head."""
        if isinstance(scale, float) and scale == 1.0:
            return self
        return AttentionBias(*(term.scaled(scale) for term in self.terms), dtype=self.dtype)

    def tensors(self) -> list[Tensor]:
        """The tensors of all terms, in the order of the terms."""
        return [tensor for term in self.terms for tensor in term.tensors()]

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """(query_side, key_side), (..., N, r), of all terms that are dot products; None if none is."""
        pairs = [term.factors() for term in self.terms]  # torch.compile cannot trace a walrus in a comprehension
        given = [pair for pair in pairs if pair is not None]
        return (_concatenate([p[0] for p in given]), _concatenate([p[1] for p in given])) if given else None

    def unfactored(self) -> AttentionBias | None:
        """The terms that are no dot products; None if all are."""
        rest = [term for term in self.terms if term.factors() is None]
        return AttentionBias(*rest, dtype=self.dtype) if rest else None

    def add_to(self, logits: Float[Tensor, "count rows tokens"], rows: slice, work: Tensor) -> None:
        """Adds some rows of the bias to a block of logits, in place; `work` is space in its shape."""
        for term in self.terms:
            term.add_to(logits, rows, work)

    def accumulate(self, grad: Float[Tensor, "count rows tokens"], rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        """Adds to `grads`, in the order of `tensors()`, what the gradient of a block of logits gives."""
        start = 0
        for term in self.terms:
            count = len(term.tensors())
            term.accumulate(grad, rows, grads[start : start + count], work)
            start += count


def _concatenate(sides: list[Tensor]) -> Tensor:
    lead = torch.broadcast_shapes(*(side.shape[:-1] for side in sides))
    return torch.cat([side.expand(*lead, side.shape[-1]) for side in sides], dim=-1)


@dataclass(frozen=True)
class Matrix(Term):
    """The map itself: (N, N), (h, N, N) or (B, h, N, N)."""

    values: Float[Tensor, "*batch_heads tokens tokens"]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def dense(self) -> Tensor:
        return self.values

    def scaled(self, scale: float | Tensor) -> Matrix:
        return Matrix(scale * self.values)

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        _by_image(logits, self.values).add_(self.values[..., rows, :])

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        target = grads[0][..., rows, :]
        target.add_(_by_image(grad, self.values).sum_to_size(target.shape))


@dataclass(frozen=True)
class Factors(Term):
    """b_in = query_side_i . key_side_n, sides (..., N, r)."""

    query_side: Float[Tensor, "*#batch_heads tokens rank"]
    key_side: Float[Tensor, "*#batch_heads tokens rank"]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query_side, self.key_side

    def dense(self) -> Tensor:
        return self.query_side @ self.key_side.transpose(-1, -2)

    def scaled(self, scale: float | Tensor) -> Factors:
        return Factors(scale * self.query_side, self.key_side)

    def factors(self) -> Pair | None:
        return self.query_side, self.key_side

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        query_side, key_side = (_flat(side, len(logits)) for side in self.tensors())
        logits.baddbmm_(query_side[:, rows], key_side.transpose(1, 2))

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        query_side, key_side = (_flat(side, len(grad)) for side in self.tensors())
        to_queries = (key_side.transpose(1, 2) @ grad.transpose(1, 2)).transpose(1, 2)  # features first: see Sides
        to_keys = (query_side[:, rows].transpose(1, 2) @ grad).transpose(1, 2)
        for target, value in ((grads[0][..., rows, :], to_queries), (grads[1], to_keys)):
            target.add_(_by_image(value, target).sum_to_size(target.shape))


@dataclass(frozen=True)
class Places(Term):
    """b_in = by_row_i[row of n] + by_column_i[column of n]: (B, h, N, H) and (B, h, N, W), as in MViTv2, SAM and 2D CoPE."""

    by_row: Float[Tensor, "*batch_heads tokens height"]
    by_column: Float[Tensor, "*batch_heads tokens width"]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.by_row, self.by_column

    def dense(self) -> Tensor:
        return (self.by_row[..., :, None] + self.by_column[..., None, :]).flatten(-2)

    def scaled(self, scale: float | Tensor) -> Places:
        return Places(scale * self.by_row, scale * self.by_column)

    def factors(self) -> Pair | None:
        """The bias as a dot product with one-hot vectors of the key's row and column."""
        return torch.cat(self.tensors(), dim=-1), self._hot()

    def _hot(self) -> Float[Tensor, "tokens places"]:
        grid: Grid = self.by_row.shape[-1], self.by_column.shape[-1]
        hot = [F.one_hot(line_coordinate(grid, a, self.by_row.device), line_length(grid, a)) for a in PLACE_AXES]
        return torch.cat(hot, dim=-1).to(self.by_row.dtype)

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        sides = torch.cat([_flat(side, len(logits))[:, rows] for side in self.tensors()], dim=-1)
        logits.add_(torch.bmm(sides, self._hot().T.expand(len(logits), -1, -1), out=work))

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        sums = self._hot().T.expand(len(grad), -1, -1) @ grad.transpose(-2, -1)  # (C, H + W, m), in one pass over the map
        for target, value in zip(
            grads, sums.transpose(-2, -1).split([side.shape[-1] for side in self.tensors()], dim=-1), strict=True
        ):
            target[..., rows, :].add_(_by_image(value, target))


def _flat(side: Tensor, count: int) -> Tensor:
    """(..., N, r) expanded to (C, N, r)."""
    if side.dim() == 4 and math.prod(side.shape[:2]) == count:
        return side.detach().flatten(0, 1)
    heads = side.shape[-3] if side.dim() > 2 else 1
    return side.detach().expand(count // heads, heads, *side.shape[-2:]).flatten(0, 1)


def _by_image(flat: Tensor, like: Tensor) -> Tensor:
    """(C, m, n) seen as (B, h, m, n), where h is that of `like`."""
    heads = like.shape[-3] if like.dim() > 2 else 1
    return flat.unflatten(0, (-1, heads))
