"""Fractional positions: sums of gates along a line, and tables read by interpolation between rows.

A line has S places (`length`); i, j, m are places within the line. Gates are g_ij, positions p_im.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Count = Literal["suffix", "prefix", "both", "between", "cyclic"]


def suffix_sum(gates: Float[Tensor, "*lead length length"]) -> Float[Tensor, "*lead length length"]:
    """p_im, the sum of the gates g_ij over the places j from m to the end of the line."""
    return gates.flip(-1).cumsum(-1).flip(-1)


def between_sum(gates: Float[Tensor, "*lead length length"]) -> Float[Tensor, "*lead length length"]:
    """p_im, the sum of the gates g_ij over the places j from i to m on either side, i itself left out, so p_ii = 0."""
    return gates.triu(1).cumsum(-1) + suffix_sum(gates.tril(-1))


def count_positions(gates: Float[Tensor, "*lead length length"], count: Count) -> Float[Tensor, "*lead length places"]:
    """Eq. 10: p_im, the sum of the gates g_ij over the patches j that lie

    suffix:  from m to the end of the line (the paper),
    prefix:  from the start of the line to m,
    both:    the suffix counts followed by the prefix counts (2S places),
    between: from i to m, i itself left out, so p_ii = 0,
    cyclic:  from i onwards to m, both included, going round at the end of the line.
    """
    if count == "suffix":
        return suffix_sum(gates)
    if count == "prefix":
        return gates.cumsum(-1)
    if count == "both":
        return torch.cat([suffix_sum(gates), gates.cumsum(-1)], dim=-1)
    if count == "between":
        return between_sum(gates)
    before = gates.tril(-1)  # j < i
    onwards = gates.triu()  # j >= i
    went_round = torch.ones_like(gates, dtype=torch.bool).tril(-1)  # m < i
    return torch.where(went_round, onwards.sum(-1, keepdim=True) + before.cumsum(-1), onwards.cumsum(-1))


class CountedVectors(torch.autograd.Function):
    """Computes interpolated products from the scores within lines in one step, with a hand-written gradient.

    g = sigmoid(scores), p_m = sum of g_j over j >= m (suffix) or j <= m (prefix), clamped to the last position, and
    `interpolate`. Places come first and tokens last: scores (B, h, S, N), products (B, h, P, N) -> (B, h, S, N).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, products: Tensor, suffix: bool, position_scale: float) -> Tensor:
        length, last = scores.shape[-2], products.shape[-2] - 1
        gates = torch.sigmoid(scores)
        counted = scores.new_full((length, length), position_scale)
        counted = counted.triu() if suffix else counted.tril()
        positions = counted @ gates
        inside = positions <= last if length * position_scale > last else None  # else no position can lie beyond
        low = positions.clamp_(max=last).floor().clamp_(max=last - 1)
        index, fraction = low.long().clamp_(0), positions.sub_(low)  # as in `interpolate`, for a NaN position
        slope = (products[..., 1:, :] - products[..., :-1, :]).gather(-2, index)
        values = products.gather(-2, index).addcmul_(fraction, slope)
        if inside is not None:
            slope.mul_(inside)
        ctx.save_for_backward(gates, counted, index, fraction, slope)
        ctx.num_positions = last + 1
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        gates, counted, index, fraction, slope = ctx.saved_tensors
        to_scores = torch.ops.aten.sigmoid_backward(counted.T @ (grad * slope), gates)
        upper = grad * fraction
        to_products = grad.new_zeros(*grad.shape[:-2], ctx.num_positions, grad.shape[-1])
        to_products.scatter_add_(-2, index, grad - upper).scatter_add_(-2, index + 1, upper)
        return to_scores, to_products, None, None


def interpolate(
    products: Float[Tensor, "*lead length positions"], positions: Float[Tensor, "*lead length places"]
) -> Float[Tensor, "*lead length places"]:
    """z_i at the fractional positions p_im, linear between floor(p) and the next integer, given z_i at all integers.

    Positions beyond the last one are clamped to it. At an exact integer the value is that of the floor/ceil form of
    CoPE and SaPE2; the gradient is the slope to the right rather than 0, so that saturated gates still learn.
    """
    last = products.shape[-1] - 1
    positions = positions.clamp(0, last)
    low = positions.detach().long().clamp(0, last - 1)  # the int clamp keeps a NaN position from indexing outside
    z_low, z_high = products.gather(-1, low), products.gather(-1, low + 1)
    return z_low + (positions - low) * (z_high - z_low)


def rescaling(trained: int, length: int, like: Tensor) -> float | Tensor:
    """min(1, trained / length), which maps longer lines onto the trained range; a tensor where a graph leaves lengths open."""
    if isinstance(length, int):
        return min(1.0, trained / length)
    return (trained / like.new_full((), length)).clamp_max(1)
