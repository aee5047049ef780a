"""Distances between the vectors of all pairs of patches: the only place where one is squared, rooted and differentiated.

Squared distances are one matrix product, |s_i|^2 + |s_n|^2 - 2 s_i . s_n, of vectors whose mean has been taken away and with
the norms made smaller by a few roundings (`Sides`): so the diagonal and equal vectors come out as exactly 0, which a product
alone would not give (up to 5e-3 in float32). The gradient of a root is 0 where the distance is 0.

Axes: B images, h heads, N grid tokens, m rows (queries) of a block, S values in a position vector.
In blocks, images and heads are one axis C = B * h.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.bias import Term
from sape2.encodings.derivatives import by_hand, differentiable_gradients, in_operations_backward

BLOCK_ELEMENTS = 2**21  # of a map that is worked on at a time: 8 MB of float32, so that it stays in the cache


@dataclass(frozen=True)
class Distances(Term):
    """b_in = gain * sum over the vectors of ||s_i - s_n||_2, eq. 15 and 16 of arXiv:2505.09466; vectors (B, h, N, S)."""

    vectors: tuple[Float[Tensor, "*batch_heads tokens _"], ...]
    gain: float | Float[Tensor, "*heads 1 1"] = 1.0

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.vectors, self.gain) if isinstance(self.gain, Tensor) else self.vectors

    def dense(self) -> Tensor:
        total = SumOfDistances.apply(*self.vectors) if by_hand(*self.vectors) else _sum_in_operations(*self.vectors)
        return total if isinstance(self.gain, float) and self.gain == 1.0 else self.gain * total

    def scaled(self, scale: float | Tensor) -> Distances:
        return Distances(self.vectors, scale * self.gain)

    @functools.cached_property
    def _sides(self) -> list[Sides]:
        return [Sides.of(vectors.detach().flatten(0, -3)) for vectors in self.vectors]

    def _gain(self, count: int) -> float | Tensor:
        """The gain, one for each image and head where it is learned: (C, 1, 1)."""
        if isinstance(self.gain, float):
            return self.gain
        return self.gain.detach().expand(count // len(self.gain), -1, 1, 1).flatten(0, 1)

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
    """The two sides of the product that gives squared distances, features first: queries^T keys, each (..., S + 2, N).

    Features first throughout: the thin products (S, N) times (N, N) are several times faster than (N, N) times (N, S).
    """

    queries: Tensor  # [-2 s, |s|^2, 1]
    keys: Tensor  # [s, 1, |s|^2]

    @classmethod
    def of(cls, vectors: Float[Tensor, "*lead tokens places"]) -> Sides:
        s = (vectors - vectors.mean(-2, keepdim=True)).transpose(-1, -2).contiguous()  # distances ignore a common shift
        norm = s.square().sum(-2, keepdim=True) * (1 - 8 * torch.finfo(s.dtype).eps)
        one = torch.ones_like(norm)
        return cls(torch.cat([-2 * s, norm, one], dim=-2), torch.cat([s, one, norm], dim=-2))

    def squares(self, rows: slice = slice(None), out: Tensor | None = None) -> Float[Tensor, "*lead rows tokens"]:
        """Squared distances of some rows, those that are 0 up to rounding not above 0."""
        return torch.matmul(self.queries[..., rows].transpose(-1, -2), self.keys, out=out)

    def distances(self, rows: slice, work: Tensor) -> Float[Tensor, "count rows tokens"]:
        return self.squares(rows, work).clamp_min_(0).sqrt_()

    def inverse_distances(self, rows: slice, work: Tensor | None = None) -> Float[Tensor, "count rows tokens"]:
        """1 / D, and 0 where D is 0."""
        return torch.threshold_(self.squares(rows, work), 0.0, math.inf).rsqrt_()

    def accumulate(
        self, weights: Float[Tensor, "count rows tokens"], rows: slice, grad: Tensor, gain: float | Tensor = 1.0
    ) -> None:
        """Adds dL/ds to `grad`, (C, N, S), given w_in = dL/dD_in / D_in: ds_i = gain sum_n w_in (s_i - s_n), ds_n alike."""
        sides, grad = self.keys[:, :-1], grad.transpose(1, 2)  # [s, 1]: one product gives sum_n w_in s_n and sum_n w_in
        own = sides[:, :, rows]
        pairs = ((sides, own @ weights, grad), (own, sides @ weights.transpose(1, 2), grad[:, :, rows]))
        for side, sums, target in pairs:
            target.add_((side[:, :-1] * sums[:, -1:]).sub_(sums[:, :-1]).mul_(gain))


def in_operations(vectors: Float[Tensor, "*lead tokens places"]) -> Float[Tensor, "*lead tokens tokens"]:
    """Distances by operations that every graph format has and that can be differentiated any number of times."""
    squares = Sides.of(vectors).squares()
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def _sum_in_operations(*vectors: Tensor) -> Tensor:
    return functools.reduce(operator.add, map(in_operations, vectors))


class SumOfDistances(torch.autograd.Function):
    """The sum of the distance maps of several sets of vectors, (..., N, S) each -> (..., N, N): the readable form.

    Forward sums squared differences one by one, so the map is exactly symmetric and equal vectors are exactly 0 apart.
    """

    @staticmethod
    def forward(ctx: Any, *vectors: Tensor) -> Tensor:
        ctx.save_for_backward(*vectors)
        maps = [torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist") for v in vectors]
        return functools.reduce(operator.add, maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        saved = ctx.saved_tensors  # once: a checkpoint around the call allows no second look
        if in_operations_backward(grad):
            return tuple(differentiable_gradients(_sum_in_operations, saved, ctx.needs_input_grad, grad))
        grads = [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in saved]
        grad = grad.flatten(0, -3)
        for vectors, target in zip(saved, grads, strict=True):
            sides, flat = Sides.of(vectors.flatten(0, -3)), target.flatten(0, -3)
            for count, rows in blocks(*grad.shape):
                part = Sides(sides.queries[count], sides.keys[count])
                part.accumulate(part.inverse_distances(rows).mul_(grad[count, rows]), rows, flat[count])
        return tuple(grads)


def blocks(count: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """(maps, rows) slices that cover (count, rows, columns) in pieces of about BLOCK_ELEMENTS."""
    if rows * columns > BLOCK_ELEMENTS:
        step = max(1, BLOCK_ELEMENTS // columns)
        return [(slice(c, c + 1), slice(r, r + step)) for c in range(count) for r in range(0, rows, step)]
    step = BLOCK_ELEMENTS // (rows * columns)
    return [(slice(c, c + step), slice(None)) for c in range(0, count, step)]
