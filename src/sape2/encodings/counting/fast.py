"""Counting by products with triangles of ones, and reading with a gradient written by hand: for training on a CPU.

Both work places first, (..., S, N): lines are short and tokens many.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sape2.encodings.counting import readable
from sape2.encodings.counting.readable import Count, sides
from sape2.encodings.derivatives import differentiable_gradients, in_operations_backward
from sape2.encodings.precision import no_autocast


def count_positions(
    gates: Float[Tensor, "*lead tokens length"], count: Count, place: Int[Tensor, " tokens"]
) -> Float[Tensor, "*lead tokens places"]:
    """As `readable.count_positions`: p_i = M g_i, where M has a 1 for every gate that a place counts."""
    gates, length = gates.transpose(-2, -1), gates.shape[-1]
    upto = gates.new_ones(length, length).tril()
    if count in ("suffix", "prefix", "both"):
        parts = {"suffix": [upto.T], "prefix": [upto], "both": [upto.T, upto]}[count]
        return (torch.cat(parts) @ gates).transpose(-2, -1)
    after, before = (side.T for side in sides(length, place))  # (S, N)
    if count == "between":
        return (upto @ (gates * after) + upto.T @ (gates * before)).transpose(-2, -1)
    onwards = gates * ~before
    went_round = onwards.sum(-2, keepdim=True) + upto @ (gates * before)
    return torch.where(before, went_round, upto @ onwards).transpose(-2, -1)


def interpolate(
    products: Float[Tensor, "*lead tokens positions"], positions: Float[Tensor, "*lead tokens places"]
) -> Float[Tensor, "*lead tokens places"]:
    """As `readable.interpolate`."""
    return Interpolation.apply(products, positions)


class Interpolation(torch.autograd.Function):
    """`interpolate` with its gradient; one that is differentiated again is that of the readable form."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, positions: Tensor) -> Tensor:
        inputs, products, positions = (products, positions), products.transpose(-2, -1), positions.transpose(-2, -1)
        last = products.shape[-2] - 1
        clamped = positions.clamp(max=last)
        low = clamped.floor().clamp_(max=last - 1)
        index, fraction = low.long().clamp_(0), clamped.sub_(low)  # the int clamp is for a NaN position
        slope = products.diff(dim=-2).gather(-2, index)
        values = products.gather(-2, index).addcmul_(fraction, slope)
        slope.mul_(positions <= last)
        ctx.save_for_backward(*inputs, index, fraction, slope)
        return values.transpose(-2, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        *inputs, index, fraction, slope = ctx.saved_tensors
        with no_autocast(grad):
            if in_operations_backward(grad):
                return tuple(differentiable_gradients(readable.interpolate, inputs, ctx.needs_input_grad, grad))
            grad = grad.transpose(-2, -1)
            upper = grad * fraction
            to_products = grad.new_zeros(inputs[0].transpose(-2, -1).shape)
            to_products.scatter_add_(-2, index, grad - upper).scatter_add_(-2, index + 1, upper)
            return to_products.transpose(-2, -1), (grad * slope).transpose(-2, -1)
