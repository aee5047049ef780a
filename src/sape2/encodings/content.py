"""What an encoding sees of a layer, in one value, whatever it reads of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sape2.encodings.grid import Axis, Grid, check_grid, check_tokens, num_prefix_tokens, own_line
from sape2.encodings.precision import full_precision

Vectors = Float[Tensor, "batch heads tokens head_dim"]
Tokens = Float[Tensor, "batch tokens dim"]


class Seen(NamedTuple):
    """For each patch: which patches of its own line it sees, and at which places of a line it sees any patch of the grid."""

    own: Bool[Tensor, "#batch #heads tokens length"]
    places: Bool[Tensor, "#batch #heads tokens length"]


@dataclass(frozen=True)
class Content:
    """What an encoding sees of a layer: its grid tokens, with q and k before any rotation.

    `scores`: q.k / sqrt(d) of every token with those of its own line, (B, h, N, S), for each axis of
    `AttentionEncoding.score_axes`, where attention has computed them anyway. `tokens`: what q and k were projected
    from, the normed input of the block, where it is known. Raises ValueError if the grid has another number of tokens.

    `visible`: which patches n a patch i sees, (B or 1, h or 1, N, N), where a mask hides some, None where it sees all. What
    is counted along a line counts what is seen: a gate g_ij is 0 if i does not see j, and a row or a column of which i sees
    nothing is no place of its lines. So if i sees a rectangle R of the grid, every sum over j is the sum over the part of the
    line in R, in the same order, and the vector s_i has the values of R alone and 0 elsewhere, which adds nothing to a
    distance: pairs in R get the bias of a grid of the size of R. Hence a padded image gets the bias of the image without its
    padding, and a part of a shifted window that of a window of its size. Patches hidden here and there, as by patch dropout,
    are skipped by the counts and keep their places.

    `joined`: attention has joined `AttentionEncoding.key_vectors` to the keys, so in a joined encoding the parts that gave them
    make no bias.
    """

    q: Vectors
    k: Vectors
    grid: Grid
    scores: Mapping[Axis, Tensor] = field(default_factory=dict)
    tokens: Tokens | None = None
    visible: Bool[Tensor, "#batch #heads tokens tokens"] | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        check_tokens(self.q, check_grid(self.grid))

    @classmethod
    def of_grid(
        cls,
        q: Float[Tensor, "batch heads all_tokens head_dim"],
        k: Float[Tensor, "batch heads all_tokens head_dim"],
        grid: Grid,
        tokens: Float[Tensor, "batch all_tokens dim"] | None = None,
        joined: bool = False,
    ) -> Content:
        """The content of whole sequences, without their prefix tokens."""
        first = num_prefix_tokens(q.shape[-2], grid)
        tokens = None if tokens is None else tokens[:, first:]
        return cls(q[:, :, first:], k[:, :, first:], grid, tokens=tokens, joined=joined)

    def seen(self, axis: Axis) -> Seen | None:
        """What each patch sees along `axis`; None if it sees all."""
        if self.visible is None or axis == "raster":
            return None if self.visible is None else Seen(self.visible, self.visible)
        anywhere = self.visible.unflatten(-1, self.grid).any(-2 if axis == "x" else -1)
        return Seen(own_line(self.visible, self.grid, axis).flatten(-2).transpose(-2, -1), anywhere)

    def in_full_precision(self) -> Content:
        """With q and k in float32 or better."""
        return dataclasses.replace(self, q=full_precision(self.q), k=full_precision(self.k))

    def read_tokens(self, name: str, dim: int) -> Tokens:
        """The tokens, in float32 or better; raises ValueError if there are none, or of another width than `dim`."""
        if self.tokens is None:
            raise ValueError(f"{name} reads the normed input of the block besides q and k; give tokens, (batch, tokens, {dim})")
        check_tokens(self.tokens, self.grid)
        if (width := self.tokens.shape[-1]) != dim:
            raise ValueError(f"this {name} reads tokens of width {dim} (num_heads times head_dim); got {width}")
        return full_precision(self.tokens)
