"""Absolute encodings in the token slot: one vector per grid place, added to the tokens before the first block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import Facts, TokenEncoding, full_precision, make_options
from sape2.encodings.grid import Grid, check_grid, check_tokens, coordinates, is_symbolic


@dataclass(frozen=True)
class LearnedAbsoluteOptions:
    """`resize`: how the table is resampled to another grid."""

    resize: Literal["bicubic", "bilinear"] = "bicubic"


class LearnedAbsolute(TokenEncoding):
    """x_i + e[i], one learned vector per place of the training grid (ViT, arXiv:2010.11929); normal of std 0.02.

    On another grid the table is resampled as an image, from its own (H, W), never from a guessed square.
    """

    Options = LearnedAbsoluteOptions
    summary = "learned absolute table, resampled to other grids"
    source = "arXiv:2010.11929"
    facts = Facts()

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        self.options = make_options(LearnedAbsoluteOptions, "ape", options)
        self.grid = check_grid(grid)
        self.table = nn.Parameter(torch.empty(*self.grid, num_heads * head_dim))  # (H, W, D)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(tokens, grid)
        return tokens + self.resampled(grid).flatten(0, 1).to(tokens.dtype)

    def resampled(self, grid: Grid) -> Float[Tensor, "height width dim"]:
        if not is_symbolic(grid) and tuple(grid) == self.grid:
            return self.table
        image = full_precision(self.table).permute(2, 0, 1)[None]  # (1, D, H, W)
        image = F.interpolate(image, size=tuple(grid), mode=self.options.resize, antialias=True, align_corners=False)
        return image[0].permute(1, 2, 0)


@dataclass(frozen=True)
class SinCosOptions:
    """`temperature`: the longest wavelength is 2 pi times it."""

    temperature: float = 10_000.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"sincos:temperature must be above 0; got {self.temperature}")


class SinCos(TokenEncoding):
    """x_i + [sin(x w), cos(x w), sin(y w), cos(y w)], fixed, w = temperature^(-f / (D/4)) (MoCo v3, arXiv:2104.02057)."""

    Options = SinCosOptions
    summary = "fixed sine-cosine of x and y, any grid"
    source = "arXiv:1706.03762, 2D as in arXiv:2104.02057"
    facts = Facts()

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        self.options = make_options(SinCosOptions, "sincos", options)
        self.dim = num_heads * head_dim
        if self.dim % 4:
            raise ValueError(f"sincos needs a width divisible by 4; got {self.dim}")

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(tokens, grid)
        return tokens + self.table(grid).to(tokens)

    def table(self, grid: Grid) -> Float[Tensor, "tokens dim"]:
        """All vectors, in float64 on the CPU."""
        frequencies = self.dim // 4
        omega = self.options.temperature ** (-torch.arange(frequencies).double() / frequencies)
        y, x = coordinates(grid).double().unbind(-1)
        angles = [x[:, None] * omega, y[:, None] * omega]
        return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)
