"""What every encoding declares about itself (`Facts`), checked both ways.

A fact speaks of the logit map a(x)[i, n] that an encoding makes of content x: rotated q.k / sqrt(d) plus bias, or, for
an encoding that adds to tokens, the products of the tokens after it. With random content and random parameters a fact
declared true must hold to 1e-9 (float64 leaves about 1e-14) and one declared false must miss by more than 1e-3 of the map.
"""

from __future__ import annotations

import dataclasses
import math

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
    joined,
    make,
    queries_and_keys,
    randomised,
)
from torch import Tensor

from sape2.attention import attend, logits
from sape2.encodings import (
    AttentionBias,
    AttentionEncoding,
    Facts,
    TokenEncoding,
    create_encoding,
    find_encoding,
    list_encodings,
)
from sape2.encodings.bias import Matrix
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, num_tokens
from sape2.models.vit import create_model

SETTINGS: list[tuple[Grid, int]] = [((3, 7), 0), ((4, 4), 3)]  # grid, prefix tokens
HOLDS, FAILS = 1e-9, 1e-3


# --- the checker -----------------------------------------------------------------------------------------------------


def logit_map(encoding: Encoding, x: Tensor, grid: Grid, num_prefix: int = 0) -> Tensor:
    """a(x), (B, ..., T, T): prefix tokens come first in x."""
    if isinstance(encoding, TokenEncoding):
        tokens = x[..., :DIM]
        tokens = torch.cat([tokens[:, :num_prefix], encoding(tokens[:, num_prefix:], grid)], dim=1)
        return tokens @ tokens.transpose(-1, -2) / math.sqrt(DIM)
    return logits(*queries_and_keys(x), grid, encoding, x[..., :DIM])


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
    biases = [encoding.bias(*pair, grid, joined(pair[0])) for pair in ((q, k), (q2, k2))]
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


@pytest.mark.parametrize(("grid", "num_prefix"), SETTINGS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_declared_facts_hold_and_undeclared_ones_fail(name: str, grid: Grid, num_prefix: int) -> None:
    torch.manual_seed(0)
    check_facts(make(name, grid), grid, num_prefix)


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


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("none", "flip"),
        ("alibi", "flip"),
        ("rope", "translation"),
        ("rope", "circular_shift"),
        ("rope", "content_dependent"),
        ("pape", "flip"),
        ("pape:form=rotation_invariant", "flip"),
        ("forget", "translation"),
        ("fire", "translation"),
        ("key_table", "content_dependent"),
        ("cpe", "circular_shift"),
        ("cpe", "content_dependent"),
        ("ape", "content_dependent"),
        ("alibi", "content_dependent"),
        ("rpe_contextual", "content_dependent"),
        ("sape2", "content_dependent"),
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


def random_map(like: Tensor) -> Tensor:
    return torch.randn(21, 21, generator=torch.Generator().manual_seed(0), dtype=like.dtype)


def test_the_checker_sees_an_encoding_that_takes_one_grid_only() -> None:
    class OneGrid(AttentionEncoding):
        facts = Facts(translation=False, any_grid=False)

        def make_bias(self, content: Content) -> AttentionBias:
            if content.grid != (3, 7):
                raise ValueError(f"made for 3x7; got {content.grid}")
            return AttentionBias(Matrix(random_map(content.q)))

    torch.manual_seed(0)
    check_facts(OneGrid(HEADS, HEAD_DIM, (3, 7)), (3, 7))


class ContentBias(AttentionEncoding):
    """Depends on content through its bias, and does not say so."""

    def make_bias(self, content: Content) -> AttentionBias:
        return AttentionBias(Matrix(random_map(content.q) * content.q.sum()))


class ContentRotation(AttentionEncoding):
    """The same through its rotation, by an angle that is the first number of each vector."""

    def rotate(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        turned = [torch.stack([x[..., 0].cos() * x[..., 0], *x[..., 1:].unbind(-1)], -1) for x in (q, k)]
        return turned[0], turned[1]


class ContentTokens(TokenEncoding):
    """The same on the tokens."""

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        return tokens + tokens.roll(1, 1)


@pytest.mark.parametrize("toy", [ContentBias, ContentRotation, ContentTokens])
def test_content_that_an_encoding_does_not_declare_is_found(toy: type[Encoding]) -> None:
    encoding = toy(HEADS, HEAD_DIM, (3, 7))
    with pytest.raises(AssertionError, match="content_dependent"):
        check_facts(encoding, (3, 7))


@pytest.mark.parametrize("num_prefix", [0, 3])
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


@pytest.mark.parametrize("num_prefix", [0, 3])
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


BETWEEN_TOKENS = [name for name in list_encodings() if not issubclass(find_encoding(name), TokenEncoding)]


@pytest.mark.parametrize("name", [*BETWEEN_TOKENS, "rope+sape2", "pape+forget+cope"])
def test_pairs_with_a_prefix_token_get_no_bias(name: str) -> None:
    torch.manual_seed(0)
    num_prefix = 3
    encoding, x = make(name, (3, 7)), content(1, num_prefix + 21)
    q, k = queries_and_keys(x)
    plain = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    found = logit_map(encoding, x, (3, 7), num_prefix)
    torch.testing.assert_close(found[..., :num_prefix, :num_prefix], plain[..., :num_prefix, :num_prefix])
    if "rope" not in name:  # a patch is turned, so its product with a token that is not turned changes
        torch.testing.assert_close(found[..., :num_prefix, :], plain[..., :num_prefix, :])
        torch.testing.assert_close(found[..., :num_prefix], plain[..., :num_prefix])


# --- facts as documented ---------------------------------------------------------------------------------------------


def test_every_encoding_has_a_documented_row() -> None:
    assert set(list_encodings()) <= {row.name for row in documented()}


@pytest.mark.parametrize(("name", "symmetries"), [(row.name, row.exact) for row in documented()], ids=str)
def test_documented_symmetries_are_the_declared_ones(name: str, symmetries: str) -> None:
    facts = dataclasses.asdict(create_encoding(name, HEADS, HEAD_DIM, (3, 7)).facts)
    held = [fact.replace("_", " ") for fact in facts if facts[fact] and fact not in ("content_dependent", "any_grid")]
    assert symmetries == (", ".join(held) or "none")
