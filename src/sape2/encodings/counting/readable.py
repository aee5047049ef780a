"""Counting and reading as the paper has them: running sums and interpolation, under autograd."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Count = Literal["suffix", "prefix", "both", "between", "cyclic"]


def count_positions(
    gates: Float[Tensor, "*lead tokens length"], count: Count, place: Int[Tensor, " tokens"]
) -> Float[Tensor, "*lead tokens places"]:
    """Eq. 10: p_im, the sum of the gates g_ij over the patches j that lie

    suffix:  from m to the end of the line (the paper),
    prefix:  from the start of the line to m,
    both:    the suffix counts followed by the prefix counts (2S places),
    between: from i to m, i itself left out, so p_ii = 0,
    cyclic:  from i onwards to m, both included, going round at the end of the line.

    `place` is that of every token i in its line.
    """
    if count == "suffix":
        return _suffix_sum(gates)
    if count == "prefix":
        return gates.cumsum(-1)
    if count == "both":
        return torch.cat([_suffix_sum(gates), gates.cumsum(-1)], dim=-1)
    after, before = sides(gates.shape[-1], place)
    if count == "between":
        return (gates * after).cumsum(-1) + _suffix_sum(gates * before)
    onwards = gates * ~before
    went_round = onwards.sum(-1, keepdim=True) + (gates * before).cumsum(-1)
    return torch.where(before, went_round, onwards.cumsum(-1))


def sides(length: int, place: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
    """(after, before), (N, S) each: which places of its line lie after a token, and which before it."""
    places = torch.arange(length, device=place.device)
    return places > place[:, None], places < place[:, None]


def _suffix_sum(gates: Float[Tensor, "*lead length"]) -> Float[Tensor, "*lead length"]:
    return gates.flip(-1).cumsum(-1).flip(-1)


def interpolate(
    products: Float[Tensor, "*lead tokens positions"], positions: Float[Tensor, "*lead tokens places"]
) -> Float[Tensor, "*lead tokens places"]:
    """Eq. 11 and 14: z_i at the fractional positions p_im, linear between floor(p) and the next integer, given all integers.

    Positions beyond the last one are clamped to it. At an exact integer the value is that of the floor/ceil form of
    CoPE and SaPE2; the gradient is the slope to the right rather than 0, so that saturated gates still learn.
    """
    last = products.shape[-1] - 1
    positions = positions.clamp(0, last)
    low = positions.detach().long().clamp(0, last - 1)  # the int clamp keeps a NaN position from indexing outside
    z_low, z_high = products.gather(-1, low), products.gather(-1, low + 1)
    return z_low + (positions - low) * (z_high - z_low)
