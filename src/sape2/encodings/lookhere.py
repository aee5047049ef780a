"""Fields of view: a head looks in one direction, sees nothing outside of it, and less of what is further away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import AttentionBias, Matrix
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, offsets
from sape2.encodings.options import check_positive
from sape2.encodings.precision import full_precision

HIDDEN = -500.0  # a softmax weight of 0 (1e-217 in float64); finite, so that maps can be added, averaged and compared
POINTS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # (y, x), clockwise from up
# Where the field of each head begins, as a number of POINTS, in the order of the authors' code.
STARTS = {
    180: (6, 2, 4, 0),  # up, down, left, right
    90: (6, 0, 4, 2, 7, 3, 5, 1),  # up left, up right, down left, down right; around up, down, left, right
    45: (7, 4, 6, 1, 0, 3, 5, 2),  # left of up, left of down, above left, above right; right of up, and so on
}


@dataclass(frozen=True)
class LookHereOptions:
    """`view`: the angle that a head sees; `outside`: what becomes of the rest; `slope`: a factor for all heads."""

    view: Literal[90, 180, 45] = 90
    outside: Literal["hidden", "far"] = "hidden"
    slope: float = 2.0

    def __post_init__(self) -> None:
        check_positive("lookhere:slope", self.slope)


class LookHere(AttentionEncoding):
    """b_in = -slope slope_h |p_i - p_n| if patch n is in the field of view of head h at patch i, else i does not see n.

    LookHere (arXiv:2405.13985): two thirds of the heads, in fours, look in one direction each, borders included; the rest
    look all around. slope_h is 1/2 for the first heads of every field, 1/4 for the second, and 1/4, 1/16, 1/64, 1/256 for
    those that look around. The source lets the slope fall from layer to layer; here it is the same in all. With fewer than
    four heads not every direction has one.
    """

    name = "lookhere"
    Options = LookHereOptions
    summary = "a field of view for each head, and a slope times the distance inside it"
    source = "arXiv:2405.13985"
    variants: ClassVar[dict[str, str]] = {
        "view=180": "half of the plane for each head: LookHere-180, arXiv:2405.13985",
        "view=45": "an eighth of the plane for each head: LookHere-45, arXiv:2405.13985",
        "outside=far": "nothing is hidden: what is outside counts as far as the far corner; can enter a trained model",
    }
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.hides = self.options.outside == "hidden"
        starts = STARTS[self.options.view]
        directed = min(num_heads, 4 * ((num_heads + 3) // 6 or 1))
        around = num_heads - directed
        self._starts = [starts[head % len(starts)] for head in range(directed)]
        halvings = [1 + head // len(starts) for head in range(directed)]
        halvings += [2 + 2 * (4 * head // max(around, 4)) for head in range(around)]
        self._slopes = [self.options.slope * 2.0**-count for count in halvings]

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        like = full_precision(q)
        slopes = torch.tensor(self._slopes, dtype=like.dtype, device=like.device)[:, None, None]
        distance = offsets(grid, like.device).to(like.dtype).square().sum(-1).sqrt()  # (N, N)
        outside = slopes.new_full((), HIDDEN) if self.hides else -slopes * distance[0, -1]  # from corner to corner
        return AttentionBias(Matrix(torch.where(self._in_view(grid, like), -slopes * distance, outside)), dtype=q.dtype)

    def _in_view(self, grid: Grid, like: Tensor) -> Bool[Tensor, "heads tokens tokens"]:
        """A field lies between two points: clockwise of its first border and counter-clockwise of its second."""
        dy, dx = offsets(grid, like.device).unbind(-1)
        halves = [y * dy + x * dx >= 0 for y, x in POINTS]  # the half plane around each point
        width = self.options.view // 45
        fields = [halves[(start + 2) % 8] & halves[(start + width - 2) % 8] for start in self._starts]
        return torch.stack([*fields, *[torch.ones_like(halves[0])] * (self.num_heads - len(fields))])
