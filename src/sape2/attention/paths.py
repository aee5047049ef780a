"""Chooses how the products of attention are computed; no other file decides. All ways agree up to rounding.

fused:    PyTorch's scaled_dot_product_attention; biases that are dot products become further channels of q and k.
triton:   our kernels for biases with distances on CUDA devices, which store no map (`kernels`, docs/gpu.md).
products: plain matrix products under autograd, the readable form and the one for tracing and forward-mode derivatives.
blocks:   the same products with hand-written gradients, block by block, so that no map outgrows the cache (`blocks`).

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sape2.attention.products import fused_width
from sape2.encodings.base import AttentionEncoding, NoEncoding
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content
from sape2.encodings.derivatives import is_transformed
from sape2.encodings.grid import Grid, num_prefix_tokens

Path = Literal["fused", "triton", "products", "blocks"]
KEPT_ELEMENTS = 2**25  # of softmax weights kept for the backward pass: 128 MB of float32; more is computed again


def choose_path(q: Tensor, encoding: AttentionEncoding, dropout: float = 0.0, bias: AttentionBias | None = None) -> Path:
    """The first of the ways above that such tensors, bias and call allow.

    With a bias, on a CPU: blocks. On an accelerator the choice depends on the terms of the bias, so attention computes the
    bias first and passes it: triton for distances that the kernels support; fused without a map for dot products alone; for
    anything else fused with one map of all images and heads, or blocks where that would take more than 4 GB of float32.
    Products on a CPU and fused on an accelerator are also used where blocks cannot be: in an exported or traced graph, for
    functional and forward-mode derivatives (which need single differentiable operations), with dropout, in replicas of
    `nn.DataParallel` (which name no parameters), and for encodings that read the block's input.
    Without a bias: fused, but on a CPU products up to 512 tokens, where the backward pass of the fused kernel is three to
    five times slower in bf16 (benchmarks/results/attention_path.md).
    """
    on_cpu = is_on_cpu(q)
    if not encoding.makes_bias:
        return "products" if on_cpu and q.shape[-2] <= 512 else "fused"
    plain: Path = "products" if on_cpu else "fused"
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or q.is_meta or is_transformed(q) or dropout:
        return plain
    if not on_cpu and bias is not None:
        if bias.unfactored() is None:
            return "fused"
        if _kernels_take(q, bias):
            return "triton"
    if torch.compiler.is_compiling() or encoding.reads_tokens or getattr(encoding, "_is_replica", False):
        return plain
    return "blocks" if on_cpu or map_elements(q) > 2**30 else "fused"


def is_on_cpu(q: Tensor) -> bool:
    return q.device.type in ("cpu", "meta")


def _kernels_take(q: Tensor, bias: AttentionBias) -> bool:
    from sape2.attention.kernels import takes  # only here, where there is a device for them

    return takes(q, bias)


def describe_path(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding, tokens: Tensor | None = None
) -> str:
    """The path that `attend` takes for such tensors and what the bias is made of, for reports."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    with torch.no_grad():
        if encoding.gives_key_vectors:
            rotated = encoding.rotate_all(q, k, grid)
            how = "added to keys" if rotated[0] is q and rotated[1] is k else "channels beside the keys"
            return f"{choose_path(k, NoEncoding())}, {how}"
        joined = adds_to_keys(encoding, num_prefix)
        bias = encoding.make_bias(Content.of_grid(q[:1], k[:1], grid, None if tokens is None else tokens[:1], joined))
    path = choose_path(q, encoding, bias=bias)
    if bias is None:
        return path
    terms = [type(term).__name__.lower() for term in bias.terms]
    return ", ".join([path, *terms, *_memory(path, q, v, bias), *(["added to keys"] if joined else [])])


def adds_to_keys(encoding: AttentionEncoding, num_prefix: int) -> bool:
    """Whether key vectors of some parts are added to the keys beside the bias of others. Not with prefix tokens."""
    return encoding.gives_some_key_vectors and not num_prefix


def _memory(path: Path, q: Tensor, v: Tensor, bias: AttentionBias) -> list[str]:
    """Describes what a path stores because of the bias."""
    if path == "blocks":
        return ["weights kept" if is_small(q) else "weights computed again"]
    if path != "fused":
        return []
    sides = bias.factored()
    width = None if sides is None else fused_width(q.shape[-1] + sides[0].shape[-1], v.shape[-1], q.device)
    channels = [] if width is None else [f"{width} channels"]
    return channels if bias.unfactored() is None else [*channels, "a map as mask"]


def is_small(q: Tensor) -> bool:
    return map_elements(q) <= KEPT_ELEMENTS


def map_elements(q: Tensor) -> int:
    batch, heads, tokens, _ = q.shape
    return batch * heads * tokens * tokens
