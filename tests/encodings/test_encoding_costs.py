"""The column MACs of docs/method.md against what is counted: a model with the encoding less the same model without."""

from __future__ import annotations

from functools import cache

import pytest
from encoding_cases import documented, evaluate

from sape2.attention import module
from sape2.encodings import TokenEncoding, find_encoding
from sape2.encodings.grid import Grid
from sape2.evaluation.cost.operations import count_model_macs
from sape2.models.vit import create_model

# Grid, heads, head_dim: five numbers that differ, so that no symbol of a formula passes for another.
SIZES: list[tuple[Grid, int, int]] = [((3, 7), 2, 8), ((5, 2), 3, 8)]
DEPTH = 2  # what belongs to a layer comes twice, what belongs to the model once


def added_macs(name: str, grid: Grid, num_heads: int, head_dim: int, depth: int = DEPTH) -> int:
    """MACs of one image through a model with the encoding, less those of the same model without any; no prefix tokens."""
    return macs(name, grid, num_heads, head_dim, depth) - macs("none", grid, num_heads, head_dim, depth)


@cache
def macs(name: str, grid: Grid, num_heads: int, head_dim: int, depth: int) -> int:
    image_size = (2 * grid[0], 2 * grid[1])
    shape = {"dim": num_heads * head_dim, "num_heads": num_heads, "depth": depth, "pool": "mean"}
    model = create_model("vit_nano", encoding=name, image_size=image_size, patch_size=2, **shape)
    return count_model_macs(model, 3, image_size)


def check_macs(name: str, formula: str, grid: Grid, num_heads: int, head_dim: int) -> None:
    """Raises AssertionError unless the model costs what the formula says, once for tokens, in every layer for attention."""
    on_tokens = issubclass(find_encoding(name.partition(":")[0]), TokenEncoding)
    expected = evaluate(formula, num_heads, head_dim, grid) * (1 if on_tokens else DEPTH)
    found = added_macs(name, grid, num_heads, head_dim)
    assert found == expected, f"{name} adds {found} MACs on {grid}; {formula} makes {expected}"


@pytest.mark.parametrize(("grid", "num_heads", "head_dim"), SIZES)
@pytest.mark.parametrize(("name", "formula"), [(row.name, row.macs) for row in documented()], ids=str)
def test_added_macs_equal_the_documented_formula(name: str, formula: str, grid: Grid, num_heads: int, head_dim: int) -> None:
    check_macs(name, formula, grid, num_heads, head_dim)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("none", "1"),
        ("cpe", "2*9*N*h*d"),  # in every layer instead of once
        ("rpe_contextual", "N*N*h*d"),  # only the offsets that a query uses
        ("rpe_decomposed", "N*(H+W)*h*d + 2*N*N*(H+W)*h"),  # with wider q, k and v, as in the path fused
        ("sape2", "2*N*(max(H,W)+1)*h*d"),  # without gates
        ("sape2:axes=x", "N*(H+max(H,W)+1)*h*d"),  # rows and columns exchanged
    ],
)
def test_the_check_fails_on_a_wrong_formula(name: str, formula: str) -> None:
    with pytest.raises(AssertionError, match="MACs"):
        check_macs(name, formula, *SIZES[0])


@pytest.mark.parametrize("name", ["rpe_decomposed", "sape2:readout=direct,count=between"])
def test_places_cost_wider_products_in_the_fused_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There they are channels of q and k, and v is padded to the same width."""
    monkeypatch.setattr(module, "choose_path", lambda *_: "fused")
    grid, num_heads, head_dim = (8, 65), 2, 4
    (formula,) = [row.macs for row in documented() if row.name == name]
    expected = evaluate(f"{formula} + 2*N*N*(H+W)*h", num_heads, head_dim, grid)
    assert added_macs(name, grid, num_heads, head_dim, depth=1) == expected
