"""Multi-head attention with a position encoding, which it calls only through the encoding's hooks.

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.attention.blocks import attend_in_blocks
from sape2.attention.paths import Path, adds_to_keys, choose_path, is_on_cpu
from sape2.attention.products import attend_fused, encode, for_keys, logits, scores_with
from sape2.encodings.base import AttentionEncoding, NoEncoding
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, check_grid, num_prefix_tokens, width_of_heads
from sape2.encodings.nodes import OneNode


class Attention(OneNode, nn.Module):
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
        head_dim = width_of_heads(dim, num_heads)
        self.num_heads = num_heads
        self.encoding = encoding or NoEncoding()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.project(x)
        dropout = self.attention_dropout if self.training else 0.0
        output = attend(q, k, v, grid, self.encoding, dropout, tokens=x)  # (B, h, T, d)
        return self.dropout(self.proj(output.transpose(1, 2).flatten(2)))

    def project(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, h, T, d), unscaled."""
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"attention takes tokens of shape (batch, tokens, {self.qkv.in_features}); got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def maps(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> dict[str, Tensor]:
        """The maps of the encoding and `attention`, the softmax weights, (B, h, T, T)."""
        q, k, _ = self.project(x)
        maps = self.encoding.make_maps(Content.of_grid(q, k, grid, x))
        return maps | {"attention": logits(q, k, grid, self.encoding, x).softmax(-1)}


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
    dropout: float = 0.0,
    *,
    tokens: Float[Tensor, "batch tokens dim"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention under an encoding; prefix tokens are neither rotated nor biased.

    `tokens`, what q, k and v were projected from, for encodings that read them.
    """
    grid = check_grid(grid)
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    if encoding.gives_key_vectors:
        vectors = encoding.key_vectors(q[:, :, num_prefix:], grid)
        return _attend_with_key_vectors(q, k, v, *encoding.rotate_all(q, k, grid), vectors, dropout)
    vectors = encoding.key_vectors(q, grid) if adds_to_keys(encoding, num_prefix) else None
    encoded = None if is_on_cpu(q) else encode(q, k, grid, encoding, tokens, vectors)  # on a device the bias decides
    path = choose_path(q, encoding, dropout, encoded and encoded[2])
    if path == "blocks":
        return attend_in_blocks(q, k, v, grid, encoding, vectors)
    return _attend_by(path, *(encoded or encode(q, k, grid, encoding, tokens, vectors)), v, dropout)


def _attend_by(
    path: Path, q: Tensor, k: Tensor, bias: AttentionBias | None, v: Tensor, dropout: float, scale: float | None = None
) -> Tensor:
    """Attention by a path that takes rotated q and k; `scale` of their product is 1 / sqrt(d) unless given."""
    if path == "triton":
        from sape2.attention.kernels import attend_with_distances

        assert bias is not None
        return attend_with_distances(q, k, v, bias)
    if path == "products":
        weights = F.dropout(scores_with(q, k, bias, scale).softmax(-1), dropout)
        return weights.to(v.dtype) @ v
    return attend_fused(q, k, v, bias, dropout, scale)


def _attend_with_key_vectors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotated_q: Tensor,
    rotated_k: Tensor,
    vectors: Float[Tensor, "*#heads grid_tokens head_dim"],
    dropout: float,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """b_in = q_i . e_n costs no map: (q_i . k_n) / sqrt(d) + q_i . e_n = q_i . (k_n + sqrt(d) e_n) / sqrt(d).

    Where q and k are rotated, [R q_i, q_i] . [R k_n, sqrt(d) e_n] / sqrt(d). Prefix tokens have no bias, as keys and as
    queries; as queries they meet the keys as they are.
    """
    num_prefix, scale = k.shape[-2] - vectors.shape[-2], k.shape[-1] ** -0.5
    path, added = choose_path(k, _NO_ENCODING, dropout), F.pad(for_keys(vectors, k), (0, 0, num_prefix, 0))
    if rotated_q is not q or rotated_k is not k:
        unrotated = F.pad(q[:, :, num_prefix:], (0, 0, num_prefix, 0)) if num_prefix else q
        wide = torch.cat([rotated_q, unrotated], dim=-1), torch.cat([rotated_k, added.expand_as(k)], dim=-1)
        return _attend_by(path, *wide, None, v, dropout, scale)
    if not num_prefix:
        return _attend_by(path, q, k + added, None, v, dropout)
    parts = ((q[:, :, :num_prefix], k), (q[:, :, num_prefix:], k + added))
    return torch.cat([_attend_by(path, queries, keys, None, v, dropout) for queries, keys in parts], dim=-2)


_NO_ENCODING = NoEncoding()
