"""What every encoding declares about itself (`Facts`), checked both ways, and what every encoding owes its users.

A fact speaks of the logit map a(x)[i, n] that an encoding makes of content x: rotated q.k / sqrt(d) plus bias, or, for
an encoding that adds to tokens, the products of the tokens after it. With random content and random parameters a fact
declared true must hold to 1e-9 (float64 leaves about 1e-14) and one declared false must miss by more than 1e-3 of the map.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sape2.attention import attend, encode, logits
from sape2.encodings import (
    AttentionBias,
    AttentionEncoding,
    Facts,
    TokenEncoding,
    create_encoding,
    find_encoding,
    list_encodings,
)
from sape2.grid import Grid, num_tokens
from sape2.vit import create_model

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM
GRIDS: list[Grid] = [(4, 4), (3, 7), (8, 8)]
HOLDS, FAILS = 1e-9, 1e-3

VARIANTS = [
    *list_encodings(),
    "cpe:padding=circular",
    "rope:beyond=rescale",
    "rope_mixed:init=axes",
    "rpe:beyond=clamp",
    "rpe_contextual:heads=each,divide_bias=false",
    "alibi:metric=manhattan",
    "alibi:slopes=learned",
    "cope:num_positions=10",
    "cope:count=causal",
    "cope:count=between",
    "sape2:preset=equations",
    "sape2:dot=key",
    "sape2:axes=x",
    "sape2:axes=y",
    "sape2:axes=raster",
    "sape2:gates=none",
    "sape2:gates=constant",
    "sape2:gates=constant,count=both,axes=raster",
    "sape2:gates=constant,count=between",
    "sape2:gates=constant,count=cyclic",
    "sape2:count=prefix",
    "sape2:count=both",
    "sape2:count=between",
    "sape2:count=cyclic",
    "sape2:count=cyclic,axes=raster",
    "sape2:count=cyclic,readout=squared_distance",
    "sape2:count=between,axes=y",
    "sape2:readout=squared_distance",
    "sape2:readout=direct",
    "sape2:readout=direct,axes=x",
    "sape2:readout=direct,count=both",
    "sape2:readout=direct,count=between",
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
]


# --- the checker -----------------------------------------------------------------------------------------------------

Encoding = TokenEncoding | AttentionEncoding


def make(name: str, grid: Grid) -> Encoding:
    """The encoding in float64 with random parameters."""
    return randomised(create_encoding(name, HEADS, HEAD_DIM, grid))


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


def logit_map(encoding: Encoding, x: Tensor, grid: Grid, num_prefix: int = 0) -> Tensor:
    """a(x), (B, ..., T, T): prefix tokens come first in x."""
    if isinstance(encoding, TokenEncoding):
        tokens = x[..., :DIM]
        tokens = torch.cat([tokens[:, :num_prefix], encoding(tokens[:, num_prefix:], grid)], dim=1)
        return tokens @ tokens.transpose(-1, -2) / math.sqrt(DIM)
    return logits(*encode(*queries_and_keys(x), grid, encoding))


def permutations(fact: str, grid: Grid) -> list[Tensor]:
    """The moves that a fact speaks of: [j] is the token that comes to stand at place j."""
    index = torch.arange(num_tokens(grid)).unflatten(0, grid)
    swapped = {axis: torch.tensor([1, 0, *range(2, grid[axis])]) for axis in (0, 1)}
    moved = {
        "row_permutation": [index[swapped[0]], index[torch.randperm(grid[0])]],
        "column_permutation": [index[:, swapped[1]], index[:, torch.randperm(grid[1])]],
        "circular_shift": [index.roll(1, 0), index.roll(1, 1), index.roll((1, 2), (0, 1))],
        "flip": [index.flip(0), index.flip(1)],
    }
    return [places.flatten() for places in moved[fact]]


def permutation_error(encoding: Encoding, fact: str, grid: Grid, num_prefix: int = 0) -> float:
    """The largest |a(moved x) - moved a(x)| / |a(x)| over the moves of a fact; prefix tokens stay where they are."""
    x = content(1, num_prefix + num_tokens(grid))
    still = logit_map(encoding, x, grid, num_prefix)
    errors = []
    for places in permutations(fact, grid):
        order = torch.cat([torch.arange(num_prefix), num_prefix + places])
        errors.append(relative(logit_map(encoding, x[:, order], grid, num_prefix), still[..., order, :][..., order]))
    return max(errors)


def translation_error(encoding: Encoding, grid: Grid, num_prefix: int = 0) -> float:
    """Two windows of one larger canvas, a step apart: the pairs that both see, whatever came in at the border."""
    height, width = grid
    prefix, canvas = content(1, num_prefix), content(1, height + 1, width + 1)
    index = torch.arange(num_tokens(grid)).unflatten(0, grid)

    def window(dy: int, dx: int) -> Tensor:
        tokens = canvas[:, dy : dy + height, dx : dx + width].flatten(1, 2)
        return logit_map(encoding, torch.cat([prefix, tokens], dim=1), grid, num_prefix)[..., num_prefix:, num_prefix:]

    errors = []
    for dy, dx in [(0, 1), (1, 0), (1, 1)]:
        before, after = index[dy:, dx:].flatten(), index[: height - dy, : width - dx].flatten()
        errors.append(relative(window(dy, dx)[..., after, :][..., after], window(0, 0)[..., before, :][..., before]))
    return max(errors)


def content_error(encoding: Encoding, grid: Grid) -> float:
    """How much what is added differs between two contents; a rotation is free of content when it is linear in it."""
    x, other = content(1, num_tokens(grid)), content(1, num_tokens(grid))
    if isinstance(encoding, TokenEncoding):
        x, other = x[..., :DIM], other[..., :DIM]
        return relative(encoding(x, grid) - x, encoding(other, grid) - other)
    (q, k), (q2, k2) = queries_and_keys(x), queries_and_keys(other)
    errors = [
        relative(both, one + two)
        for both, one, two in zip(
            encoding.rotate(q + q2, k + k2, grid), encoding.rotate(q, k, grid), encoding.rotate(q2, k2, grid), strict=True
        )
    ]
    biases = [encoding.bias(q, k, grid), encoding.bias(q2, k2, grid)]
    if biases[0] is not None:
        errors.append(relative(biases[0].dense(), biases[1].dense()))
    return max(errors)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def runs_on(encoding: Encoding, grid: Grid) -> bool:
    """Whether the encoding gives finite values on a grid rather than a ValueError."""
    try:
        return bool(logit_map(encoding, content(1, num_tokens(grid)), grid).isfinite().all())
    except ValueError:
        return False


def check_facts(encoding: Encoding, grid: Grid, num_prefix: int = 0) -> None:
    """Raises AssertionError for the first declared fact that is not so; `grid` is the one the encoding was made for."""
    declared = dataclasses.asdict(encoding.facts)
    changes = content_error(encoding, grid)
    assert changes > FAILS if declared.pop("content_dependent") else changes < HOLDS, f"content_dependent: {changes:.2e}"
    others = [(grid[0] - 1, grid[1]), (grid[0], grid[1] - 1), (grid[0] + 2, grid[1] + 1), (2 * grid[0], grid[1])]
    assert all(runs_on(encoding, other) for other in others) == declared.pop("any_grid"), "any_grid"
    for fact, holds in declared.items():
        translation = fact == "translation"
        error = (
            translation_error(encoding, grid, num_prefix)
            if translation
            else permutation_error(encoding, fact, grid, num_prefix)
        )
        assert error < HOLDS if holds else error > FAILS, f"{fact} is declared {holds} but misses by {error:.2e} on {grid}"


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_declared_facts_hold_and_undeclared_ones_fail(name: str, grid: Grid) -> None:
    torch.manual_seed(0)
    check_facts(make(name, grid), grid)


@pytest.mark.parametrize("gates", ["content", "constant", "none"])
@pytest.mark.parametrize("count", ["suffix", "prefix", "both", "between", "cyclic"])
def test_declared_facts_of_the_whole_ablation_ladder(gates: str, count: str) -> None:
    torch.manual_seed(0)
    for axes in ("xy", "x", "y", "raster"):
        for readout in ("distance", "squared_distance", "direct"):
            name = f"sape2:gates={gates},count={count},axes={axes},readout={readout}"
            try:
                check_facts(make(name, (3, 5)), (3, 5))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("num_prefix", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_facts_do_not_change_with_prefix_tokens(name: str, num_prefix: int) -> None:
    torch.manual_seed(0)
    check_facts(make(name, (3, 7)), (3, 7), num_prefix)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("none", "flip"),
        ("alibi", "flip"),
        ("rope", "translation"),
        ("rope", "circular_shift"),
        ("rope", "content_dependent"),
        ("cpe", "circular_shift"),
        ("cpe", "content_dependent"),
        ("ape", "content_dependent"),
        ("sape2:axes=x", "row_permutation"),
        ("sape2:axes=x", "column_permutation"),
        ("sape2", "translation"),
        ("cope", "any_grid"),
    ],
)
def test_the_checker_fails_on_a_wrong_declaration(name: str, fact: str) -> None:
    torch.manual_seed(0)
    encoding = make(name, (3, 7))
    check_facts(encoding, (3, 7))
    encoding.facts = dataclasses.replace(encoding.facts, **{fact: not getattr(encoding.facts, fact)})
    with pytest.raises(AssertionError, match=fact):
        check_facts(encoding, (3, 7))


def test_the_checker_sees_an_encoding_that_takes_one_grid_only() -> None:
    class OneGrid(AttentionEncoding):
        facts = Facts(translation=False, any_grid=False)

        def bias(self, q: Tensor, k: Tensor, grid: Grid) -> AttentionBias:
            if grid != (3, 7):
                raise ValueError(f"made for 3x7; got {grid}")
            return AttentionBias(matrix=torch.randn(21, 21, generator=torch.Generator().manual_seed(0), dtype=q.dtype))

    torch.manual_seed(0)
    check_facts(OneGrid(HEADS, HEAD_DIM, (3, 7)), (3, 7))


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["none", "sape2:axes=y", "sape2:count=cyclic", "sape2:count=both", "sape2:gates=none", "alibi"]
)
def test_symmetries_go_through_the_softmax(name: str, num_prefix: int) -> None:
    """The output of attention moves with the content, and that of prefix tokens does not change."""
    torch.manual_seed(0)
    grid = (3, 7)
    encoding = make(name, grid)
    x, v = content(1, num_prefix + 21), torch.randn(1, HEADS, num_prefix + 21, HEAD_DIM, dtype=torch.float64)
    still = attend(*queries_and_keys(x), v, grid, encoding)
    for fact in ("row_permutation", "column_permutation", "circular_shift", "flip"):
        errors = []
        for places in permutations(fact, grid):
            order = torch.cat([torch.arange(num_prefix), num_prefix + places])
            moved = attend(*queries_and_keys(x[:, order]), v[:, :, order], grid, encoding)
            errors.append(relative(moved, still[:, :, order]))
        assert max(errors) < HOLDS if getattr(encoding.facts, fact) else max(errors) > FAILS, fact


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["none", "ape", "sincos", "cpe", "cpe:padding=circular", "cope", "sape2", "sape2:count=cyclic"]
)
def test_circular_shift_of_the_image_goes_through_the_model(name: str, num_prefix: int) -> None:
    """Rolled by whole patches, an image gives rolled tokens if and only if the encoding says so."""
    torch.manual_seed(0)
    pool, registers = ("class", num_prefix - 1) if num_prefix else ("mean", 0)
    model = create_model(
        "vit_nano",
        encoding=name,
        image_size=(6, 14),
        patch_size=2,
        dim=DIM,
        depth=2,
        num_heads=HEADS,
        pool=pool,
        num_registers=registers,
    )
    randomised(model, std=0.5)
    image = torch.randn(1, 3, 6, 14, dtype=torch.float64)
    grid_tokens = model.features(image)[:, num_prefix:].unflatten(1, (3, 7))
    rolled = model.features(image.roll((2, 4), (2, 3)))[:, num_prefix:].unflatten(1, (3, 7))
    error = relative(rolled, grid_tokens.roll((1, 2), (1, 2)))
    assert error < HOLDS if create_encoding(name, HEADS, HEAD_DIM, (3, 7)).facts.circular_shift else error > FAILS


@pytest.mark.parametrize("num_prefix", [1, 3])
@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if not issubclass(find_encoding(re.split("[:+]", name)[0]), TokenEncoding)]
)
def test_pairs_with_a_prefix_token_get_no_bias(name: str, num_prefix: int) -> None:
    torch.manual_seed(0)
    encoding, x = make(name, (3, 7)), content(1, num_prefix + 21)
    q, k = queries_and_keys(x)
    plain = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    found = logit_map(encoding, x, (3, 7), num_prefix)
    torch.testing.assert_close(found[..., :num_prefix, :num_prefix], plain[..., :num_prefix, :num_prefix])
    if "rope" not in name:  # a patch is turned, so its product with a token that is not turned changes
        torch.testing.assert_close(found[..., :num_prefix, :], plain[..., :num_prefix, :])
        torch.testing.assert_close(found[..., :num_prefix], plain[..., :num_prefix])


# --- what every encoding owes ----------------------------------------------------------------------------------------


def apply(encoding: Encoding, x: Tensor, grid: Grid) -> Tensor:
    """Tokens after a token encoding, or the output of attention under an attention encoding."""
    if isinstance(encoding, TokenEncoding):
        return encoding(x[..., :DIM], grid)
    q, k = queries_and_keys(x)
    return attend(q, k, k, grid, encoding)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_receives_a_gradient_from_the_start(name: str) -> None:
    torch.manual_seed(0)
    encoding = create_encoding(name, HEADS, HEAD_DIM, (3, 7)).double()
    output = apply(encoding, content(2, 21), (3, 7))
    (output * torch.randn_like(output)).sum().backward() if output.requires_grad else None
    for parameter_name, parameter in encoding.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-8, parameter_name


def documented() -> Iterator[tuple[str, str, str]]:
    """(name, parameter formula, exact symmetries) of every row of the table in docs/method.md."""
    page = Path(__file__).parent.parent / "docs" / "method.md"
    for line in page.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and re.split("[:]", cells[0])[0] in list_encodings():
            yield cells[0], cells[4], cells[5]


def test_every_encoding_has_a_documented_row() -> None:
    assert set(list_encodings()) <= {name for name, _, _ in documented()}


@pytest.mark.parametrize(("name", "formula"), [row[:2] for row in documented()], ids=str)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_parameter_count_equals_the_documented_formula(name: str, formula: str, num_heads: int) -> None:
    """h heads, d head_dim, H by W the training grid."""
    for height, width in [(4, 4), (3, 7), (9, 2)]:
        encoding = create_encoding(name, num_heads, HEAD_DIM, (height, width))
        sizes = {"h": num_heads, "d": HEAD_DIM, "H": height, "W": width, "max": max}
        assert sum(p.numel() for p in encoding.parameters()) == eval(formula, {"__builtins__": {}}, sizes)


@pytest.mark.parametrize(("name", "symmetries"), [(name, exact) for name, _, exact in documented()], ids=str)
def test_documented_symmetries_are_the_declared_ones(name: str, symmetries: str) -> None:
    facts = dataclasses.asdict(create_encoding(name, HEADS, HEAD_DIM, (3, 7)).facts)
    held = [fact.replace("_", " ") for fact in facts if facts[fact] and fact not in ("content_dependent", "any_grid")]
    assert symmetries == (", ".join(held) or "none")


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
    """Tokens, or rotated q and k and what the bias consists of."""
    if isinstance(encoding, TokenEncoding):
        return [encoding(x[..., :DIM], grid)]
    q, k = queries_and_keys(x)
    bias = encoding.bias(q, k, grid)
    parts = [] if bias is None else [bias.matrix, *(bias.factors or ())]
    return [*encoding.rotate(q, k, grid), *(part for part in parts if part is not None)]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "none"])
def test_a_grid_that_does_not_fit_the_tokens_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="20 tokens; got 21"):
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


@pytest.mark.parametrize(
    ("name", "head_dim", "message"),
    [
        ("rope", 6, r"rope needs head_dim divisible by 4; got 6 \(dim=12 / num_heads=2\)"),
        ("rope_mixed", 6, r"rope_mixed needs head_dim divisible by 4; got 6"),
        ("rope:temperature=0", 8, "rope:temperature must be above 0; got 0"),
        ("cope:num_positions=1", 8, "cope:num_positions must be at least 2"),
        ("rope:beyond=clamp", 8, "rope:beyond must be one of extrapolate, rescale; got 'clamp'"),
        ("alibi:slope=1", 8, "alibi has no option 'slope'; known options: metric, slopes"),
        ("cpe:kernel=5", 8, "cpe has no option 'kernel'; known options: padding"),
    ],
)
def test_what_cannot_be_says_why(name: str, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_encoding(name, HEADS, head_dim, (3, 7))


def test_two_rotations_or_two_tables_are_a_contradiction() -> None:
    with pytest.raises(ValueError, match="two rotations, rope and rope_mixed"):
        create_encoding("rope+rope_mixed", HEADS, HEAD_DIM, (3, 7))
    with pytest.raises(ValueError, match="two absolute tables, ape and sincos"):
        create_encoding("ape+sincos", HEADS, HEAD_DIM, (3, 7))


def test_every_encoding_says_what_it_is() -> None:
    for name in list_encodings():
        encoding = find_encoding(name)
        assert encoding.summary
        assert "\n" not in encoding.summary
        assert encoding.source


def test_rpe_decomposed_factors_and_equals_its_map() -> None:
    """Attention with the factors is attention with the N x N map."""
    torch.manual_seed(0)
    encoding, (q, k) = make("rpe_decomposed", (3, 7)), queries_and_keys(content(2, 22))
    assert encoding.bias(q[:, :, 1:], k[:, :, 1:], (3, 7)).matrix is None
    expected = logits(*encode(q, k, (3, 7), encoding)).softmax(-1) @ k
    torch.testing.assert_close(attend(q, k, k, (3, 7), encoding), expected, rtol=1e-10, atol=1e-10)
