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

from sape2.encodings.base import AttentionEncoding, NoEncoding
from sape2.grid import Grid, num_prefix_tokens

Path = Literal["fused", "products"]


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
        return maps | {"attention": logits(*encode(q, k, grid, self.encoding)).softmax(-1)}


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention under an encoding; prefix tokens are neither rotated nor biased."""
    q, k, matrix = encode(q, k, grid, encoding)
    if choose_path(q, matrix) == "products":
        weights = F.dropout(logits(q, k, matrix).softmax(-1), dropout)
        return weights.to(v.dtype) @ v
    width = max(q.shape[-1], v.shape[-1])  # the fused kernels take equal widths only; zeros change nothing
    wide_q, wide_k, wide_v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    mask = None if matrix is None else matrix.to(q.dtype)
    output = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return output[..., : v.shape[-1]]


def choose_path(q: Tensor, matrix: Tensor | None) -> Path:
    """How the products are computed. Both ways agree to rounding.

    fused:    PyTorch's scaled_dot_product_attention, on every accelerator, and on a CPU for long sequences.
    products: plain matrix products, on a CPU up to 512 tokens, where the backward pass of the fused kernel is three to
              five times slower in bf16 (benchmarks/results/attention_path.md), and for a map that needs a gradient, which would
              make the kernel fall back to products anyway.
    """
    if q.device.type not in ("cpu", "meta"):
        return "fused"
    map_needs_gradient = matrix is not None and matrix.requires_grad and torch.is_grad_enabled()
    return "products" if q.shape[-2] <= 512 or map_needs_gradient else "fused"


def encode(
    q: Tensor, k: Tensor, grid: Grid, encoding: AttentionEncoding
) -> tuple[Tensor, Tensor, Float[Tensor, "*batch_heads tokens tokens"] | None]:
    """(q', k', matrix) such that the logits are q' k'^T + matrix: q scaled, both rotated, the bias on grid tokens only.

    A factored bias becomes further channels: q' = [q / sqrt(d), query_side], k' = [k, key_side].
    """
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    q_grid, k_grid = q[:, :, num_prefix:], k[:, :, num_prefix:]
    bias = encoding.bias(q_grid, k_grid, grid)
    rotated_q, rotated_k = encoding.rotate(q_grid, k_grid, grid)
    if rotated_q is not q_grid:
        q = torch.cat([q[:, :, :num_prefix], rotated_q], dim=-2)
        k = torch.cat([k[:, :, :num_prefix], rotated_k], dim=-2)
    q = q * q.shape[-1] ** -0.5
    if bias is None:
        return q, k, None
    if bias.factors is not None:
        q, k = (_widen(t, side, num_prefix) for t, side in zip((q, k), bias.factors, strict=True))
    if bias.matrix is None:
        return q, k, None
    return q, k, F.pad(bias.matrix, (num_prefix, 0, num_prefix, 0)) if num_prefix else bias.matrix


def _widen(tokens: Tensor, side: Tensor, num_prefix: int) -> Tensor:
    """One side of a factored bias as further channels; prefix tokens get zeros."""
    side = F.pad(side.expand(*tokens.shape[:-2], *side.shape[-2:]), (0, 0, num_prefix, 0))
    return torch.cat([tokens, side.to(tokens.dtype)], dim=-1)


def logits(q: Tensor, k: Tensor, matrix: Tensor | None) -> Float[Tensor, "batch heads tokens tokens"]:
    """q k^T + matrix of what `encode` gave."""
    scores = q @ k.transpose(-1, -2)
    return scores if matrix is None else scores + matrix


def describe_path(q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding) -> str:
    """In words how `attend` computes this, for tables and rows: "products, map (B, h, N, N)", "fused, factored (r=18)"."""
    wide_q, _, matrix = encode(q, k, grid, encoding)
    parts: list[str] = [choose_path(wide_q, matrix)]
    rank = wide_q.shape[-1] - q.shape[-1]
    if rank:
        parts.append(f"factored (r={rank})")
    if matrix is not None:
        parts.append(f"map ({', '.join(['B', 'h', 'N', 'N'][-matrix.ndim :])})")
    return ", ".join(parts)
