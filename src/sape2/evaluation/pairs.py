"""Statistics of pairs of patches: one number for every image and head. Pure functions; B images, h heads, N patches.

`attention` is (B, h, N, N), its rows sum to 1; `bias` is (B, h, N, N) in logits. `same` (B, N, N) says which pairs (i, n)
carry the same label, `pairs` (B, N, N) which are counted at all. Where a statistic is not defined (no pair of one kind)
it is NaN. Formulas, sources and what the numbers can say: docs/evaluation/grouping.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sape2.encodings.grid import Grid, offsets

PairMap = Float[Tensor, "batch heads tokens tokens"]
PairMask = Bool[Tensor, "batch tokens tokens"]

# Chebyshev distances (first, last) of the pairs that are counted; the 8 neighbours are near.
DISTANCES: dict[str, tuple[int, float]] = {
    "all": (1, float("inf")),
    "near": (1, 1),
    "far": (2, float("inf")),
    "farther": (4, float("inf")),
}


def distances(grid: Grid, device: torch.device | None = None) -> Float[Tensor, "tokens tokens"]:
    """Euclidean distance of every pair, in patches."""
    return offsets(grid, device).double().square().sum(-1).sqrt()


def distance_strata(grid: Grid, device: torch.device | None = None) -> dict[str, Bool[Tensor, "tokens tokens"]]:
    """The pairs of each entry of `DISTANCES` that has any on this grid."""
    steps = offsets(grid, device).abs().amax(-1)
    strata = {name: (steps >= first) & (steps <= last) for name, (first, last) in DISTANCES.items()}
    return {name: pairs for name, pairs in strata.items() if pairs.any()}


# --- attention -------------------------------------------------------------------------------------------------------


def attention_distance(attention: PairMap, grid: Grid) -> Float[Tensor, "batch heads"]:
    """mean_i sum_n A_in ||c_i - c_n||, in patches (ViT, arXiv:2010.11929, appendix D.7, there times the patch size)."""
    return (attention * distances(grid, attention.device)).sum(-1).mean(-1)


def attention_entropy(attention: PairMap) -> Float[Tensor, "batch heads"]:
    """mean_i -sum_n A_in ln A_in, in nats; ln N for uniform attention."""
    return torch.special.entr(attention).sum(-1).mean(-1)


def same_label_lift(attention: PairMap, same: PairMask, pairs: PairMask) -> Float[Tensor, "batch heads"]:
    """mean_i [sum_{n in S_i} A_in / sum_{n in P_i} A_in] / [|S_i| / |P_i|], P_i the counted n, S_i those with i's label.

    1 for attention that does not see labels. Patches without a counted partner of their label are left out.
    """
    same = same & pairs
    attended = (attention * same[:, None]).sum(-1) / (attention * pairs[:, None]).sum(-1)  # (B, h, N)
    chance = same.sum(-1).double() / pairs.sum(-1)
    return (attended / chance[:, None]).masked_fill(~same.any(-1)[:, None], float("nan")).nanmean(-1)


def grouping_index(attention: PairMap, same: PairMask, pairs: PairMask) -> Float[Tensor, "batch heads"]:
    """(A_same - A_different) / (A_same + A_different), means over counted pairs; after arXiv:2303.01542."""
    within, across = (_mean(attention, mask)[..., 0] for mask in (same & pairs, ~same & pairs))
    return (within - across) / (within + across)


# --- bias ------------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """Scores in order: `order` sorts them; those from `first` up to but not including `last` tie with each."""

    order: Int[Tensor, "*lead scores"]
    first: Int[Tensor, "*lead scores"]
    last: Int[Tensor, "*lead scores"]


def rank(scores: Float[Tensor, "*lead scores"]) -> Ranking:
    """Sorted once, an AUROC for any choice of pairs follows without sorting again."""
    ordered, order = scores.contiguous().sort(-1)
    return Ranking(order, torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True))


def auroc(
    ranking: Ranking, positive: Bool[Tensor, "*#lead scores"], counted: Bool[Tensor, "*#lead scores"]
) -> Float[Tensor, "*lead"]:
    """The chance that a counted positive scores higher than a counted negative, ties half (Mann and Whitney).

    0.5 for scores that do not see the difference; NaN without a positive or without a negative.
    """
    positives, negatives = (
        mask.expand_as(ranking.order).gather(-1, ranking.order) for mask in (positive & counted, ~positive & counted)
    )
    lower = torch.nn.functional.pad(negatives.cumsum(-1), (1, 0))  # negatives among the k lowest
    beaten = (lower.gather(-1, ranking.first) + lower.gather(-1, ranking.last)).double() / 2
    return (beaten * positives).sum(-1) / (positives.sum(-1).double() * negatives.sum(-1))


def separation(bias: PairMap, same: PairMask, pairs: PairMask) -> Float[Tensor, "batch heads"]:
    """d' = (mean across labels - mean within) / sqrt((var across + var within) / 2).

    0 for a constant bias; NaN for one that is constant within and across but not the same, which no spread measures.
    """
    means, variances = [], []
    for mask in (~same & pairs, same & pairs):
        means.append(_mean(bias, mask))
        variances.append(_mean((bias - means[-1][..., None]).square(), mask))
    gap, spread = means[0] - means[1], ((variances[0] + variances[1]) / 2).sqrt()
    rounding = 1e-12 * bias.abs().amax((-1, -2))[..., None]
    index = (gap / spread).masked_fill(spread <= rounding, float("nan"))
    return index.masked_fill(gap.abs() <= rounding, 0.0)[..., 0]


def partial_correlation(
    first: Float[Tensor, "batch heads tokens tokens"],
    second: Float[Tensor, "batch tokens tokens"],
    control: Float[Tensor, "tokens tokens"],
    pairs: Bool[Tensor, "tokens tokens"],
) -> Float[Tensor, "batch heads"]:
    """r_12.3 = (r_12 - r_13 r_23) / sqrt((1 - r_13^2)(1 - r_23^2)) over the counted pairs, r Pearson's.

    The correlation of what is left of both after their linear dependence on the control; NaN where nothing is left.
    """
    x, y, z = (_standardised(values[..., pairs]) for values in (first, second[:, None], control[None, None]))
    r_xy, r_xz, r_yz = ((a * b).mean(-1) for a, b in ((x, y), (x, z), (y, z)))
    left = (1 - r_xz.square()) * (1 - r_yz.square())
    return ((r_xy - r_xz * r_yz) / left.sqrt()).masked_fill(left < 1e-12, float("nan"))


def feature_distance(tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens tokens"]:
    """1 - cos of every pair of tokens."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return 1 - unit @ unit.transpose(-1, -2)


def _mean(values: PairMap, mask: PairMask) -> Float[Tensor, "batch heads 1"]:
    """Mean over the pairs of the mask; NaN if there are none."""
    number = mask.sum((-1, -2))[:, None]
    return ((values * mask[:, None]).sum((-1, -2)) / number)[..., None]


def _standardised(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 along the last axis; NaN where all are the same but for rounding."""
    if not values.shape[-1]:  # a grid of one patch has no pairs
        return values
    centred = values - values.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    flat = spread <= 1e-12 * values.abs().amax(-1, keepdim=True)
    return (centred / spread).masked_fill(flat, float("nan"))
