"""Which way the products of attention are computed: the only place that decides. All ways agree to rounding.

fused:    PyTorch's scaled_dot_product_attention; biases that are dot products become further channels of q and k.
products: plain matrix products under autograd, the readable form and the one for tracing and forward-mode derivatives.
blocks:   the same products and their gradients by hand, block by block, so that no map outgrows the cache (`blocks`).

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sape2.encodings.base import AttentionEncoding, bias_of
from sape2.encodings.grid import Grid, num_prefix_tokens

Path = Literal["fused", "products", "blocks"]
KEPT_ELEMENTS = 2**25  # of softmax weights kept for the backward pass: 128 MB of float32; more is computed again


def choose_path(q: Tensor, encoding: AttentionEncoding, dropout: float = 0.0) -> Path:
    """How the products are computed; the only place that decides. All three agree to rounding.

    With a bias, on a CPU: blocks. On an accelerator a bias needs one map of all images and heads, so blocks only where
    that would take more than 4 GB of float32. Where a graph is traced, for functional and forward-mode derivatives,
    which need single differentiable operations, for dropout, and in replicas of `nn.DataParallel`, which name no
    parameters: products on a CPU, fused on an accelerator. So for an encoding that reads the block's input, which blocks
    do not hand on.
    Without a bias: fused, but on a CPU products up to 512 tokens, where the backward pass of the fused kernel is three to
    five times slower in bf16 (benchmarks/results/attention_path.md).
    """
    on_cpu = q.device.type in ("cpu", "meta")
    if not encoding.makes_bias:
        return "products" if on_cpu and q.shape[-2] <= 512 else "fused"
    traced = torch.compiler.is_compiling() or q.is_meta or _is_transformed(q)
    if traced or dropout or encoding.reads_tokens or _is_replica(encoding):
        return "products" if on_cpu else "fused"
    return "blocks" if on_cpu or map_elements(q) > 2**30 else "fused"


def describe_path(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding, tokens: Tensor | None = None
) -> str:
    """The path that `attend` takes for such tensors and what the bias is made of, for reports."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    with torch.no_grad():
        of_grid = None if tokens is None else tokens[:1, num_prefix:]
        bias = bias_of(encoding, q[:1, :, num_prefix:], k[:1, :, num_prefix:], grid, tokens=of_grid)
    terms = [] if bias is None else [type(term).__name__.lower() for term in bias.terms]
    path = choose_path(q, encoding)
    memory = [] if path != "blocks" else ["weights kept" if is_small(q) else "weights computed again"]
    return ", ".join([path, *terms, *memory])


def _is_transformed(q: Tensor) -> bool:
    """Inside torch.func (grad, vmap, jvp), or q carries a forward-mode tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(q).tangent is not None


def _is_replica(encoding: AttentionEncoding) -> bool:
    return bool(getattr(encoding, "_is_replica", False))


def is_small(q: Tensor) -> bool:
    return map_elements(q) <= KEPT_ELEMENTS


def map_elements(q: Tensor) -> int:
    batch, heads, tokens, _ = q.shape
    return batch * heads * tokens * tokens
