"""What every encoding owes its users: gradients, the documented size, precision under autocast, other grids, clear errors."""

from __future__ import annotations

import pytest
import torch
from encoding_cases import (
    DIM,
    HEAD_DIM,
    HEADS,
    VARIANTS,
    Encoding,
    content,
    documented,
    evaluate,
    joined,
    make,
    queries_and_keys,
)
from torch import Tensor

from sape2.attention import attend
from sape2.encodings import AttentionEncoding, TokenEncoding, create_encoding, list_encodings
from sape2.encodings.grid import Grid, num_tokens


def apply(encoding: Encoding, x: Tensor, grid: Grid) -> Tensor:
    """Tokens after a token encoding, or the output of attention under an attention encoding."""
    if isinstance(encoding, TokenEncoding):
        return encoding(x[..., :DIM], grid)
    q, k = queries_and_keys(x)
    return attend(q, k, k, grid, encoding, tokens=x[..., :DIM])


LEARNED = [name for name in VARIANTS if [*create_encoding(name, HEADS, HEAD_DIM, (3, 7)).parameters()]]


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_receives_a_gradient_from_the_start(name: str) -> None:
    torch.manual_seed(0)
    encoding = create_encoding(name, HEADS, HEAD_DIM, (3, 7)).double()
    output = apply(encoding, content(2, 21), (3, 7))
    (output * torch.randn_like(output)).sum().backward()
    for parameter_name, parameter in encoding.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-8, parameter_name


@pytest.mark.parametrize(("name", "formula"), [(row.name, row.parameters) for row in documented()], ids=str)
def test_parameter_count_equals_the_documented_formula(name: str, formula: str) -> None:
    for num_heads, grid in [(1, (4, 4)), (2, (3, 7)), (3, (9, 2))]:
        encoding = create_encoding(name, num_heads, HEAD_DIM, grid)
        assert sum(p.numel() for p in encoding.parameters()) == evaluate(formula, num_heads, HEAD_DIM, grid)


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_does_not_reach_positions_and_sums(name: str) -> None:
    """float32 queries and keys under bf16 autocast: attention encodings hand out exactly what they hand out without."""
    torch.manual_seed(0)
    encoding, x = make(name, (3, 7)).float(), content(1, 21).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = handed_out(encoding, x, (3, 7))
    close = {"rtol": 0.0, "atol": 0.0} if isinstance(encoding, AttentionEncoding) else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found, handed_out(encoding, x, (3, 7)), **close)


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_drifts_from_float32_by_rounding_only(name: str) -> None:
    """bf16 content: bf16 comes out, within a few of its steps (2^-8) of the largest value.

    A running sum in bf16 would put positions into the wrong bin and miss by far more.
    """
    torch.manual_seed(0)
    encoding, x = make(name, (8, 8)).bfloat16(), content(1, 64).bfloat16()
    found = handed_out(encoding, x, (8, 8))
    for ours, expected in zip(found, handed_out(encoding.float(), x.float(), (8, 8)), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def handed_out(encoding: Encoding, x: Tensor, grid: Grid) -> list[Tensor]:
    """Tokens, or rotated q and k and the bias."""
    if isinstance(encoding, TokenEncoding):
        return [encoding(x[..., :DIM], grid)]
    q, k = queries_and_keys(x)
    bias = encoding.bias(q, k, grid, joined(q))
    return [*encoding.rotate(q, k, grid), *([] if bias is None else [bias.dense()])]


@pytest.mark.parametrize("name", [name for name in list_encodings() if name != "none"])
def test_a_grid_that_does_not_fit_the_tokens_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\b20\b.*\b21\b"):
        handed_out(make(name, (3, 7)), content(1, 21), (4, 5))


@pytest.mark.parametrize("grid", [(2, 5), (5, 9)], ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ape:resize=bicubic", 1.0),
        ("ape:resize=bilinear", 1.0),
        ("rpe", 1.0),
        ("rpe_contextual:beyond=resize,divide_bias=false", HEAD_DIM),
    ],
)
def test_a_resized_table_of_ones_stays_one(name: str, value: float, grid: Grid) -> None:
    """Resampling weights sum to one (float32 in ape)."""
    encoding = create_encoding(name, HEADS, HEAD_DIM, (3, 7)).double().requires_grad_(False)
    for table in encoding.parameters():
        table.fill_(1.0)
    if isinstance(encoding, TokenEncoding):
        found = encoding(torch.zeros(1, num_tokens(grid), DIM, dtype=torch.float64), grid)
    else:
        ones = torch.ones(1, HEADS, num_tokens(grid), HEAD_DIM, dtype=torch.float64)
        found = encoding.bias(ones, ones, grid).dense()
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("grid", [(2, 5), (5, 9)], ids=str)
def test_keys_get_what_ape_would_add_to_them_on_other_grids(grid: Grid) -> None:
    """A table of places is resampled as that of ape; tables of rows and columns as one that is their sum."""
    torch.manual_seed(0)
    encoding, ape = make("key_table:by=token", (3, 7)), make("ape", (3, 7))
    q, k = queries_and_keys(content(2, num_tokens(grid)))
    for changed in (encoding, make("key_table:by=axis", (3, 7))):
        tables = list(changed.parameters())
        ape.table.copy_(sum(tables).expand(-1, 3, 7, -1).permute(1, 2, 0, 3).flatten(2))  # (H, W, h * d)
        moved = k + ape.resampled(grid).unflatten(-1, (HEADS, HEAD_DIM)).permute(2, 0, 1, 3).flatten(1, 2)
        expected = q @ (moved - k).transpose(-1, -2) / HEAD_DIM**0.5
        torch.testing.assert_close(changed.bias(q, k, grid).dense(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "head_dim", "message"),
    [
        ("rope", 6, "^rope .*head_dim.* 4.* 6 .*dim=12.*num_heads=2"),
        ("rope_mixed", 6, "^rope_mixed .*head_dim.* 4.* 6"),
        ("rope:temperature=0", 8, "rope:temperature.* 0"),
        ("pope", 7, "^pope .*head_dim.* 2.* 7"),
        ("pope:temperature=-1", 8, "pope:temperature.* -1"),
        ("rope:directions=3", 8, "^rope .*head_dim.* 6.* 8"),
        ("rope:directions=0", 8, "rope:directions.* 1.* 0"),
        ("rope:directions=4,spread=golden", 8, "directions.*spread=golden"),
        ("rope:fastest=4", 8, "fastest.* pi"),
        ("rope:coordinates=min,beyond=rescale", 8, "beyond.*coordinates=min"),
        ("rope:train_jitter=0.5", 8, "train_jitter.* 1.* 0.5"),
        ("rope:train_shift=-1", 8, "train_shift.* 0"),
        ("rope:preset=dinov2", 8, "rope:preset.* rope_vit, dinov3"),
        ("pape:parabolas=0", 8, "pape:parabolas.* 1"),
        ("pape:form=rotation_invariant,parabolas=2", 8, "parabolas.*form=rotation_invariant"),
        ("log_cpb:width=0", 8, "log_cpb:width.* 1"),
        ("fire:c=0", 8, "fire:c.* 0"),
        ("cope:num_positions=1", 8, "cope:num_positions.* 2"),
        ("rope:beyond=clamp", 8, "rope:beyond.* extrapolate, rescale.*'clamp'"),
        ("cpe:kernel=5", 8, "^cpe .*'kernel'.* padding"),
    ],
)
def test_what_cannot_be_names_the_option_and_its_limit(name: str, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_encoding(name, HEADS, head_dim, (3, 7))


@pytest.mark.parametrize(
    "name",
    [
        "rpe_decomposed",
        "sape2:readout=direct",
        "sape2:readout=squared_distance",
        "key_table",
        "key_table:by=token,to=both",
        "pape",
        "forget",
        "pope",
    ],
)
def test_a_dot_product_needs_no_map_and_its_factors_equal_it(name: str) -> None:
    torch.manual_seed(0)
    encoding, (q, k) = make(name, (3, 7)), queries_and_keys(content(2, 21))
    bias = encoding.bias(q, k, (3, 7), joined(q))
    assert bias.unfactored() is None
    query_side, key_side = bias.factored()
    torch.testing.assert_close(query_side @ key_side.transpose(-1, -2), bias.dense(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_reset_draws_the_values_of_a_new_one(name):
    torch.manual_seed(0)
    new = create_encoding(name, HEADS, HEAD_DIM, (3, 4))
    encoding = make(name, (3, 4)).float()
    torch.manual_seed(0)
    encoding.reset_parameters()
    assert all(map(torch.equal, encoding.state_dict().values(), new.state_dict().values()))
