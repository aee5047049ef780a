"""What the benchmarks compare: plain attention, this package's encodings, and the forms other people have.

A contender is a module that turns q, k, v (B, h, N, d) into the output of attention. Ours and its peers start from the
same tables, so they compute the same numbers (`tests/benchmarks/test_benchmark_peers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import straightforward
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor, nn

from sape2.attention import attend, describe_path
from sape2.encodings import AttentionBias, AttentionEncoding, SaPE2, create_encoding
from sape2.encodings.bias import Matrix
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid
from sape2.models.vit import ViT


class Peer(nn.Module):
    """`function(q, k, v, **tables)` with tables that learn."""

    def __init__(self, function: Callable[..., Tensor], path: str, **tables: Tensor) -> None:
        super().__init__()
        self.function, self.path = function, path
        self.tables = nn.ParameterDict({name: nn.Parameter(table.detach().clone()) for name, table in tables.items()})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v, **self.tables)

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return self.path


class Ours(nn.Module):
    """This package's attention under an encoding whose tables are drawn at random, the ones that start at zero too."""

    def __init__(self, name: str, heads: int, head_dim: int, grid: Grid, table_std: float = 0.02) -> None:
        super().__init__()
        self.grid = grid
        self.encoding = create_encoding(name, heads, head_dim, grid)
        for table in self.encoding.parameters():
            nn.init.trunc_normal_(table, std=table_std)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.grid, self.encoding)

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return describe_path(q, k, v, self.grid, self.encoding)


def sam(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, grid: Grid, fused: bool) -> Tensor:
    """timm's SAM attention around timm's own bias; it takes one image and head as one item of the batch."""
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    bias = get_decomposed_rel_pos_bias(flat_q, rows, columns, grid, grid)
    if fused:
        output = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=bias)
    else:
        output = straightforward.plain(flat_q, flat_k, flat_v, bias)
    return output.unflatten(0, q.shape[:2])


def straightforward_sape2(encoding: SaPE2, grid: Grid, **mode: str) -> Peer:
    """With the tables of ours; `mode` is how torch.cdist computes."""
    function = partial(straightforward.sape2, grid=grid, **mode)
    return Peer(function, "products, maps (B, h, N, N)", table_x=encoding.table_x, table_y=encoding.table_y)


PLAIN = "plain: products"
PLAIN_FUSED = "plain: fused kernel"


def contenders(heads: int, head_dim: int, grid: Grid, table_std: float = 0.02) -> dict[str, Any]:
    """Every contender by name; peers have the tables of ours."""
    ours = partial(Ours, heads=heads, head_dim=head_dim, grid=grid, table_std=table_std)
    distance, decomposed, contextual, cope = map(ours, ("sape2", "rpe_decomposed", "rpe_contextual", "cope"))
    sam_tables = {"rows": decomposed.encoding.table_y.flip(0), "columns": decomposed.encoding.table_x.flip(0)}
    irpe = partial(straightforward.irpe, index=straightforward.irpe_index(grid))
    return {
        PLAIN: Peer(straightforward.plain, "products"),
        PLAIN_FUSED: Peer(F.scaled_dot_product_attention, "fused"),
        "none: ours": ours("none"),
        "sape2: straightforward": straightforward_sape2(distance.encoding, grid),
        "sape2: straightforward, exact cdist": straightforward_sape2(
            distance.encoding, grid, mode="donot_use_mm_for_euclid_dist"
        ),
        "sape2: ours": distance,
        "sape2 squared_distance: ours": ours("sape2:readout=squared_distance"),
        "sape2 direct: ours": ours("sape2:readout=direct"),
        "rpe_decomposed: timm, products": Peer(
            partial(sam, grid=grid, fused=False), "products, map (B, h, N, N)", **sam_tables
        ),
        "rpe_decomposed: timm, fused": Peer(partial(sam, grid=grid, fused=True), "fused with a map", **sam_tables),
        "rpe_decomposed: ours": decomposed,
        "rpe_contextual: iRPE": Peer(irpe, "products, map (B, h, N, N)", table=contextual.encoding.table.flatten(0, 2)),
        "rpe_contextual: ours": contextual,
        "cope: published listing": Peer(straightforward.cope, "products, map (B, h, N, N)", table=cope.encoding.table),
        "cope: ours": cope,
    }


class StraightforwardSaPE2(AttentionEncoding):
    """The straightforward bias with the tables of a SaPE2 encoding, to be put into a model."""

    def __init__(self, encoding: SaPE2) -> None:
        nn.Module.__init__(self)
        self.table_x, self.table_y = encoding.table_x, encoding.table_y

    def make_bias(self, content: Content) -> AttentionBias:
        bias = straightforward.sape2_bias(content.q, content.k, self.table_x, self.table_y, content.grid)
        return AttentionBias(Matrix(bias))


def make_straightforward(model: ViT) -> ViT:
    """The same model, its SaPE2 encodings replaced by the straightforward form; float32 only."""
    for block in model.layers():
        if isinstance(block.attn.encoding, SaPE2):
            block.attn.encoding = StraightforwardSaPE2(block.attn.encoding)
    return model


def random_tokens(
    images: int, heads: int, grid: Grid, head_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """q, k, v that need a gradient, and the gradient of the output."""
    shape = (images, heads, grid[0] * grid[1], head_dim)
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=index < 3) for index in range(4)]
