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
    visible: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gates, positions, vectors (N, S) per axis and the bias (N, N), by equations 9 to 16.

    `tables` maps each axis ("x", "y", "raster") to its table; `gate_scale` None is 1/sqrt(d); `gain` carries the sign;
    `rescale` multiplies the positions of an axis; `visible`, (N, N), says which patches j a patch i sees.
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
            seen = [True for _ in line]
            if visible is not None:
                g = [gate if visible[i, j] else 0.0 for gate, j in zip(g, line, strict=True)]
                seen = [any(visible[i, j] for j in sape2_across(m, grid, axis)) for m in range(len(line))]
            p = sape2_positions(g, line.index(i), count)
            p = [value * (rescale or {}).get(axis, 1.0) for value in p]
            vector = q[i] if dot == "query" else k[i]
            z = [float(vector @ sape2_embedding(table.double(), value)) for value in p]
            if normalize == "sqrt_length":
                z = [value / math.sqrt(max(1, sum(seen))) for value in z]
            z = [value if seen[m % len(line)] else 0.0 for m, value in enumerate(z)]
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


def sape2_across(m: int, grid: Grid, axis: str) -> list[int]:
    """The patches at place m of all lines of an axis: a column for the rows of axis x."""
    height, width = grid
    if axis == "x":
        return [y * width + m for y in range(height)]
    return [m * width + x for x in range(width)] if axis == "y" else [m]


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


# --- absolute and conditional: vectors that are added to the tokens, (N, D), or to keys -----------------------------


def ape(tokens: Tensor, table: Tensor) -> Tensor:
    """x_i + e[y, x] on the training grid, arXiv:2010.11929; `table` is (H, W, D)."""
    height, width, _ = table.shape
    output = torch.zeros_like(tokens, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            output[y * width + x] = tokens[y * width + x].double() + table[y, x].double()
    return output


def sincos(tokens: Tensor, grid: Grid, temperature: float = 10_000.0) -> Tensor:
    """x_i + [sin(x w), cos(x w), sin(y w), cos(y w)], w_f = temperature^(-f / (D / 4)), arXiv:2104.02057."""
    height, width = grid
    quarter = tokens.shape[1] // 4
    output = tokens.double().clone()
    for y in range(height):
        for x in range(width):
            for f in range(quarter):
                w = temperature ** (-f / quarter)
                for part, value in enumerate((math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w))):
                    output[y * width + x, part * quarter + f] += value
    return output


def cpe(tokens: Tensor, weight: Tensor, offset: Tensor, grid: Grid, padding: str = "zeros") -> Tensor:
    """x_i + sum over the 3x3 neighbours of i, channel by channel, arXiv:2102.10882; `weight` is (D, 3, 3), `offset` (D)."""
    height, width = grid
    output = tokens.double() + offset.double()
    for y in range(height):
        for x in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    row, column = y + dy, x + dx
                    if padding == "circular":
                        row, column = row % height, column % width
                    if 0 <= row < height and 0 <= column < width:
                        output[y * width + x] += weight[:, dy + 1, dx + 1].double() * tokens[row * width + column].double()
    return output


def key_table(q: Tensor, k: Tensor, keys: Tensor, queries: Tensor | None, grid: Grid, divide_bias: bool = True) -> Tensor:
    """b_in = (q_i + a_i)^T (k_n + e_n) - q_i^T k_n, over sqrt(d); `keys` e and `queries` a are (H, W, d), for one head."""
    width = grid[1]
    bias = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        for n in range(len(q)):
            query = q[i].double() if queries is None else q[i].double() + queries[i // width, i % width].double()
            key = k[n].double() + keys[n // width, n % width].double()
            bias[i, n] = query @ key - q[i].double() @ k[n].double()
    return bias / math.sqrt(q.shape[1]) if divide_bias else bias


# --- rotary: turned vectors, (N, d) ----------------------------------------------------------------------------------


def rope(
    vectors: Tensor,
    grid: Grid,
    temperature: float = 100.0,
    rescale: tuple[float, float] = (1.0, 1.0),
    *,
    coordinates: str = "patches",
    directions: int = 2,
    spread: str = "uniform",
    fastest: float = 1.0,
    order: str = "xy",
    layout: str = "pairs",
) -> Tensor:
    """Axial RoPE, arXiv:2403.13298, Spiral RoPE, golden gate RoPE and that of DINOv3; `rescale` multiplies (y, x)."""
    height, width = grid
    planes = vectors.shape[1] // 2
    output = torch.zeros_like(vectors, dtype=torch.float64)
    for i in range(len(vectors)):
        y, x = (i // width) * rescale[0], (i % width) * rescale[1]
        if coordinates != "patches":
            rows = {"separate": height, "min": min(grid), "max": max(grid)}[coordinates]
            columns = {"separate": width, "min": min(grid), "max": max(grid)}[coordinates]
            y, x = 2 * math.pi * (2 * (y + 0.5) / rows - 1), 2 * math.pi * (2 * (x + 0.5) / columns - 1)
        for f in range(planes):
            if spread == "spiral":  # those of axial RoPE, dealt out in pairs to the directions of a quarter of a turn
                each, quarter = planes // directions, directions // 2
                own = [m for m in range(planes // 2) if m // 2 % quarter == f // each % quarter]
                length = temperature ** (-own[f % each] / (planes // 2))
                direction = (f // each) * math.pi / directions
            elif spread == "golden":
                length, direction = temperature ** (f / (planes - 1) - 1), f * math.pi / ((1 + math.sqrt(5)) / 2)
            else:
                each = planes // directions
                length, direction = temperature ** (-(f % each) / each), (f // each) * math.pi / directions
            one, other = (x, y) if order == "xy" else (y, x)
            angle = fastest * length * (one * math.cos(direction) + other * math.sin(direction))
            first, second = (2 * f, 2 * f + 1) if layout == "pairs" else (f, f + planes)
            a, b = float(vectors[i, first]), float(vectors[i, second])
            output[i, first] = a * math.cos(angle) - b * math.sin(angle)
            output[i, second] = a * math.sin(angle) + b * math.cos(angle)
    return output


def rope_mixed(vectors: Tensor, frequencies: Tensor, grid: Grid, rescale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """RoPE-mixed, arXiv:2403.13298: plane f, channels 2f and 2f + 1, turns by x w^x_f + y w^y_f; `frequencies` is (2, d/2)."""
    width = grid[1]
    output = torch.zeros_like(vectors, dtype=torch.float64)
    for i in range(len(vectors)):
        y, x = (i // width) * rescale[0], (i % width) * rescale[1]
        for f in range(vectors.shape[1] // 2):
            angle = x * float(frequencies[0, f]) + y * float(frequencies[1, f])
            a, b = float(vectors[i, 2 * f]), float(vectors[i, 2 * f + 1])
            output[i, 2 * f] = a * math.cos(angle) - b * math.sin(angle)
            output[i, 2 * f + 1] = a * math.sin(angle) + b * math.cos(angle)
    return output


def pope(
    q: Tensor,
    k: Tensor,
    phase: Tensor,
    grid: Grid,
    head: int,
    temperature: float = 100.0,
    places: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The difference to q_i . k_n of sum_c softplus(q_ic) softplus(k_nc) cos((p_n - p_i) w_c + delta_c), over sqrt(d),

    arXiv:2509.10534, half of the channels with x and half with y; `phase` is (h, d), `places` multiplies (y, x).
    """
    width, dim = grid[1], q.shape[1]
    bias = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        for n in range(len(q)):
            dy, dx = (n // width - i // width) * places[0], (n % width - i % width) * places[1]
            for c in range(dim):
                step = dx if c < dim // 2 else dy
                angle = step * temperature ** (-(c % (dim // 2)) / (dim // 2))
                query, key = float(q[i, c]), float(k[n, c])
                lengths = math.log(1 + math.exp(query)) * math.log(1 + math.exp(key))
                bias[i, n] += lengths * math.cos(angle + float(phase[head, c])) - query * key
    return bias / math.sqrt(dim)


# --- relative: biases, (N, N) ----------------------------------------------------------------------------------------


def relative_row(offset: int, rows: int) -> int:
    """The row of a table of `rows` offsets, 0 in the middle, for an offset; the nearest one if it has none."""
    return min(max(offset + rows // 2, 0), rows - 1)


def rpe(table: Tensor, grid: Grid) -> Tensor:
    """b_in = table[dy, dx], arXiv:2103.14030; `table` is (rows, columns), for one head."""
    height, width = grid
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for n in range(height * width):
            row = relative_row(n // width - i // width, table.shape[0])
            column = relative_row(n % width - i % width, table.shape[1])
            bias[i, n] = table[row, column]
    return bias


def rpe_contextual(q: Tensor, table: Tensor, grid: Grid, divide_bias: bool = True) -> Tensor:
    """b_in = q_i^T e[dy, dx] / sqrt(d), arXiv:2107.14222; `table` is (rows, columns, d), for one head."""
    width = grid[1]
    bias = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        for n in range(len(q)):
            row = relative_row(n // width - i // width, table.shape[0])
            column = relative_row(n % width - i % width, table.shape[1])
            bias[i, n] = q[i].double() @ table[row, column].double()
    return bias / math.sqrt(q.shape[1]) if divide_bias else bias


def rpe_decomposed(q: Tensor, table_y: Tensor, table_x: Tensor, grid: Grid) -> Tensor:
    """b_in = q_i^T R_y[dy] + q_i^T R_x[dx], arXiv:2112.01526; tables are (offsets, d)."""
    width = grid[1]
    bias = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        for n in range(len(q)):
            along_y = table_y[relative_row(n // width - i // width, len(table_y))].double()
            along_x = table_x[relative_row(n % width - i % width, len(table_x))].double()
            bias[i, n] = q[i].double() @ along_y + q[i].double() @ along_x
    return bias


def resize_linear(table: Tensor, rows: int) -> Tensor:
    """`table` (old rows, d) at `rows` places, linear; row centres lie at (r + 1/2) / rows of the length."""
    old = len(table)
    output = torch.zeros(rows, table.shape[1], dtype=torch.float64)
    for r in range(rows):
        place = max((r + 0.5) * old / rows - 0.5, 0.0)
        low = min(math.floor(place), old - 1)
        high = min(low + 1, old - 1)
        output[r] = (1 - (place - low)) * table[low].double() + (place - low) * table[high].double()
    return output


def resize_bicubic(table: Tensor, rows: int, columns: int) -> Tensor:
    """`table` (old rows, old columns) at (rows, columns) places, cubic convolution with a = -0.75, edges repeated."""
    old_rows, old_columns = table.shape
    output = torch.zeros(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            y, x = (r + 0.5) * old_rows / rows - 0.5, (c + 0.5) * old_columns / columns - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = table[min(max(m, 0), old_rows - 1), min(max(n, 0), old_columns - 1)]
                    output[r, c] += cubic_weight(y - m) * cubic_weight(x - n) * float(value)
    return output


def cubic_weight(distance: float, a: float = -0.75) -> float:
    """The cubic convolution kernel."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def alibi(slope: float, grid: Grid, metric: str = "euclidean") -> Tensor:
    """b_in = -slope * distance(i, n), arXiv:2108.12409 with the distance of the plane, for one head."""
    height, width = grid
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for n in range(height * width):
            dy, dx = n // width - i // width, n % width - i % width
            bias[i, n] = -slope * (abs(dy) + abs(dx) if metric == "manhattan" else math.hypot(dy, dx))
    return bias


LOOKHERE = {  # fields of view by the names of the authors' code, in its order; ^ is the quarter of the plane around a side
    180: ["up", "down", "left", "right"],
    90: ["up left", "up right", "down left", "down right", "^up", "^down", "^left", "^right"],
    45: ["^up left", "^down left", "^left up", "^right up", "^up right", "^down right", "^left down", "^right down"],
}


def lookhere(grid: Grid, head: int, num_heads: int, view: int = 90, outside: str = "hidden", slope: float = 2.0) -> Tensor:
    """b_in = -slope slope_h |p_i - p_n| within the field of view of the head, arXiv:2405.13985, and -500 outside of it, or,

    for outside = "far", what it would be between two corners of the grid.
    """
    height, width = grid
    fields, directed = LOOKHERE[view], 4
    while 6 * directed / 4 + 3 <= num_heads:  # fours of heads, as near to two thirds of all as can be
        directed += 4
    directed = min(directed, num_heads)
    sides = fields[head % len(fields)].split() if head < directed else []
    own_slope = 0.5 ** (1 + head // len(fields))
    if head >= directed:
        around = num_heads - directed
        own_slope = [1 / 4, 1 / 16, 1 / 64, 1 / 256][4 * (head - directed) // max(around, 4)]
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for n in range(height * width):
            dy, dx = n // width - i // width, n % width - i % width
            seen = {"up": dy <= 0, "down": dy >= 0, "left": dx <= 0, "right": dx >= 0}
            seen |= {"^up": -dy >= abs(dx), "^down": dy >= abs(dx), "^left": -dx >= abs(dy), "^right": dx >= abs(dy)}
            bias[i, n] = -slope * own_slope * math.hypot(dy, dx)
            if not all(seen[side] for side in sides):
                bias[i, n] = -500.0 if outside == "hidden" else -slope * own_slope * math.hypot(height - 1, width - 1)
    return bias


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of ALiBi: powers of 2^(-8 / h), and its rule for a number of heads that is no power of two."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    slopes = [2 ** (-8 * m / power) for m in range(1, power + 1)]
    finer = [2 ** (-8 * m / (2 * power)) for m in range(1, 2 * power + 1)]
    return slopes + finer[0::2][: num_heads - power]


# --- CoPE, arXiv:2405.18719 ------------------------------------------------------------------------------------------


def cope(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    *,
    count: str = "suffix",
    divide_bias: bool = True,
    rescale: float = 1.0,
    visible: Tensor | None = None,
) -> Tensor:
    """b_in = q_i^T e[p_in] / sqrt(d) along the raster order; `rescale` multiplies the positions; i sees j if visible[i, j]."""
    q, k, table = q.double(), k.double(), table.double()
    num_tokens, dim = q.shape
    bias = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        gates = [1 / (1 + math.exp(-float(q[i] @ k[j]) / math.sqrt(dim))) for j in range(num_tokens)]
        if visible is not None:
            gates = [gates[j] if visible[i, j] else 0.0 for j in range(num_tokens)]
        for n in range(num_tokens):
            if count == "suffix":
                counted = range(n, num_tokens)
            elif count == "causal":
                counted = range(n, i + 1)
            else:  # between
                counted = range(i + 1, n + 1) if n > i else range(n, i)
            p = min(sum(gates[j] for j in counted) * rescale, len(table) - 1)
            low, high = math.floor(p), math.ceil(p)
            bias[i, n] = q[i] @ (table[low] + (p - low) * (table[high] - table[low]))
    return bias / math.sqrt(dim) if divide_bias else bias


# --- biases from a network of the offset: Swin V2 and FIRE -----------------------------------------------------------


def offset_network(u: float, v: float, first: Tensor, first_bias: Tensor, last: Tensor) -> float:
    """Two linear layers with a ReLU between, for one head: `first` is (width, 2), `last` (width)."""
    total = 0.0
    for unit in range(len(first)):
        hidden = float(first[unit, 0]) * u + float(first[unit, 1]) * v + float(first_bias[unit])
        total += float(last[unit]) * max(hidden, 0.0)
    return total


def log_cpb(network: Callable[[float, float], float], grid: Grid, trained: Grid) -> Tensor:
    """b_in = 16 sigmoid(f(u, v)) of the logarithmic offset from n to i, arXiv:2111.09883."""
    height, width = grid
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for n in range(height * width):
            coordinates = []
            for offset, size in ((i // width - n // width, trained[0]), (i % width - n % width, trained[1])):
                scaled = 8 * offset / (size - 1)
                coordinates.append(math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled))
            bias[i, n] = 16 / (1 + math.exp(-network(*coordinates)))
    return bias


def fire(network: Callable[[float, float], float], c: float, threshold: float, grid: Grid, trained: Grid) -> Tensor:
    """b_in = f(u, v), distances from n to i as shares of the largest on a logarithmic scale, arXiv:2310.04418 on two axes."""
    height, width = grid
    bias = torch.zeros(height * width, height * width, dtype=torch.float64)
    for i in range(height * width):
        for n in range(height * width):
            coordinates = []
            for offset, axis in ((i // width - n // width, 0), (i % width - n % width, 1)):
                largest = max(abs(threshold) * trained[axis], grid[axis] - 1)
                share = math.log(1 + abs(c) * abs(offset)) / (math.log(1 + abs(c) * largest) + 1e-6)
                coordinates.append(math.copysign(share, offset))
            bias[i, n] = network(*coordinates)
    return bias


# --- biases that read the input of the block: PaPE and forget gates --------------------------------------------------


def pape(q: Tensor, tokens: Tensor, curvature: Tensor, slope: Tensor, directions: Tensor, grid: Grid) -> Tensor:
    """b_in = (-sum_m a_im (p_im - p_nm)^2 + sum_m b_im (p_im - p_nm)) / sqrt(d), arXiv:2602.01418, for one head.

    `tokens` are (N, D), `curvature` and `slope` (M, D), `directions` (M, 2) in (y, x).
    """
    width = grid[1]
    bias = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i in range(len(tokens)):
        for m in range(len(directions)):
            a = math.log(1 + math.exp(float(curvature[m] @ tokens[i])))
            b = float(slope[m] @ tokens[i])
            for n in range(len(tokens)):
                p_i, p_n = (float(directions[m, 0]) * (t // width) + float(directions[m, 1]) * (t % width) for t in (i, n))
                bias[i, n] += -a * (p_i - p_n) ** 2 + b * (p_i - p_n)
    return bias / math.sqrt(q.shape[1])


def pape_rotation_invariant(q: Tensor, tokens: Tensor, curvature: Tensor, scale: float, grid: Grid) -> Tensor:
    """b_in = -a_i |s (p_i - p_n)|^2 / sqrt(d), PaPE-RI of arXiv:2602.01418, for one head; `curvature` is (D)."""
    width = grid[1]
    bias = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i in range(len(tokens)):
        a = math.log(1 + math.exp(float(curvature @ tokens[i])))
        for n in range(len(tokens)):
            dy, dx = i // width - n // width, i % width - n % width
            bias[i, n] = -a * ((scale * dy) ** 2 + (scale * dx) ** 2)
    return bias / math.sqrt(q.shape[1])


def forget(tokens: Tensor, weight: Tensor, offset: Tensor, grid: Grid, *, visible: Tensor | None = None) -> Tensor:
    """b_in, the sum of log sigmoid(w . x_k + c) on the way along i's row and column, arXiv:2503.02130 both ways.

    For one head: `weight` is (2 axes, 2 directions, D), `offset` (2, 2), with y and backwards first. Patches k that i does
    not see are left out: visible[i, k].
    """
    width = grid[1]

    def gate(i: int, axis: int, direction: int, y: int, x: int) -> float:
        if visible is not None and not visible[i, y * width + x]:
            return 0.0
        return -math.log(1 + math.exp(-float(weight[axis, direction] @ tokens[y * width + x] + offset[axis, direction])))

    bias = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i in range(len(tokens)):
        y, x = i // width, i % width
        for n in range(len(tokens)):
            row, column = n // width, n % width
            bias[i, n] += sum(gate(i, 0, 0, k, x) for k in range(row + 1, y + 1))
            bias[i, n] += sum(gate(i, 0, 1, k, x) for k in range(y + 1, row + 1))
            bias[i, n] += sum(gate(i, 1, 0, y, k) for k in range(column + 1, x + 1))
            bias[i, n] += sum(gate(i, 1, 1, y, k) for k in range(x + 1, column + 1))
    return bias
