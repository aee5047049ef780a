"""Forget gates along rows and columns: each patch between a query and a key lowers their logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import PLACE_AXES, AttentionBias, Places
from sape2.encodings.content import Content
from sape2.encodings.counting.readable import sides
from sape2.encodings.grid import Axis, Grid, from_lines, line_coordinate, line_length, to_lines
from sape2.encodings.precision import full_precision, no_autocast


@dataclass(frozen=True)
class ForgetOptions:
    """`start`: the first offset of the gates, sigmoid(w . x + start); at 5 hardly anything is forgotten."""

    start: float = 5.0


class Forget(AttentionEncoding):
    """b_in = the sum of log sigmoid(w . x_k + c) over the patches k from i to n's column in i's row, and from i to n's row

    in i's column. Gates are those of the Forgetting Transformer (FoX, arXiv:2503.02130), which forgets along a text, in both
    directions as in x-transformers (`DataDependentAlibi`): a gate of its own for each head, axis and direction. Backwards
    the patch i itself counts and the other does not, onwards the other way round, so b_ii = 0. x_k is the normed input of the
    block. Spatial decay on two axes: arXiv:2508.09525. Raises ValueError without tokens.
    """

    name = "forget"
    Options = ForgetOptions
    summary = "gates along rows and columns that patches on the way close, both ways"
    source = "arXiv:2503.02130, both ways as in x-transformers, 2D here"
    facts = Facts(content_dependent=True, translation=True)
    reads_tokens = True

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        weight = torch.empty(2, 2, num_heads, self.dim).uniform_(-(self.dim**-0.5), self.dim**-0.5)
        self.weight = nn.Parameter(weight)  # (axis y or x, backwards or onwards, h, D)
        self.offset = nn.Parameter(torch.full((2, 2, num_heads), self.options.start))

    def make_bias(self, content: Content) -> AttentionBias:
        q = content.q
        with no_autocast(q):
            pairs = zip(self.log_gates(content), PLACE_AXES, strict=True)
            by_row, by_column = (forgotten(pair[0], pair[1], content, axis) for pair, axis in pairs)
            return AttentionBias(Places(by_row, by_column), dtype=q.dtype)

    def log_gates(self, content: Content) -> Float[Tensor, "axes ways batch heads tokens"]:
        """log sigmoid(w . x_k + c), outside of autocast."""
        tokens = content.read_tokens(self.name, self.dim)
        gates = torch.einsum("bnd,awhd->awbhn", tokens, full_precision(self.weight))
        return F.logsigmoid(gates + full_precision(self.offset)[:, :, None, :, None])


def forgotten(
    backwards: Float[Tensor, "batch heads tokens"], onwards: Float[Tensor, "batch heads tokens"], content: Content, axis: Axis
) -> Float[Tensor, "batch heads tokens length"]:
    """The sum of the gates between a patch and every place m of its line: those after m up to it, or those after it up to m."""
    place = line_coordinate(content.grid, axis, backwards.device)
    after, before = sides(line_length(content.grid, axis), place)
    back, on = (_running_sums(gates, content, axis) for gates in (backwards, onwards))
    own = place[:, None].expand(*back.shape[:-1], 1)
    return (back.gather(-1, own) - back) * before + (on - on.gather(-1, own)) * after


def _running_sums(
    gates: Float[Tensor, "batch heads tokens"], content: Content, axis: Axis
) -> Float[Tensor, "batch heads tokens length"]:
    """For each patch the sums of the gates of its line up to every place, without those of patches that it does not see."""
    lines, seen = to_lines(gates[..., None], content.grid, axis).transpose(-2, -1), content.seen(axis)  # (.., lines, 1, S)
    lines = lines.cumsum(-1) if seen is None else lines
    each = from_lines(lines.expand(*lines.shape[:-2], lines.shape[-1], -1), axis)
    return each if seen is None else (each * seen.own).cumsum(-1)
