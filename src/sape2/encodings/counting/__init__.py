"""Fractional positions: sums of gates along a line, and tables read by interpolation between rows.

A line has S places (`length`); i, j, m are places within the line. A token i has a gate g_ij and a position p_im for each
place of its own line: gates, positions and vectors are (..., N, S), tokens first.

`readable` and `fast` have the same two functions, `count_positions` and `interpolate`, which give the same numbers up to
rounding. `form_for` chooses, and nothing else does.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from torch import Tensor

from sape2.encodings.counting import fast, readable
from sape2.encodings.derivatives import by_hand

MAX_POSITIONS = 2**20  # rows of a table: a position of its own for every token of the largest grids
Beyond = Literal["clamp", "rescale"]


def check_num_positions(encoding: str, number: int | None) -> None:
    if number is not None and not 2 <= number <= MAX_POSITIONS:
        wanted = f"at least 2, to interpolate between, and at most {MAX_POSITIONS}"
        raise ValueError(f"{encoding}:num_positions must be {wanted}; got {str(number)[:50]}")


def form_for(*tensors: Tensor) -> ModuleType:
    """`fast` on a CPU, where gradients may be written by hand; `readable` in graphs, in functional transforms and elsewhere."""
    return fast if tensors[0].device.type == "cpu" and by_hand(*tensors) else readable


def rescaled(positions: Tensor, beyond: Beyond, trained: int, length: int | Tensor) -> Tensor:
    """Rule for lines longer than in training: clamp leaves positions alone, rescale maps them onto the trained range."""
    if beyond == "clamp":
        return positions
    if isinstance(length, int):
        return positions * min(1.0, trained / length)
    return positions * (trained / as_length(length, positions)).clamp_max(1)


def as_length(length: int | Tensor, like: Tensor) -> Tensor:
    """A length that is no plain number: one for each patch, or one that an export leaves open."""
    return length.to(like.dtype) if isinstance(length, Tensor) else like.new_full((), length)
