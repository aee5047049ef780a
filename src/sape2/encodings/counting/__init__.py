"""Fractional positions: sums of gates along a line, and tables read by interpolation between rows.

A line has S places (`length`); i, j, m are places within the line. A token i has a gate g_ij and a position p_im for each
place of its own line: gates, positions and vectors are (..., N, S), tokens first.

`readable` and `fast` have the same two functions, `count_positions` and `interpolate`, which give the same numbers up to
rounding. `form_for` chooses, and nothing else does.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sape2.encodings.counting import fast, readable
from sape2.encodings.derivatives import by_hand


def form_for(*tensors: Tensor) -> ModuleType:
    """`fast` on a CPU, where gradients may be written by hand; `readable` in graphs, in functional transforms and elsewhere."""
    return fast if tensors[0].device.type == "cpu" and by_hand(*tensors) else readable


def rescaling(trained: int, length: int | Tensor, like: Tensor) -> float | Tensor:
    """min(1, trained / length), which maps longer lines onto the trained range; a tensor where lengths differ or are open."""
    if isinstance(length, int):
        return min(1.0, trained / length)
    return (trained / as_length(length, like)).clamp_max(1)


def as_length(length: int | Tensor, like: Tensor) -> Tensor:
    """A length that is no plain number: one for each patch, or one that an export leaves open."""
    return length.to(like.dtype) if isinstance(length, Tensor) else like.new_full((), length)
