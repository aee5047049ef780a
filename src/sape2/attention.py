"""Multi-head attention with a position encoding: prefix tokens, scaling, and the way the products are computed.

Knows an encoding only by its two hooks (`encodings.base`). Axes: B batch, h heads, T = P + N tokens (P prefix tokens
first, then the N grid tokens in row-major order), d head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionBias, AttentionEncoding, NoEncoding
from sape2.grid import Grid, num_prefix_tokens

Path = Literal["fused", "fused_factored", "fused_matrix", "products"]


class Attention(nn.Module):
    """softmax((q k^T) / sqrt(d) + bias) v with learned projections; parameter names as in timm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        encoding: AttentionEncoding | None = None,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be divisible by the number of heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.encoding = encoding or NoEncoding()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.project(x)
        dropout = self.attention_dropout if self.training else 0.0
        output = attend(q, k, v, grid, self.encoding, dropout)  # (B, h, T, d)
        return self.dropout(self.proj(output.transpose(1, 2).flatten(2)))

    def project(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, h, T, d), unscaled."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def maps(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> dict[str, Tensor]:
        """The maps of the encoding and `attention`, the softmax weights, (B, h, T, T)."""
        q, k, _ = self.project(x)
        num_prefix = num_prefix_tokens(x.shape[1], grid)
        maps = self.encoding.maps(q[:, :, num_prefix:], k[:, :, num_prefix:], grid)
        q, k, bias = encode(q, k, grid, self.encoding)
        return maps | {"attention": logits(q, k, bias, num_prefix).softmax(-1)}


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention under an encoding; prefix tokens are neither rotated nor biased."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    q, k, bias = encode(q, k, grid, encoding)
    path = choose_path(q, bias, dropout)
    if path == "products":
        weights = F.dropout(logits(q, k, bias, num_prefix).softmax(-1), dropout)
        return weights.to(v.dtype) @ v
    if path == "fused_factored" and bias is not None and bias.factors is not None:
        return _attend_factored(q, k, v, bias.factors, num_prefix)
    mask = None if bias is None else pad_prefix(bias.dense(), num_prefix).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def choose_path(q: Tensor, bias: AttentionBias | None, dropout: float) -> Path:
    """How the products are computed; all ways agree to rounding. Measured in benchmarks/results/.

    fused:          no bias: the fused kernel.
    fused_factored: the bias is a dot product, so it becomes further channels of q and k and the kernel stays fused.
    fused_matrix:   the bias is an N x N map given to the kernel, which takes one without a gradient, or any off the CPU.
    products:       plain matrix products: on a CPU a map that needs a gradient leaves the fused kernel anyway.
    """
    if bias is None:
        return "fused"
    if bias.matrix is None and dropout == 0.0:
        return "fused_factored"
    needs_gradient = torch.is_grad_enabled() and bias.requires_grad
    return "products" if q.device.type == "cpu" and needs_gradient else "fused_matrix"


def encode(q: Tensor, k: Tensor, grid: Grid, encoding: AttentionEncoding) -> tuple[Tensor, Tensor, AttentionBias | None]:
    """Rotated q and k, and the bias of the grid tokens, made from q and k before rotation."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    if not num_prefix:
        return *encoding.rotate(q, k, grid), encoding.bias(q, k, grid)
    q_grid, k_grid = q[:, :, num_prefix:], k[:, :, num_prefix:]
    bias = encoding.bias(q_grid, k_grid, grid)
    rotated_q, rotated_k = encoding.rotate(q_grid, k_grid, grid)
    if rotated_q is not q_grid:
        q = torch.cat([q[:, :, :num_prefix], rotated_q], dim=-2)
        k = torch.cat([k[:, :, :num_prefix], rotated_k], dim=-2)
    return q, k, bias


def logits(q: Tensor, k: Tensor, bias: AttentionBias | None, num_prefix: int) -> Float[Tensor, "batch heads tokens tokens"]:
    """(q k^T) / sqrt(d) + bias."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores if bias is None else scores + pad_prefix(bias.dense(), num_prefix)


def pad_prefix(bias: Tensor, num_prefix: int) -> Tensor:
    """(..., N, N) -> (..., T, T): prefix tokens give and take no bias."""
    return F.pad(bias, (num_prefix, 0, num_prefix, 0)) if num_prefix else bias


def _attend_factored(q: Tensor, k: Tensor, v: Tensor, factors: tuple[Tensor, Tensor], num_prefix: int) -> Tensor:
    """q' = [q / sqrt(d), query_side], k' = [k, key_side]: the same logits as one product.

    v is padded with zeros to the width of q', because the fused kernels take equal widths only.
    """
    lead = q.shape[:-2]
    query_side, key_side = (F.pad(side.expand(*lead, *side.shape[-2:]), (0, 0, num_prefix, 0)).to(q.dtype) for side in factors)
    wide_q = torch.cat([q * q.shape[-1] ** -0.5, query_side], dim=-1)
    wide_k = torch.cat([k, key_side], dim=-1)
    width = max(wide_q.shape[-1], v.shape[-1])
    wide_q, wide_k, wide_v = (F.pad(t, (0, width - t.shape[-1])) for t in (wide_q, wide_k, v))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., : v.shape[-1]]
