"""The kinds of terms of an attention bias: how each is added to logits and differentiated without storing a copy of them.

A bias is a sum of terms. Every kind of term has four methods. `dense` returns the whole map, `add_to` adds some of its rows
to a block of logits in place, and `accumulate` computes the gradients of its tensors from the gradient of such a block. If
it is a dot product, `factors` returns its two sides, with which any fused attention kernel can compute it.

Axes: B images, h heads, N grid tokens, m rows (queries) of a block, S values in a position vector, r rank.
In blocks, images and heads are one axis C = B * h.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.grid import Grid, line_coordinate, line_length

Pair = tuple[Tensor, Tensor]
PLACE_AXES: tuple[Literal["y", "x"], ...] = ("y", "x")
BLOCK_ELEMENTS = 2**21  # of a map that is worked on at a time: 8 MB of float32, so that it stays in the cache


def is_traced() -> bool:
    """True while torch.compile, torch.export or torch.jit.trace builds a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclass(frozen=True)
class Matrix:
    """The map itself: (N, N), (h, N, N) or (B, h, N, N)."""

    values: Float[Tensor, "*batch_heads tokens tokens"]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def dense(self) -> Tensor:
        return self.values

    def scaled(self, scale: float | Tensor) -> Matrix:
        return Matrix(scale * self.values)

    def factors(self) -> Pair | None:
        return None

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        _by_image(logits, self.values).add_(self.values[..., rows, :])

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        target = grads[0][..., rows, :]
        target.add_(_by_image(grad, self.values).sum_to_size(target.shape))


@dataclass(frozen=True)
class Factors:
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
class Places:
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
        grid = self._grid()
        hot = [F.one_hot(line_coordinate(grid, a, self.by_row.device), line_length(grid, a)) for a in PLACE_AXES]
        return torch.cat(self.tensors(), dim=-1), torch.cat(hot, dim=-1).to(self.by_row.dtype)

    def _grid(self) -> Grid:
        return self.by_row.shape[-1], self.by_column.shape[-1]

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        image = logits.unflatten(-1, self._grid())  # (C, m, H, W)
        by_row, by_column = (_flat(side, len(logits))[:, rows] for side in self.tensors())
        image.add_(by_row[..., :, None]).add_(by_column[..., None, :])

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        image = grad.unflatten(-1, self._grid())
        for target, value in zip(grads, (image.sum(-1), image.sum(-2)), strict=True):
            target[..., rows, :].add_(_by_image(value, target))


@dataclass(frozen=True)
class Distances:
    """b_in = gain * sum over the vectors of ||s_i - s_n||_2, eq. 15 and 16 of arXiv:2505.09466; vectors (B, h, N, S).

    Squared distances are one matrix product, |s_i|^2 + |s_n|^2 - 2 s_i . s_n, of vectors whose mean has been taken away
    and with the norms made smaller by a few roundings: so in blocks, too, the diagonal and equal vectors come out as
    exactly 0, which a product alone would not give (up to 5e-3 in float32). Gradients need products only.
    """

    vectors: tuple[Float[Tensor, "*batch_heads tokens _"], ...]
    gain: float | Float[Tensor, "*heads 1 1"] = 1.0

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.vectors, self.gain) if isinstance(self.gain, Tensor) else self.vectors

    def dense(self) -> Tensor:
        if is_traced():
            total = functools.reduce(operator.add, [_traced_distances(vectors) for vectors in self.vectors])
        else:
            total = SumOfDistances.apply(*self.vectors)
        return total if isinstance(self.gain, float) and self.gain == 1.0 else self.gain * total

    def scaled(self, scale: float | Tensor) -> Distances:
        return Distances(self.vectors, scale * self.gain)

    def factors(self) -> Pair | None:
        return None

    @functools.cached_property
    def _sides(self) -> list[Sides]:
        return [Sides.of(vectors.detach().flatten(0, -3)) for vectors in self.vectors]

    def _gain(self, count: int) -> float | Tensor:
        """The gain, one for each image and head where it is learned: (C, 1, 1)."""
        gain = self.gain.detach() if isinstance(self.gain, Tensor) else self.gain
        return gain if isinstance(gain, float) else gain.expand(count // len(gain), -1, 1, 1).flatten(0, 1)

    def add_to(self, logits: Tensor, rows: slice, work: Tensor) -> None:
        gain = self._gain(len(logits))
        for sides in self._sides:
            distance = sides.distances(rows, work)
            if isinstance(gain, float):
                logits.add_(distance, alpha=gain)
            else:
                logits.addcmul_(distance, gain)

    def accumulate(self, grad: Tensor, rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        gain = self._gain(len(grad))
        if isinstance(gain, Tensor):
            for sides in self._sides:
                change = sides.distances(rows, work).mul_(grad).sum((-1, -2))  # (C,)
                grads[-1].add_(change.view(-1, len(grads[-1])).sum(0)[:, None, None])
        for sides, target in zip(self._sides, grads, strict=False):
            weights = sides.inverse_distances(rows, work).mul_(grad)
            sides.accumulate(weights, rows, target.flatten(0, -3), gain)


@dataclass(frozen=True)
class Sides:
    """The two sides of the product that gives squared distances, features first: queries^T keys, each (C, S + 2, N).

    Features first throughout: the thin products (S, N) times (N, N) are several times faster than (N, N) times (N, S).
    """

    queries: Tensor  # [-2 s, |s|^2, 1]
    keys: Tensor  # [s, 1, |s|^2]

    @classmethod
    def of(cls, vectors: Float[Tensor, "count tokens places"]) -> Sides:
        count, tokens, places = vectors.shape
        keys, queries = (vectors.new_ones(count, places + 2, tokens) for _ in range(2))
        s = keys[:, :places]
        s.copy_(vectors.transpose(1, 2)).sub_(vectors.mean(1).unsqueeze(2))  # distances ignore a common shift
        norm = s.square().sum(1) * (1 - 8 * torch.finfo(s.dtype).eps)
        keys[:, places + 1] = queries[:, places] = norm
        queries[:, :places].copy_(s).mul_(-2)
        return cls(queries, keys)

    def distances(self, rows: slice, work: Tensor | None = None) -> Float[Tensor, "count rows tokens"]:
        return torch.bmm(self.queries[:, :, rows].transpose(1, 2), self.keys, out=work).clamp_min_(0).sqrt_()

    def inverse_distances(self, rows: slice, work: Tensor | None = None) -> Float[Tensor, "count rows tokens"]:
        """1 / D, and 0 where D is 0."""
        squares = torch.bmm(self.queries[:, :, rows].transpose(1, 2), self.keys, out=work)
        return torch.threshold_(squares, 0.0, math.inf).rsqrt_()

    def accumulate(
        self, weights: Float[Tensor, "count rows tokens"], rows: slice, grad: Tensor, gain: float | Tensor = 1.0
    ) -> None:
        """Adds dL/ds to `grad`, (C, N, S), given w_in = dL/dD_in / D_in: ds_i = gain sum_n w_in (s_i - s_n), ds_n alike."""
        sides, grad = self.keys[:, :-1], grad.transpose(1, 2)  # [s, 1]: one product gives sum_n w_in s_n and sum_n w_in
        own = sides[:, :, rows]
        pairs = ((sides, own @ weights, grad), (own, sides @ weights.transpose(1, 2), grad[:, :, rows]))
        for side, sums, target in pairs:
            target.add_((side[:, :-1] * sums[:, -1:]).sub_(sums[:, :-1]).mul_(gain))


class SumOfDistances(torch.autograd.Function):
    """The sum of the distance maps of several sets of vectors, (..., N, S) each -> (..., N, N): the readable form.

    Forward sums squared differences one by one, so the map is exactly symmetric and equal vectors are exactly 0 apart.
    """

    @staticmethod
    def forward(*vectors: Tensor) -> Tensor:
        maps = [torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist") for v in vectors]
        return functools.reduce(operator.add, maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        saved = ctx.saved_tensors  # once: a checkpoint around the call allows no second look
        if torch.is_grad_enabled():
            return tuple(_differentiable_gradient(vectors, grad) for vectors in saved)
        grads = [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in saved]
        grad = grad.flatten(0, -3)
        for vectors, target in zip(saved, grads, strict=True):
            sides, flat = Sides.of(vectors.flatten(0, -3)), target.flatten(0, -3)
            for count, rows in blocks(*grad.shape):
                part = _part(sides, count)
                part.accumulate(part.inverse_distances(rows).mul_(grad[count, rows]), rows, flat[count])
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        changes = [_distance_tangent(v, t) for v, t in zip(ctx.saved_tensors, tangents, strict=True) if t is not None]
        return functools.reduce(operator.add, changes)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *vectors: Tensor) -> tuple[Tensor, int]:
        size = info.batch_size
        moved = [v.expand(size, *v.shape) if d is None else v.movedim(d, 0) for v, d in zip(vectors, in_dims, strict=True)]
        return SumOfDistances.apply(*moved), 0


def _squares(s: Float[Tensor, "*lead tokens places"]) -> Float[Tensor, "*lead tokens tokens"]:
    """The product of `Sides` in operations that every graph format has."""
    s = s - s.mean(-2, keepdim=True)
    norm = s.square().sum(-1, keepdim=True) * (1 - 8 * torch.finfo(s.dtype).eps)
    one = torch.ones_like(norm)
    return torch.cat([-2 * s, one, norm], dim=-1) @ torch.cat([s, norm, one], dim=-1).transpose(-1, -2)


def _traced_distances(s: Float[Tensor, "*lead tokens places"]) -> Float[Tensor, "*lead tokens tokens"]:
    """Distances by operations that compilers can differentiate and ONNX supports; gradient 0 where the distance is 0."""
    squares = _squares(s)
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def _differentiable_gradient(
    s: Float[Tensor, "*lead tokens places"], grad: Float[Tensor, "*lead tokens tokens"]
) -> Float[Tensor, "*lead tokens places"]:
    """dL/ds_i = sum_n (g_in + g_ni) (s_i - s_n) / D_in in operations that can be differentiated again; 0 where D_in is 0."""
    squares = _squares(s)
    apart = squares > 0
    inverse = torch.where(apart, torch.where(apart, squares, 1).rsqrt(), 0)
    weights = (grad + grad.transpose(-1, -2)) * inverse
    return weights.sum(-1, keepdim=True) * s - weights @ s


def _distance_tangent(s: Tensor, tangent: Tensor) -> Tensor:
    """(s_i - s_n) . (t_i - t_n) / D_in, 0 where D_in is 0."""
    own = (s * tangent).sum(-1)
    cross = s @ tangent.transpose(-1, -2)
    sides = Sides.of(s.flatten(0, -3))
    inverse = sides.inverse_distances(slice(None)).view_as(cross)
    return (own[..., :, None] + own[..., None, :] - cross - cross.transpose(-1, -2)) * inverse


def blocks(count: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """(maps, rows) slices that cover (count, rows, columns) in pieces of about BLOCK_ELEMENTS."""
    if rows * columns > BLOCK_ELEMENTS:
        step = max(1, BLOCK_ELEMENTS // columns)
        return [(slice(c, c + 1), slice(r, r + step)) for c in range(count) for r in range(0, rows, step)]
    step = BLOCK_ELEMENTS // (rows * columns)
    return [(slice(c, c + step), slice(None)) for c in range(0, count, step)]


def _part(sides: Sides, count: slice) -> Sides:
    return Sides(sides.queries[count], sides.keys[count])


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
