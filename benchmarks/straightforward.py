"""Attention under SaPE2, CoPE and iRPE as one writes it down from the papers: the peers that the fast forms must beat.

Nothing here is shared with `sape2`. Shapes: q, k, v are (B, h, N, d), unscaled, N = H*W in row-major order; a table is
(positions, d). `tests/benchmarks/test_benchmark_peers.py` holds these forms against the literal loops of `sape2.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, written with matrix products."""
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v


def fractional(query: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """query^T e[p] at fractional positions: dotted at all integers, gathered at floor and ceil, mixed (eq. 13, 14; CoPE)."""
    positions = positions.clamp(max=len(table) - 1)
    low, high = positions.floor().long(), positions.ceil().long()
    at_integers = query @ table.T
    share = positions - low
    return share * at_integers.gather(-1, high) + (1 - share) * at_integers.gather(-1, low)


def suffix_counts(logits: Tensor) -> Tensor:
    """The running sum of the gates from the end: flip, sum, flip (eq. 9, 10; CoPE)."""
    return torch.sigmoid(logits).flip(-1).cumsum(-1).flip(-1)


# --- SaPE2, arXiv:2505.09466, appendix D -----------------------------------------------------------------------------


def sape2_vectors(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """What each patch sees along its line, eq. 9 to 14; q and k are (B, h, lines, S, d), the result (B, h, lines, S, S)."""
    return fractional(q, table, suffix_counts(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])))


def sape2_bias(
    q: Tensor, k: Tensor, table_x: Tensor, table_y: Tensor, grid: Grid, mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> Tensor:
    """Eq. 15 along rows plus the same along columns, (B, h, N, N); `mode` is how torch.cdist computes a distance."""
    rows_q, rows_k = q.unflatten(2, grid), k.unflatten(2, grid)
    columns_q, columns_k = rows_q.transpose(2, 3), rows_k.transpose(2, 3)
    vectors_x = sape2_vectors(rows_q, rows_k, table_x).flatten(2, 3)
    vectors_y = sape2_vectors(columns_q, columns_k, table_y).transpose(2, 3).flatten(2, 3)
    return torch.cdist(vectors_x, vectors_x, compute_mode=mode) + torch.cdist(vectors_y, vectors_y, compute_mode=mode)


def sape2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_x: Tensor,
    table_y: Tensor,
    grid: Grid,
    mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    return plain(q, k, v, sape2_bias(q, k, table_x, table_y, grid, mode))


# --- CoPE, arXiv:2405.18719 ------------------------------------------------------------------------------------------


def cope(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The listing of the paper on scaled queries, without its causal mask, along the raster order."""
    q = q / math.sqrt(q.shape[-1])
    logits = q @ k.transpose(-1, -2)
    logits = logits + fractional(q, table, suffix_counts(logits))
    return logits.softmax(-1) @ v


# --- iRPE, arXiv:2107.14222 ------------------------------------------------------------------------------------------


def irpe_index(grid: Grid) -> Tensor:
    """Where query i finds its product with the vector of the offset from i to n, in the flattened products; (N*N,).

    The library keeps it from call to call, so it is made once.
    """
    height, width = grid
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    offset = (y[None] - y[:, None] + height - 1) * (2 * width - 1) + x[None] - x[:, None] + width - 1  # (N, N)
    return (offset + torch.arange(height * width)[:, None] * (2 * height - 1) * (2 * width - 1)).flatten()


def irpe(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Contextual, on keys, heads shared, as in the library without its CUDA operator: all products, then one look-up."""
    q = q / math.sqrt(q.shape[-1])
    products = (q @ table.T).flatten(2)  # (B, h, N * offsets)
    bias = products[:, :, index].unflatten(-1, (q.shape[2], k.shape[2]))
    return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
