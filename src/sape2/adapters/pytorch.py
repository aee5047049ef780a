"""For plain PyTorch: the attention module with an encoding chosen by name, for one's own blocks."""

from __future__ import annotations

from typing import Any

from sape2.attention import Attention
from sape2.encodings import TokenEncoding, create_encoding
from sape2.grid import Grid


class SaPEAttention(Attention):
    """Multi-head self-attention under any attention encoding.

    attn = SaPEAttention(dim=384, num_heads=6, encoding="sape2", grid=(14, 14))
    y = attn(x, grid=(14, 14))  # x: (B, P + 14 * 14, 384), any number P of prefix tokens

    `grid` is the training grid, which sizes the tables; the grid of a call may differ. Further keywords: `Attention`.
    """

    def __init__(self, dim: int, num_heads: int, encoding: str = "sape2", *, grid: Grid, **options: Any) -> None:
        if dim % num_heads:
            raise ValueError(f"the width must be divisible by the number of heads; got dim={dim}, num_heads={num_heads}")
        module = create_encoding(encoding, num_heads=num_heads, head_dim=dim // num_heads, grid=grid)
        if isinstance(module, TokenEncoding):
            raise ValueError(f"{encoding} acts on the tokens, not in attention; add it to them before the first block")
        super().__init__(dim, num_heads, module, **options)
