"""The equations as slow, literal loops in float64: one function per encoding, one head at a time.

Nothing in the package imports this file and it imports nothing of the package, so agreement with it means something.
Tensors here are for one head: q and k are (N, d), a bias is (N, N); grid tokens are row-major, i = y * W + x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Grid = tuple[int, int]


def over_heads(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """`function(q, k)` for every image and head of (B, h, N, d), stacked to (B, h, ...)."""
    images = [torch.stack([function(q[b, h], k[b, h]) for h in range(q.shape[1])]) for b in range(q.shape[0])]
    return torch.stack(images)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_prefix: int) -> Tensor:
    """Softmax attention of one head over T = P + N tokens; the bias, (N, N), does not touch the P prefix tokens."""
    total, dim = q.shape
    output = torch.zeros(total, v.shape[1], dtype=torch.float64)
    for i in range(total):
        logits = []
        for n in range(total):
            logit = float(q[i] @ k[n]) / math.sqrt(dim)
            if i >= num_prefix and n >= num_prefix:
                logit += float(bias[i - num_prefix, n - num_prefix])
            logits.append(logit)
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        for n in range(total):
            output[i] += weights[n] / sum(weights) * v[n].double()
    return output


# --- SaPE2, arXiv:2505.09466 -----------------------------------------------------------------------------------------


def sape2(
    q: Tensor,
    k: Tensor,
    tables: dict[str, Tensor],
    grid: Grid,
    *,
    dot: str = "query",
    gates: str = "content",
    gate_scale: float | None = None,
    count: str = "suffix",
    readout: str = "distance",
    gain: float = 1.0,
    divide_bias: bool = False,
    normalize: str = "none",
    rescale: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Gates, positions, vectors (N, S) per axis and the bias (N, N), by equations 9 to 16.

    `tables` maps each axis ("x", "y", "raster") to its table; `gate_scale` None is 1/sqrt(d); `gain` carries the sign;
    `rescale` multiplies the positions of an axis.
    """
    q, k = q.double(), k.double()
    num_tokens, dim = q.shape
    scale = 1 / math.sqrt(dim) if gate_scale is None else gate_scale
    maps: dict[str, Tensor] = {}
    for axis, table in tables.items():
        gate_rows, position_rows, vector_rows = [], [], []
        for i in range(num_tokens):
            line = sape2_line(i, grid, axis)
            g = [sape2_gate(q[i], k[j], scale, gates) for j in line]
            p = sape2_positions(g, line.index(i), count)
            p = [value * (rescale or {}).get(axis, 1.0) for value in p]
            vector = q[i] if dot == "query" else k[i]
            z = [float(vector @ sape2_embedding(table.double(), value)) for value in p]
            if normalize == "sqrt_length":
                z = [value / math.sqrt(len(line)) for value in z]
            gate_rows.append(g)
            position_rows.append(p)
            vector_rows.append(z)
        maps[f"gates_{axis}"] = torch.tensor(gate_rows, dtype=torch.float64)
        maps[f"positions_{axis}"] = torch.tensor(position_rows, dtype=torch.float64)
        maps[f"vectors_{axis}"] = torch.tensor(vector_rows, dtype=torch.float64)
    bias = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        for n in range(num_tokens):
            for axis in tables:
                bias[i, n] += sape2_pair(maps[f"vectors_{axis}"], i, n, grid, axis, readout)
    maps["bias"] = gain * bias / (math.sqrt(dim) if divide_bias else 1.0)
    return maps


def sape2_line(i: int, grid: Grid, axis: str) -> list[int]:
    """The patches of i's own row (axis x), column (axis y), or all patches (raster), in order."""
    height, width = grid
    y, x = i // width, i % width
    if axis == "x":
        return [y * width + column for column in range(width)]
    if axis == "y":
        return [row * width + x for row in range(height)]
    return list(range(height * width))


def sape2_gate(q_i: Tensor, k_j: Tensor, scale: float, gates: str) -> float:
    """Eq. 9, or the content-free gates of the ablation."""
    if gates == "constant":
        return 0.5
    if gates == "none":
        return 1.0
    return 1 / (1 + math.exp(-scale * float(q_i @ k_j)))


def sape2_positions(g: list[float], i: int, count: str) -> list[float]:
    """Eq. 10 for every place m of the line of i; g[j] is the gate of i on place j."""
    length = len(g)
    suffix = [sum(g[j] for j in range(length) if j >= m) for m in range(length)]
    prefix = [sum(g[j] for j in range(length) if j <= m) for m in range(length)]
    if count == "suffix":
        return suffix
    if count == "prefix":
        return prefix
    if count == "both":
        return suffix + prefix
    positions = []
    for m in range(length):
        total, j = 0.0, i
        if count == "between":
            while j != m:
                j += 1 if m > i else -1
                total += g[j]
        else:  # cyclic: walk to the right from i until m, both counted
            total = g[i]
            while j != m:
                j = (j + 1) % length
                total += g[j]
        positions.append(total)
    return positions


def sape2_embedding(table: Tensor, p: float) -> Tensor:
    """Eq. 11: between the rows floor(p) and ceil(p); positions beyond the table are clamped to its last row."""
    p = min(p, len(table) - 1)
    low, high = math.floor(p), math.ceil(p)
    return table[low] + (p - low) * (table[high] - table[low])


def sape2_pair(vectors: Tensor, i: int, n: int, grid: Grid, axis: str, readout: str) -> float:
    """Eq. 15 for one pair and one axis, or another read-out."""
    if readout == "direct":
        line = sape2_line(n, grid, axis)
        place = line.index(n)
        halves = vectors.shape[1] // len(line)
        return sum(float(vectors[i, half * len(line) + place]) for half in range(halves))
    squared = sum((float(a) - float(b)) ** 2 for a, b in zip(vectors[i], vectors[n], strict=True))
    return squared if readout == "squared_distance" else math.sqrt(squared)
