"""Conditional position encoding, added to the tokens: a convolution derives position from the neighbourhood of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import Facts, TokenEncoding
from sape2.encodings.grid import Grid, check_tokens


@dataclass(frozen=True)
class ConditionalOptions:
    """`padding`: what a border token sees outside; zeros (the source) tell it where the border is, circular does not."""

    padding: Literal["zeros", "circular"] = "zeros"


class Convolution(nn.Conv2d):
    """In the precision of its input, which may be wider than that of the weights in a host made half as wide later."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


class Conditional(TokenEncoding):
    """x + conv(x) after the first block, a depthwise 3x3 convolution over the grid: PEG of CPVT (arXiv:2102.10882).

    Content moved by a step meets the zeros outside the grid elsewhere, so no symmetry holds exactly: the padding is
    what leaks the absolute place. With circular padding the addition is exactly equivariant to
    circular shifts, and no place is told from another. Weights start as PyTorch starts a convolution, as in the source.
    """

    name = "cpe"
    Options = ConditionalOptions
    summary = "depthwise 3x3 convolution of the tokens after the first block (PEG)"
    source = "arXiv:2102.10882"
    facts = Facts(content_dependent=True)
    after_block = 0

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.conv = Convolution(self.dim, self.dim, 3, padding=1, groups=self.dim, padding_mode=self.options.padding)
        self.facts = Facts(content_dependent=True, circular_shift=self.options.padding == "circular")

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(tokens, grid)
        image = tokens.transpose(1, 2).unflatten(-1, tuple(grid))  # (B, D, H, W)
        return tokens + self.conv(image).flatten(2).transpose(1, 2).to(tokens.dtype)
