"""Every encoding and every option of it against its literal loop in `reference.py`.

float64 on both sides. The two sum a few dozen terms in different orders, which leaves about 1e-14; 1e-10 leaves room
for that and for nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from sape2 import reference
from sape2.attention import logits
from sape2.encodings import AttentionEncoding, TokenEncoding, create_encoding, find_encoding, list_encodings
from sape2.encodings.grid import Grid

BATCH, HEADS, HEAD_DIM = 2, 2, 8
TRAINED: Grid = (3, 5)
INSIDE: Grid = (2, 4)
GRIDS: list[Grid] = [TRAINED, INSIDE, (4, 6), (1, 4)]  # the third beyond it, the last a single row
ANTIALIASED = ("ape", "key_table")  # no loop resamples tables as they do; for other grids see test_encoding_duties
# Of these the loops are slow: a form of each that is quicker is compared on every grid.
QUICK = {"log_cpb": "log_cpb:width=2", "fire": "fire:width=2", "pape": "pape:parabolas=2"}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# Values to try for options that are numbers, 2 if not here; the values of all others are listed by their type.
NUMBERS = {
    "temperature": ["7.5"],
    "num_positions": ["2", "12"],
    "table_std": ["0.5"],
    "directions": ["4"],
    "slope": ["0.5"],
    "gain_init": [],  # needs sign=learned, see below
}
TOGETHER = [
    "sape2:sign=learned,gain_init=0.5",
    "sape2:preset=equations,dot=key,sign=minus",
    "sape2:num_positions=3,count=cyclic",
    "sape2:readout=direct,count=between,dot=key",
    "sape2:readout=direct,count=cyclic",
    "sape2:readout=direct,count=both,axes=raster",
    "sape2:readout=direct,count=both,beyond=rescale",
    "sape2:readout=squared_distance,count=both,normalize=sqrt_length,sign=minus",
    "sape2:gates=constant,count=between",
    "sape2:axes=raster,count=cyclic,normalize=sqrt_length",
    "rpe_contextual:heads=each,beyond=resize",
    "cope:count=between,num_positions=4",
    "rope:preset=dinov3",
    "rope:coordinates=max,directions=4,order=yx",
    "rope:spread=golden,temperature=10,fastest=3",
    "cope:num_positions=10,divide_bias=false",
    "key_table:by=token,to=both",
    "key_table:by=token,to=both,heads=shared,divide_bias=false",
]


def variants(name: str) -> Iterator[str]:
    """The encoding as it is, then with each value of each of its options."""
    yield name
    for option, hint in get_type_hints(find_encoding(name).Options).items():
        numbers = NUMBERS.get(option, ["2"])
        choices = get_args(hint) if get_origin(hint) is Literal else ("true", "false") if hint is bool else numbers
        yield from (f"{name}:{option}={choice}" for choice in choices)


def cases(slot: type, more: list[str] | None = None) -> list[tuple[str, Grid]]:
    """Every variant on a grid that it was not trained on; what has a rule for other grids, and each default, on all."""
    names = [v for name in list_encodings() if issubclass(find_encoding(name), slot) for v in variants(name)] + (more or [])
    all_grids = {name for name in names if "beyond" in name or ":" not in name} - set(QUICK) | set(QUICK.values())
    grids = {name: GRIDS if name in all_grids else [INSIDE] for name in names}
    grids |= {name: [TRAINED] for name in names if name.partition(":")[0] in ANTIALIASED}
    return [(name, grid) for name in names for grid in grids[name]]


def make(name: str) -> TokenEncoding | AttentionEncoding:
    """The encoding in float64 with random parameters, none of them at a start value that would hide a mistake."""
    encoding = create_encoding(name, HEADS, HEAD_DIM, TRAINED).double().requires_grad_(False).eval()
    for parameter in encoding.parameters():
        parameter.normal_()
    return encoding


def trained_over(grid: Grid, axis: int) -> float:
    return TRAINED[axis] / grid[axis]


def by_name(name: str, encoding: TokenEncoding | AttentionEncoding, **known: Any) -> Tensor:
    """The loop of the same name; its arguments are `known` ones, options and parameters of the encoding, found by name."""
    available = dict(encoding.named_parameters()) | vars(encoding.options) | known
    loop = getattr(reference, name)
    return loop(**{argument: available[argument] for argument in inspect.signature(loop).parameters})


def expected_tokens(encoding: TokenEncoding, name: str, x: Tensor, grid: Grid) -> Tensor:
    if name == "cpe":
        weight, offset = encoding.conv.weight[:, 0], encoding.conv.bias
        return reference.cpe(x, weight, offset, grid, encoding.options.padding)
    return by_name(name, encoding, tokens=x, grid=grid)


def expected_rotation(encoding: AttentionEncoding, name: str, vectors: Tensor, head: int, grid: Grid) -> Tensor:
    if type(encoding).rotate is AttentionEncoding.rotate:
        return vectors
    rescale = (1.0, 1.0)
    if name == "pope":
        return vectors
    if getattr(encoding.options, "beyond", None) == "rescale":
        rescale = (trained_over(grid, 0), trained_over(grid, 1))
    if name == "rope_mixed":
        return reference.rope_mixed(vectors, encoding.frequencies[:, head], grid, rescale)
    return by_name(name, encoding, vectors=vectors, grid=grid, rescale=rescale)


def expected_bias(
    encoding: AttentionEncoding, name: str, q: Tensor, k: Tensor, tokens: Tensor, head: int, grid: Grid
) -> Tensor:
    options, height, width = encoding.options, *grid
    resize = getattr(options, "beyond", None) == "resize" and grid != TRAINED
    if name == "rpe":
        table = encoding.table[head]
        return reference.rpe(reference.resize_bicubic(table, 2 * height - 1, 2 * width - 1) if resize else table, grid)
    if name == "rpe_contextual":
        table = encoding.table[head if options.heads == "each" else 0]
        if resize:
            channels = [reference.resize_bicubic(table[..., c], 2 * height - 1, 2 * width - 1) for c in range(HEAD_DIM)]
            table = torch.stack(channels, dim=-1)
        return reference.rpe_contextual(q, table, grid, options.divide_bias)
    if name == "rpe_decomposed":
        table_y, table_x = encoding.table_y, encoding.table_x
        if resize:
            table_y = reference.resize_linear(table_y, 2 * height - 1)
            table_x = reference.resize_linear(table_x, 2 * width - 1)
        return reference.rpe_decomposed(q, table_y, table_x, grid)
    if name == "alibi":
        learned = options.slopes == "learned"
        slope = float(encoding.slopes[head]) if learned else reference.alibi_slopes(HEADS)[head]
        return reference.alibi(slope, grid, options.metric)
    if name == "key_table":
        keys, queries = (key_vectors(encoding, side, head) for side in ("keys", "queries"))
        return reference.key_table(q, k, keys, queries, grid, options.divide_bias)
    if name == "sape2":
        return expected_sape2(encoding, q, k, head, grid)["bias"]
    if name == "pope":
        places = (trained_over(grid, 0), trained_over(grid, 1)) if options.beyond == "rescale" else (1.0, 1.0)
        return by_name(name, encoding, q=q, k=k, grid=grid, head=head, places=places)
    if name in ("log_cpb", "fire"):
        return expected_function(encoding, name, head, grid)
    if name == "pape" and options.form == "rotation_invariant":
        return reference.pape_rotation_invariant(q, tokens, encoding.curvature[head], float(encoding.scales[head]), grid)
    if name == "pape":
        of_head = (encoding.curvature[head], encoding.slope[head], encoding.directions[head])
        return reference.pape(q, tokens, *of_head, grid)
    if name == "forget":
        return reference.forget(tokens, encoding.weight[:, :, head], encoding.offset[:, :, head], grid)
    rescale = min(1.0, math.prod(TRAINED) / math.prod(grid)) if getattr(options, "beyond", None) == "rescale" else 1.0
    known = {"q": q, "k": k, "tokens": tokens, "grid": grid, "head": head, "num_heads": HEADS}
    return by_name(name, encoding, **known, rescale=rescale, visible=None)


def expected_function(encoding: AttentionEncoding, name: str, head: int, grid: Grid) -> Tensor:
    first, last = encoding.network.first, encoding.network.last

    def network(u: float, v: float) -> float:
        return reference.offset_network(u, v, first.weight, first.bias, last.weight[head])

    if name == "log_cpb":
        return reference.log_cpb(network, grid, TRAINED)
    return reference.fire(network, float(encoding.c), float(encoding.threshold), grid, TRAINED)


def key_vectors(encoding: AttentionEncoding, side: str, head: int) -> Tensor | None:
    """The vector of every place, (H, W, d); None if there is none."""
    tables = [table for name, table in encoding.named_parameters() if name.startswith(side)]
    height, width = TRAINED
    head = head if encoding.options.heads == "each" else 0
    return torch.stack([t[head].expand(height, width, -1) for t in tables]).sum(0) if tables else None


def expected_sape2(encoding: AttentionEncoding, q: Tensor, k: Tensor, head: int, grid: Grid) -> dict[str, Tensor]:
    o = encoding.options
    lengths = {"y": (TRAINED[0], grid[0]), "x": (TRAINED[1], grid[1]), "raster": (math.prod(TRAINED), math.prod(grid))}
    return reference.sape2(
        q,
        k,
        {axis: getattr(encoding, f"table_{axis}") for axis in encoding.axes},
        grid,
        dot=o.dot,
        gates=o.gates,
        gate_scale=float(encoding.gate_scale[head])
        if o.gate_scale == "learned"
        else {"sqrt_dim": None, "none": 1.0}[o.gate_scale],
        count=o.count,
        readout=o.readout,
        gain=float(encoding.gain[head]) if o.sign == "learned" else {"plus": 1.0, "minus": -1.0}[o.sign],
        divide_bias=o.divide_bias,
        normalize=o.normalize,
        rescale={axis: min(1.0, old / new) for axis, (old, new) in lengths.items()} if o.beyond == "rescale" else None,
    )


@pytest.mark.parametrize(("name", "grid"), cases(TokenEncoding), ids=str)
def test_tokens_equal_the_literal_loop(name: str, grid: Grid) -> None:
    torch.manual_seed(0)
    base = name.partition(":")[0]
    encoding = make(name)
    x = torch.randn(BATCH, math.prod(grid), HEADS * HEAD_DIM, dtype=torch.float64)
    expected = torch.stack([expected_tokens(encoding, base, image, grid) for image in x])
    torch.testing.assert_close(encoding(x, grid), expected, **CLOSE)


@pytest.mark.parametrize(("name", "grid"), cases(AttentionEncoding, TOGETHER), ids=str)
def test_rotation_and_bias_equal_the_literal_loop(name: str, grid: Grid) -> None:
    torch.manual_seed(0)
    base = name.partition(":")[0]
    encoding = make(name)
    q, k = torch.randn(2, BATCH, HEADS, math.prod(grid), HEAD_DIM, dtype=torch.float64)
    tokens = torch.randn(BATCH, math.prod(grid), HEADS * HEAD_DIM, dtype=torch.float64)
    bias = encoding.bias(q, k, grid, tokens)
    dense = None if bias is None else bias.dense().expand(BATCH, HEADS, -1, -1)
    rotated = encoding.rotate(q, k, grid)
    for b, head in [(0, 1), (1, 0)]:  # each image and each head, and never the place of the one for that of the other
        for turned, vectors in zip(rotated, (q, k), strict=True):
            expected = expected_rotation(encoding, base, vectors[b, head], head, grid)
            torch.testing.assert_close(turned[b, head], expected, **CLOSE)
        if dense is not None:
            expected = expected_bias(encoding, base, q[b, head], k[b, head], tokens[b], head, grid)
            torch.testing.assert_close(dense[b, head], expected, **CLOSE)


MAPS = [
    "sape2",
    "sape2:count=both",
    "sape2:axes=raster",
    "sape2:gates=none,divide_bias=true",
    "sape2:gate_scale=learned,count=cyclic,sign=learned",
    "sape2:readout=direct,count=between,dot=key",
    "sape2:readout=squared_distance,normalize=sqrt_length,axes=y",
]


@pytest.mark.parametrize("name", MAPS)
def test_sape2_maps_equal_the_literal_loop(name: str) -> None:
    torch.manual_seed(0)
    encoding = make(name)
    q, k = torch.randn(2, BATCH, HEADS, math.prod(TRAINED), HEAD_DIM, dtype=torch.float64)
    maps = encoding.maps(q, k, TRAINED)
    expected = expected_sape2(encoding, q[1, 1], k[1, 1], 1, TRAINED)
    assert maps.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(maps[key][1, 1], value, **CLOSE)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12])
def test_alibi_slopes_for_any_number_of_heads(num_heads: int) -> None:
    """Powers of two and what lies between them, to the rounding of float32."""
    encoding = create_encoding("alibi:slopes=learned", num_heads, HEAD_DIM, TRAINED)
    torch.testing.assert_close(encoding.slopes.data, torch.tensor(reference.alibi_slopes(num_heads)))


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 16])
@pytest.mark.parametrize("name", ["lookhere", "lookhere:view=180,slope=0.5", "lookhere:view=45", "lookhere:outside=far"])
def test_every_head_has_the_field_of_view_of_the_loop(name: str, num_heads: int) -> None:
    """Logits with two prefix tokens, which every head sees and which see all, on an oblong grid."""
    torch.manual_seed(0)
    grid = (4, 3)
    encoding = create_encoding(name, num_heads, HEAD_DIM, (3, 3))
    q, k = torch.randn(2, 1, num_heads, 2 + 12, HEAD_DIM, dtype=torch.float64)
    found = logits(q, k, grid, encoding)
    for head in range(num_heads):
        expected = q[0, head] @ k[0, head].T / math.sqrt(HEAD_DIM)
        expected[2:, 2:] += by_name("lookhere", encoding, grid=grid, head=head, num_heads=num_heads)
        torch.testing.assert_close(found[0, head], expected, **CLOSE)


@pytest.mark.parametrize("directions", [2, 4, 8])
def test_directions_of_a_spiral_have_the_frequencies_of_the_loop(directions: int) -> None:
    """In heads that are wide enough for eight directions; with two it is axial rope."""
    torch.manual_seed(0)
    encoding = create_encoding(f"rope:spread=spiral,directions={directions},temperature=50", HEADS, 64, TRAINED)
    q, k = torch.randn(2, 1, HEADS, math.prod(INSIDE), 64, dtype=torch.float64)
    turned = encoding.rotate(q, k, INSIDE)[1]
    expected = by_name("rope", encoding, vectors=k[0, 1], grid=INSIDE, rescale=(1, 1))
    torch.testing.assert_close(turned[0, 1], expected, **CLOSE)
    axial = create_encoding("rope:temperature=50", HEADS, 64, TRAINED).rotate(q, k, INSIDE)[1]
    assert torch.equal(turned, axial) == (directions == 2)


def test_a_wrong_loop_is_noticed() -> None:
    """The comparison itself fails when two rows of a table change places."""
    torch.manual_seed(0)
    encoding = make("rpe_decomposed")
    q, k = torch.randn(2, 1, HEADS, math.prod(TRAINED), HEAD_DIM, dtype=torch.float64)
    wrong = reference.rpe_decomposed(q[0, 0], encoding.table_y.flip(0), encoding.table_x, TRAINED)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(encoding.bias(q, k, TRAINED).dense()[0, 0], wrong, **CLOSE)
