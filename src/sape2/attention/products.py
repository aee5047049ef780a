"""The products of attention under autograd, as plain matrix products or by PyTorch's fused kernel.

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.base import AttentionEncoding
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid


def logits(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
    tokens: Float[Tensor, "batch tokens dim"] | None = None,
) -> Float[Tensor, "batch heads tokens tokens"]:
    """q k^T / sqrt(d) + bias, both rotated, the bias on grid tokens only."""
    return scores_with(*encode(q, k, grid, encoding, tokens))


def scores_with(
    q: Tensor, k: Tensor, bias: AttentionBias | None, scale: float | None = None
) -> Float[Tensor, "batch heads tokens tokens"]:
    """scale q k^T + bias, of q and k that are rotated already; `scale` is 1 / sqrt(d) unless given."""
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    return scores if bias is None else scores + _padded(bias.dense(), q.shape[-2]).to(scores.dtype)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias | None, dropout: float, scale: float | None = None
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Biases that are dot products become further channels, q' = [scale q, query_side], k' = [k, key_side].

    q and k are rotated already; `scale` is 1 / sqrt(d) unless given.
    """
    q, mask = q * (scale or q.shape[-1] ** -0.5), None
    if bias is not None:
        q, k = (widened(t, side) for t, side in zip((q, k), bias.factored() or (None, None), strict=True))
        rest = bias.unfactored()
        mask = None if rest is None else _padded(rest.dense(), q.shape[-2]).to(q.dtype)
    width = fused_width(q.shape[-1], v.shape[-1], q.device)  # zeros change nothing
    wide_q, wide_k, wide_v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    output = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return output[..., : v.shape[-1]]


def fused_width(width: int, value_width: int, device: torch.device) -> int:
    """The width that the fused kernels take: one for q, k and v, and on an accelerator a multiple of 8."""
    width = max(width, value_width)
    return width if device.type in ("cpu", "meta") else -(-width // 8) * 8


def encode(
    q: Tensor, k: Tensor, grid: Grid, encoding: AttentionEncoding, tokens: Tensor | None = None, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor, AttentionBias | None]:
    """(q, k, bias): grid tokens of q and k rotated, the bias of grid tokens, which sees them before.

    `vectors`, key vectors of parts of the encoding, are added to the keys and are not in the bias; there are no prefix tokens.
    """
    bias = encoding.make_bias(Content.of_grid(q, k, grid, tokens, joined=vectors is not None))
    if vectors is None:
        return *encoding.rotate_all(q, k, grid), bias
    return q, k + for_keys(vectors, k), bias


def for_keys(vectors: Float[Tensor, "*#heads tokens head_dim"], k: Tensor) -> Tensor:
    """sqrt(d) e_n, in the dtype of the keys: q_i . (k_n + sqrt(d) e_n) / sqrt(d) = (q_i . k_n) / sqrt(d) + q_i . e_n."""
    return (k.shape[-1] ** 0.5 * vectors).to(k.dtype)


def _padded(matrix: Tensor, tokens: int) -> Tensor:
    """The map of all tokens: prefix tokens, which come first, get 0."""
    num_prefix = tokens - matrix.shape[-1]
    return F.pad(matrix, (num_prefix, 0, num_prefix, 0)) if num_prefix else matrix


def widened(tokens: Tensor, side: Tensor | None) -> Tensor:
    """One side of a factored bias as further channels; prefix tokens get zeros."""
    if side is None:
        return tokens
    num_prefix = tokens.shape[-2] - side.shape[-2]
    side = F.pad(side.expand(*tokens.shape[:-2], *side.shape[-2:]), (0, 0, num_prefix, 0))
    return torch.cat([tokens, side.to(tokens.dtype)], dim=-1)
