"""Where the patches of a call stand: all of one grid in row-major order, or scattered over the grids of their images.

Axes: B images, h heads, n tokens of a call without those that stand on no grid, N = H W places of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sape2.encodings.base import AttentionEncoding, TokenEncoding
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, num_tokens


@dataclass(frozen=True, eq=False)
class Scattered:
    """Patches of several grids in one batch, with padding, in another order, or what dropout leaves of them.

    `grids`: of each image; `place`: y W + x of each token in the grid of its image; `valid`: False for padding.
    """

    grids: tuple[Grid, ...]
    place: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]

    def kept(self, indices: Int[Tensor, "batch kept"]) -> Scattered:
        return Scattered(self.grids, self.place.gather(1, indices), self.valid.gather(1, indices))

    def groups(self) -> Iterator[tuple[Tensor, _Group]]:
        """The images of each grid, and where their tokens stand."""
        for grid in dict.fromkeys(self.grids):
            images = torch.tensor([i for i, each in enumerate(self.grids) if each == grid], device=self.place.device)
            beyond = num_tokens(grid)  # one more place, for padding
            yield images, _Group(grid, self.place[images].where(self.valid[images], beyond))


Layout = Grid | Scattered


def grids_of(sizes: Int[Tensor, "batch 2"]) -> tuple[Grid, ...]:
    """(H, W) of each image. Raises ValueError in an export: a program made ahead cannot follow values of the batch."""
    if torch.compiler.is_exporting():
        raise ValueError("an encoding on several grids in one batch cannot be exported; torch.compile can take it")
    return tuple((height, width) for height, width in sizes.tolist())


def whole(grid: Grid, batch: int, device: torch.device) -> Scattered:
    """All patches of one grid."""
    place = torch.arange(num_tokens(grid), device=device).expand(batch, -1)
    return Scattered((grid,) * batch, place, torch.ones_like(place, dtype=torch.bool))


@dataclass(frozen=True)
class _Group:
    """Images of one grid. `place` is N for padding."""

    grid: Grid
    place: Int[Tensor, "batch tokens"]

    def spread(self, values: Shaped[Tensor, "batch heads tokens features"]) -> Shaped[Tensor, "batch heads places features"]:
        """Values of tokens put at their places; 0 where there is no token."""
        empty = values.new_zeros(*values.shape[:2], num_tokens(self.grid) + 1, values.shape[-1])
        return empty.scatter(2, self.place[:, None, :, None].expand_as(values), values)[:, :, :-1]

    def spread_pairs(self, pairs: Bool[Tensor, "batch heads tokens tokens"]) -> Bool[Tensor, "batch heads places places"]:
        return self.spread(self.spread(pairs).mT).mT

    def collect(self, values: Float[Tensor, "batch heads places features"]) -> Float[Tensor, "batch heads tokens features"]:
        """The inverse of `spread`; padding gets 0."""
        index = self.place[:, None, :, None].expand(*values.shape[:2], -1, values.shape[-1])
        return F.pad(values, (0, 0, 0, 1)).gather(2, index)

    def collect_pairs(self, pairs: Float[Tensor, "batch heads places places"]) -> Float[Tensor, "batch heads tokens tokens"]:
        return self.collect(self.collect(pairs).mT).mT


def bias_on(
    layout: Layout,
    encoding: AttentionEncoding,
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    tokens: Float[Tensor, "batch tokens dim"] | None,
    visible: Bool[Tensor, "#batch #heads tokens tokens"] | None,
) -> Float[Tensor, "*#batch heads tokens tokens"] | None:
    """The bias of all pairs of the tokens that stand on grids; on places without a token nothing is seen."""
    if not isinstance(layout, Scattered):
        bias = encoding.make_bias(Content(q, k, layout, tokens=tokens, visible=visible))
        return None if bias is None else bias.dense()
    order, parts = [], []
    for images, group in layout.groups():
        kept = layout.valid[images, None, None, :].expand(-1, 1, q.shape[2], -1)
        if visible is not None:
            kept = kept & visible.expand(len(q), *visible.shape[1:])[images]
        of_grid = None if tokens is None else group.spread(tokens[images, None])[:, 0]
        seen = group.spread_pairs(kept)
        content = Content(group.spread(q[images]), group.spread(k[images]), group.grid, tokens=of_grid, visible=seen)
        bias = encoding.make_bias(content)
        if bias is None:
            return None
        order.append(images)
        parts.append(group.collect_pairs(bias.dense().expand(len(images), q.shape[1], -1, -1)))
    return _in_order(order, parts)


def rotate_on(layout: Layout, encoding: AttentionEncoding, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, (B, h, n, d), turned by the encoding; the same tensors if it does not rotate."""
    if not isinstance(layout, Scattered):
        return encoding.rotate(q, k, layout)
    order, parts = [], []
    for images, group in layout.groups():
        on_grid = group.spread(q[images])
        turned = encoding.rotate(on_grid, group.spread(k[images]), group.grid)
        if turned[0] is on_grid:
            return q, k
        order.append(images)
        parts.append([group.collect(each) for each in turned])
    turned_q, turned_k = (_in_order(order, part) for part in zip(*parts, strict=True))
    return turned_q, turned_k


def tokens_on(
    layout: Layout, encoding: TokenEncoding, tokens: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch tokens dim"]:
    """The tokens changed by the encoding, which sees 0 at places without one; padding stays as it is."""
    if not isinstance(layout, Scattered):
        return encoding(tokens, layout)
    order, parts = [], []
    for images, group in layout.groups():
        changed = encoding(group.spread(tokens[images, None])[:, 0], group.grid)
        order.append(images)
        parts.append(group.collect(changed[:, None])[:, 0])
    return _in_order(order, parts).where(layout.valid[..., None], tokens)


def _in_order(order: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """What was computed grid by grid, in the order of the batch; `order`: the images of each part."""
    return torch.cat(list(parts))[torch.cat(list(order)).argsort()]
