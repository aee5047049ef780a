"""Geometry of the token grid: the only file that defines coordinates, token order, lines and prefix tokens.

Axes: B batch, N = H*W grid tokens, P prefix tokens (class, register), T = P + N, d features.
Grid tokens are row-major: token i stands at row y = i // W and column x = i % W. Prefix tokens come first.
Coordinates are (y, x), in patches, from 0.

A *line* is a sequence of tokens that a one-dimensional encoding runs along: axis "x" has H lines (rows) of W tokens,
axis "y" has W lines (columns) of H tokens, axis "raster" is one line of all N tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Grid = tuple[int, int]
Axis = Literal["x", "y", "raster"]


def check_grid(grid: Any) -> Grid:
    """The grid as a tuple of two positive ints (symbolic ones in a traced graph); raises ValueError for anything else."""
    sides = tuple(map(as_whole, grid)) if isinstance(grid, Iterable) else ()
    if len(sides) != 2 or any(n is None or n < 1 for n in sides):
        raise ValueError(f"grid needs two positive integers (H, W); got {grid!r}")
    return sides


def as_whole(number: Any) -> Any:
    """A whole number of any library as an int, a symbolic one as it is; None for anything else."""
    if isinstance(number, (int, torch.SymInt)):
        return None if isinstance(number, bool) else number
    try:
        return operator.index(number)
    except TypeError:
        return None


def check_heads(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Both as ints; raises ValueError unless they are positive whole numbers."""
    heads, width = as_whole(num_heads), as_whole(head_dim)
    if heads is None or width is None or min(heads, width) < 1:
        raise ValueError(f"num_heads and head_dim must be positive integers; got {num_heads!r} and {head_dim!r}")
    return heads, width


def width_of_heads(dim: int, num_heads: int) -> int:
    """d = D / h; raises ValueError unless the heads divide the width."""
    width, heads = as_whole(dim), as_whole(num_heads)
    if width is None or heads is None or min(width, heads) < 1 or width % heads:
        raise ValueError(f"the width must be divisible by the number of heads; got dim={dim!r}, num_heads={num_heads!r}")
    return width // heads


def as_grid(height: int, width: int) -> Grid:
    """(H, W) from the sides of a tensor; as numbers in `torch.jit.trace`, where they are tensors, and which is for one size."""
    return (int(height), int(width)) if torch.jit.is_tracing() else (height, width)


def of_one_size(maps: Shaped[Tensor, "*lead height width"]) -> Shaped[Tensor, "*lead height width"]:
    """The same maps; in `torch.jit.trace`, which has their sides as numbers, by a step that refuses all others."""
    if not torch.jit.is_tracing():
        return maps
    height, width = as_grid(maps.shape[-2], maps.shape[-1])
    return maps.split([height], dim=-2)[0].split([width], dim=-1)[0]


def is_symbolic(grid: Grid) -> bool:
    """True while a graph for any size is traced; no branch may then depend on the size of the grid."""
    return any(isinstance(n, torch.SymInt) for n in grid)


def num_tokens(grid: Grid) -> int:
    height, width = grid
    return height * width


def num_prefix_tokens(total: int, grid: Grid) -> int:
    """P = T - N; raises ValueError if the sequence is shorter than the grid."""
    if total < num_tokens(check_grid(grid)):
        raise ValueError(f"grid {grid} has {num_tokens(grid)} tokens but the sequence has only {total}")
    return total - num_tokens(grid)


def check_tokens(tokens: Tensor, grid: Grid) -> None:
    """Raises ValueError unless `tokens` is (..., H*W, d)."""
    if tokens.shape[-2] != num_tokens(grid):
        raise ValueError(f"grid {tuple(grid)} needs {num_tokens(grid)} tokens; got {tokens.shape[-2]}")


def coordinates(grid: Grid, device: torch.device | None = None) -> Int[Tensor, "tokens 2"]:
    """(y, x) of every grid token, in patches."""
    height, width = grid
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack([y[:, None].expand(grid), x.expand(grid)], dim=-1).flatten(0, 1)


def offsets(grid: Grid, device: torch.device | None = None) -> Int[Tensor, "tokens tokens 2"]:
    """(dy, dx) from token i to token n, in patches."""
    yx = coordinates(grid, device)
    return yx[None] - yx[:, None]


def num_offsets(grid: Grid) -> tuple[int, int]:
    """The numbers of row and column offsets of a grid: (2 H - 1, 2 W - 1)."""
    height, width = grid
    return 2 * height - 1, 2 * width - 1


def offset_index(grid: Grid, rows: int, columns: int, device: torch.device) -> Int[Tensor, "tokens tokens"]:
    """Index of the offset of every pair (i, n) in a flattened table of (rows, columns) offsets, offset 0 in the middle."""
    dy, dx = offsets(grid, device).unbind(-1)
    last_y, last_x = rows // 2, columns // 2
    return (dy.clamp(-last_y, last_y) + last_y) * columns + dx.clamp(-last_x, last_x) + last_x


def line_length(grid: Grid, axis: Axis) -> int:
    """Tokens in one line of `axis`: W for x, H for y, N for raster."""
    height, width = grid
    return {"x": width, "y": height, "raster": height * width}[axis]


def line_coordinate(grid: Grid, axis: Axis, device: torch.device | None = None) -> Int[Tensor, " tokens"]:
    """Place of every grid token within its line: x for axis x, y for axis y, i for raster."""
    if axis == "raster":
        return torch.arange(num_tokens(grid), device=device)
    return coordinates(grid, device)[:, {"y": 0, "x": 1}[axis]]


def to_lines(
    tokens: Shaped[Tensor, "*lead tokens features"], grid: Grid, axis: Axis
) -> Shaped[Tensor, "*lead lines length features"]:
    """Grid tokens cut into the lines of `axis`. Inverse: `from_lines`."""
    if axis == "raster":
        return tokens.unsqueeze(-3)
    rows = tokens.unflatten(-2, grid)
    return rows if axis == "x" else rows.transpose(-3, -2)


def from_lines(lines: Shaped[Tensor, "*lead lines length features"], axis: Axis) -> Shaped[Tensor, "*lead tokens features"]:
    """Lines of `axis` put back into row-major token order."""
    return (lines.transpose(-3, -2) if axis == "y" else lines).flatten(-3, -2)


def own_line(
    pairs: Shaped[Tensor, "*lead tokens tokens"], grid: Grid, axis: Axis
) -> Shaped[Tensor, "*lead length height width"]:
    """The part of a map over all pairs (i, n) of grid tokens in which n is in i's own line of `axis`, as a view.

    The place of n in the line comes first, then the row and the column of i.
    """
    if axis == "raster":
        return pairs.unflatten(-2, grid).movedim(-1, -3)
    by_coordinate = pairs.unflatten(-1, grid).unflatten(-3, grid)  # (..., y, x, y', x')
    if axis == "x":
        return by_coordinate.diagonal(dim1=-4, dim2=-2).movedim(-3, -1)  # (..., x, x', y) -> (..., x', y, x)
    return by_coordinate.diagonal(dim1=-3, dim2=-1).transpose(-3, -2)  # (..., y, y', x) -> (..., y', y, x)
