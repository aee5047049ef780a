"""What the tests of encodings share: names worth testing, random parameters and content, the table of docs/method.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sape2.encodings import AttentionEncoding, TokenEncoding, create_encoding, find_encoding, list_encodings
from sape2.encodings.grid import Grid, num_tokens

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM

VARIANTS = [
    *list_encodings(),
    *(f"{name}:{variant}" for name in list_encodings() for variant in find_encoding(name).variants),
    "cpe:padding=circular",
    "key_table:by=token,to=both,heads=shared,divide_bias=false",
    "rope:beyond=rescale",
    "rope:coordinates=min",
    "rope:spread=golden,temperature=10,fastest=3",
    "rope_mixed:init=axes",
    "pape:parabolas=3",
    "rpe:beyond=clamp",
    "rpe_contextual:heads=each,divide_bias=false",
    "alibi:metric=manhattan",
    "alibi:slopes=learned",
    "sape2:gates=constant,count=both,axes=raster",
    "sape2:gates=constant,count=between",
    "sape2:gates=constant,count=cyclic",
    "sape2:count=cyclic,axes=raster",
    "sape2:count=cyclic,readout=squared_distance",
    "sape2:count=between,axes=y",
    "sape2:readout=direct,axes=x",
    "sape2:readout=direct,count=both",
    "sape2:readout=direct,count=cyclic",
    "sape2:readout=direct,count=between,axes=raster",
    "sape2:readout=direct,gates=none",
    "sape2:readout=direct,gates=constant,count=both",
    "sape2:readout=direct,gates=constant,count=between",
    "sape2:readout=direct,gates=constant,count=cyclic",
    "sape2:readout=direct,gates=none,count=between,axes=raster",
    "sape2:sign=learned,gate_scale=learned,normalize=sqrt_length",
    "rope+sape2",
    "rope+alibi",
    "pape+forget+cope",
]

Encoding = TokenEncoding | AttentionEncoding


def make(name: str, grid: Grid) -> Encoding:
    """The encoding in float64 with random parameters, in evaluation: some move places at random in training."""
    return randomised(create_encoding(name, HEADS, HEAD_DIM, grid)).eval()


def randomised(module: nn.Module, std: float = 1.0) -> nn.Module:
    for parameter in module.double().requires_grad_(False).parameters():
        parameter.normal_(std=std)
    return module


def content(*shape: int) -> Tensor:
    """(..., 2 D): the queries and keys of all heads, or, its first half, the tokens."""
    return torch.randn(*shape, 2 * DIM, dtype=torch.float64)


def queries_and_keys(x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = x.unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    return q, k


def joined(q: Tensor) -> Tensor:
    """Tokens (B, N, D) that hold the queries of all heads side by side, for encodings that read the input of the block."""
    return q.transpose(1, 2).flatten(2)


class Row(NamedTuple):
    """One encoding in the table at a glance; `parameters` and `macs` are formulas, see `evaluate`."""

    name: str
    parameters: str
    macs: str
    exact: str


def documented() -> Iterator[Row]:
    """Every row of the table at a glance in docs/method.md; raises TypeError for a row with a cell too many or too few."""
    page = Path(__file__).parents[2] / "docs" / "method.md"
    for line in page.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        if cells and cells[0].partition(":")[0] in list_encodings():
            yield Row(cells[0], *cells[4:])


def evaluate(formula: str, num_heads: int, head_dim: int, grid: Grid) -> int:
    """The value of a documented formula in h heads, d head_dim, an H by W grid and N = H*W."""
    sizes = {"h": num_heads, "d": head_dim, "H": grid[0], "W": grid[1], "N": num_tokens(grid), "max": max}
    return eval(formula, {"__builtins__": {}}, sizes)
