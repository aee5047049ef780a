"""CoPE, contextual position encoding (arXiv:2405.18719), on the tokens of an image in raster order.

CoPE was made for text: a query counts, by gates that it computes itself, the tokens between a key and itself. Here the
sequence is the grid in row-major order and nothing is masked, which is how it is used as a baseline on images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import AttentionBias, Matrix
from sape2.encodings.content import Content
from sape2.encodings.counting import Beyond, check_num_positions, rescaled
from sape2.encodings.counting.readable import count_positions, interpolate
from sape2.encodings.grid import Grid, num_tokens
from sape2.encodings.precision import full_precision, no_autocast

Count = Literal["suffix", "causal", "between"]


def cope_positions(gates: Float[Tensor, "*lead tokens tokens"], count: Count) -> Float[Tensor, "*lead tokens tokens"]:
    """p_in, the sum of the gates g_ij over the tokens j

    suffix:  from n to the end of the sequence: CoPE's code (flip, cumsum, flip) without its causal mask,
    causal:  from n to i, both included, 0 for n after i: CoPE's code with its mask,
    between: from i to n on either side, i itself left out, so p_ii = 0.
    """
    place = torch.arange(gates.shape[-1], device=gates.device)
    return count_positions(gates.tril(), "suffix", place) if count == "causal" else count_positions(gates, count, place)


@dataclass(frozen=True)
class CoPEOptions:
    """`divide_bias`: by sqrt(d), as the logits. `num_positions`: rows of the table, by default one more than the tokens of the
    training grid, which no count exceeds. `beyond`: on grids with more tokens, positions are clamped, or first rescaled
    to the trained range.
    """

    count: Count = "suffix"
    divide_bias: bool = True
    num_positions: int | None = None
    beyond: Beyond = "clamp"

    def __post_init__(self) -> None:
        check_num_positions("cope", self.num_positions)


class CoPE(AttentionEncoding):
    """b_in = q_i^T e[p_in] / sqrt(d), p_in the sum of the gates sigmoid(q_i^T k_j / sqrt(d)) from n on.

    One table, (num_positions, d), shared by the heads, zero at the start (the bias is linear in it, so it learns).
    The paper's listing adds q^T e undivided; the code published with it divides by sqrt(d) as the content logits are,
    which is the default here. Sums and positions are in float32 or better.
    """

    name = "cope"
    Options = CoPEOptions
    summary = "contextual positions: gated counts along the raster order"
    source = "arXiv:2405.18719"
    variants: ClassVar[dict[str, str]] = {
        "num_positions=10": "the table of SaPE2's comparison: most positions clamp at 64 tokens",
        "count=causal": "with CoPE's causal mask on the counts",
        "count=between": "from the patch itself to the other, either way",
    }
    facts = Facts(content_dependent=True)
    score_axes = ("raster",)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.num_positions = self.options.num_positions or num_tokens(self.grid) + 1
        self.table = nn.Parameter(torch.zeros(self.num_positions, head_dim))

    def make_bias(self, content: Content) -> AttentionBias:
        """The bias of every pair in logits, float32 or better inside."""
        return AttentionBias(Matrix(self.make_maps(content)["bias"]), dtype=content.q.dtype)

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        """gates, positions (before they are clamped) and bias, each (B, h, N, N)."""
        grid, scores = content.grid, content.scores
        with no_autocast(content.q):
            q, k = full_precision(content.q), full_precision(content.k)
            products = scores["raster"] if scores else self.head_dim**-0.5 * (q @ k.transpose(-2, -1))
            gates, seen = torch.sigmoid(products), content.visible
            gates = gates if seen is None else gates * seen
            length = num_tokens(grid) if seen is None else seen.sum(-1, keepdim=True)
            counted = cope_positions(gates, self.options.count)
            positions = rescaled(counted, self.options.beyond, num_tokens(self.grid), length)
            bias = interpolate(q @ full_precision(self.table).T, positions)
            divisor = self.head_dim**0.5 if self.options.divide_bias else 1.0
            return {"gates": gates, "positions": positions, "bias": bias / divisor}
