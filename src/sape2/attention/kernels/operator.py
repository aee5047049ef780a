"""The kernels as custom operators of PyTorch, which `torch.compile` does not trace into and autograd can differentiate.

Kept for the backward pass are the inputs, the output and one logsumexp for each query. Axes as in `launch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sape2.attention.kernels import launch
from sape2.attention.kernels.readable import readable_attention


@torch.library.custom_op("sape2::distance_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], gain: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp to base 2)."""
    return launch.forward(q, k, v, vectors, gain, num_prefix, scale)


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], gain: Tensor, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    return launch.empty_outputs(q, v)


@torch.library.custom_op("sape2::distance_attention_gradients", mutates_args=())
def fused_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], gain: Tensor, num_prefix: int, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, the packed vectors, (B, h, A, N, S), and the gain."""
    return launch.backward(grad, q, k, v, vectors, gain, num_prefix, scale, out, lse)


@fused_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], gain: Tensor, num_prefix: int, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return *(torch.empty_like(t) for t in (q, k, v)), launch.empty_pack(vectors), torch.empty_like(gain)  # pyrefly: ignore


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, vectors, gain, ctx.num_prefix, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gain, *output, *vectors)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, gain, out, lse, *vectors = ctx.saved_tensors
    if torch.is_grad_enabled():  # gradients that shall be differentiated again
        dq, dk, dv, ds, dgain = _differentiable_gradients(grad, (q, k, v, gain, *vectors), ctx.num_prefix, ctx.scale)
    else:
        dq, dk, dv, packed, dgain = fused_gradients(grad, q, k, v, vectors, gain, ctx.num_prefix, ctx.scale, out, lse)
        ds = [packed[:, :, axis, :, : t.shape[-1]].to(t.dtype) for axis, t in enumerate(vectors)]
    return dq, dk, dv, ds, dgain, None, None


def _differentiable_gradients(grad: Tensor, inputs: tuple[Tensor, ...], num_prefix: int, scale: float) -> tuple[Any, ...]:
    """Differentiable gradients by the readable form, with whole maps; uses views, because inputs may depend on each other."""
    q, k, v, gain, *vectors = wanted = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
    output = readable_attention(q, k, v, tuple(vectors), gain, num_prefix, scale)
    dq, dk, dv, dgain, *ds = torch.autograd.grad(output, wanted, grad, create_graph=True)
    return dq, dk, dv, ds, dgain


fused_attention.register_autograd(_gradients, setup_context=_keep)
