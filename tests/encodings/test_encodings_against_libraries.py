"""Agreement with timm, and for what timm has not with a second, independent version of its published definition.

timm computes angles in float32, so its rotations agree to about 1e-6; everything else is compared in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import (
    RelPosBias,
    RelPosMlp,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
    build_sincos2d_pos_embed,
)
from timm.layers.pos_embed_sincos import init_random_2d_freqs
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor

from sape2.attention import logits
from sape2.encodings import create_encoding
from sape2.encodings.grid import Grid

HEADS, HEAD_DIM = 3, 16
GRIDS: list[Grid] = [(4, 4), (3, 7)]


def queries_and_keys(grid: Grid, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, HEADS, grid[0] * grid[1], HEAD_DIM, dtype=dtype)
    return q, k


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("temperature", [100.0, 10_000.0])
def test_rope_against_timm(grid: Grid, temperature: float) -> None:
    q, k = queries_and_keys(grid, torch.float32)
    theirs = RotaryEmbeddingCat(HEAD_DIM, temperature=temperature, in_pixels=False, grid_indexing="xy").get_embed(list(grid))
    rotated = create_encoding(f"rope:temperature={temperature}", HEADS, HEAD_DIM, grid).rotate(q, k, grid)
    for ours, vectors in zip(rotated, (q, k), strict=True):
        torch.testing.assert_close(ours, apply_rot_embed_cat(vectors, theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 3), (6, 9)], ids=str)
def test_rope_rescaled_to_the_trained_grid_against_timm(grid: Grid) -> None:
    q, k = queries_and_keys(grid, torch.float32)
    rope = RotaryEmbeddingCat(HEAD_DIM, temperature=100.0, in_pixels=False, grid_indexing="xy", ref_feat_shape=[4, 7])
    rotated, _ = create_encoding("rope:beyond=rescale", HEADS, HEAD_DIM, (4, 7)).rotate(q, k, grid)
    torch.testing.assert_close(rotated, apply_rot_embed_cat(q, rope.get_embed(list(grid))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rope_mixed_against_timm(grid: Grid) -> None:
    q, k = queries_and_keys(grid, torch.float32)
    dim = HEADS * HEAD_DIM
    theirs = RotaryEmbeddingMixed(dim, depth=1, num_heads=HEADS, temperature=10.0, feat_shape=list(grid), grid_indexing="xy")
    encoding = create_encoding("rope_mixed", HEADS, HEAD_DIM, grid)
    encoding.load_state_dict({"frequencies": theirs.freqs.detach()[:, 0]})
    embedding = theirs.get_embed(list(grid))[0]  # layer 0
    for ours, vectors in zip(encoding.rotate(q, k, grid), (q, k), strict=True):
        torch.testing.assert_close(ours, apply_rot_embed_cat(vectors, embedding), rtol=1e-5, atol=1e-5)


def test_rope_mixed_starts_as_timm_does() -> None:
    torch.manual_seed(0)
    theirs = init_random_2d_freqs(HEAD_DIM, depth=1, num_heads=HEADS, temperature=10.0)[:, 0]
    torch.manual_seed(0)
    ours = create_encoding("rope_mixed", HEADS, HEAD_DIM, (4, 4)).frequencies
    torch.testing.assert_close(ours.data, theirs)
    plain = init_random_2d_freqs(HEAD_DIM, depth=1, num_heads=HEADS, temperature=10.0, rotate=False)[:, 0]
    torch.testing.assert_close(create_encoding("rope_mixed:init=axes", HEADS, HEAD_DIM, (4, 4)).frequencies.data, plain)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rpe_against_timm(grid: Grid) -> None:
    theirs = RelPosBias(grid, HEADS)
    encoding = create_encoding("rpe", HEADS, HEAD_DIM, grid)
    table = theirs.relative_position_bias_table.detach().T.unflatten(-1, encoding.table.shape[1:])
    encoding.load_state_dict({"table": table.flip(1, 2)})  # Swin's offsets run from n to i
    q, k = queries_and_keys(grid, torch.float32)
    torch.testing.assert_close(encoding.bias(q, k, grid).dense(), theirs.get_bias()[0], rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (2, 5), (6, 9)], ids=str)
def test_rpe_decomposed_against_sam_on_trained_and_other_grids(grid: Grid) -> None:
    torch.manual_seed(0)
    encoding = create_encoding("rpe_decomposed", HEADS, HEAD_DIM, (3, 7)).double()
    for table in encoding.parameters():
        table.data.normal_()
    q, k = queries_and_keys(grid)
    theirs = get_decomposed_rel_pos_bias(
        q.flatten(0, 1), encoding.table_y.flip(0), encoding.table_x.flip(0), grid, grid
    )  # SAM's offsets run from n to i
    torch.testing.assert_close(encoding.bias(q, k, grid).dense().flatten(0, 1), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sincos_against_timm(grid: Grid) -> None:
    """timm puts all sines before all cosines of (x, y); ours are sin x, cos x, sin y, cos y."""
    dim = HEADS * HEAD_DIM
    theirs = build_sincos2d_pos_embed([grid[1], grid[0]], dim)  # its grid runs over its first axis slowest
    theirs = theirs.unflatten(0, (grid[1], grid[0])).transpose(0, 1).flatten(0, 1)  # row-major
    sin_x, sin_y, cos_x, cos_y = theirs.chunk(4, dim=-1)
    ours = create_encoding("sincos", HEADS, HEAD_DIM, grid).table(grid)
    torch.testing.assert_close(ours.float(), torch.cat([sin_x, cos_x, sin_y, cos_y], dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("coordinates", ["separate", "min", "max"])
def test_the_rotation_of_dinov3_against_timm(grid: Grid, coordinates: str) -> None:
    q, k = queries_and_keys(grid, torch.float32)
    theirs = RotaryEmbeddingDinoV3(HEAD_DIM, normalize_coords=coordinates).eval().get_embed(list(grid))
    encoding = create_encoding(f"rope:preset=dinov3,coordinates={coordinates}", HEADS, HEAD_DIM, grid).eval()
    for ours, vectors in zip(encoding.rotate(q, k, grid), (q, k), strict=True):
        torch.testing.assert_close(ours, apply_rot_embed_cat(vectors, theirs, half=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "moves",
    [{"rescale": 2.0}, {"shift": 0.3}, {"jitter": 1.5}, {"shift": 0.3, "jitter": 1.5, "rescale": 2.0}],
    ids=lambda moves: "+".join(moves),
)
def test_places_move_in_training_as_in_timm_s_dinov3(moves: dict[str, float]) -> None:
    """The same draws in the same order from one seed; none in evaluation."""
    grid = (3, 7)
    q, k = queries_and_keys(grid, torch.float32)
    options = ",".join(f"train_{name}={moves.get(name, none)}" for name, none in (("shift", 0), ("jitter", 1), ("rescale", 1)))
    encoding = create_encoding(f"rope:preset=dinov3,{options}", HEADS, HEAD_DIM, grid)
    rope = RotaryEmbeddingDinoV3(HEAD_DIM, **{f"{name}_coords": value for name, value in moves.items()}).train()
    torch.manual_seed(3)
    theirs = rope.get_embed(list(grid))
    torch.manual_seed(3)
    moved = encoding.train().rotate(q, k, grid)[0]
    torch.testing.assert_close(moved, apply_rot_embed_cat(q, theirs, half=True), rtol=1e-5, atol=1e-5)
    still = encoding.eval().rotate(q, k, grid)[0]
    assert torch.equal(still, encoding.rotate(q, k, grid)[0])
    assert (still - moved).abs().max() > 1e-2


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (6, 9)], ids=str)
def test_log_cpb_against_timm(grid: Grid) -> None:
    """Trained on 3x7; on other grids as Swin V2 with that as its pretrained window."""
    torch.manual_seed(0)
    theirs = RelPosMlp(grid, HEADS, hidden_dim=512, mode="swin", pretrained_window_size=(3, 7)).eval()
    encoding = create_encoding("log_cpb", HEADS, HEAD_DIM, (3, 7))
    weights = {"first.weight": "fc1.weight", "first.bias": "fc1.bias", "last.weight": "fc2.weight"}
    encoding.load_state_dict({f"network.{ours}": theirs.mlp.state_dict()[name] for ours, name in weights.items()})
    q, k = queries_and_keys(grid, torch.float32)
    torch.testing.assert_close(encoding.bias(q, k, grid).dense(), theirs.get_bias()[0], rtol=1e-5, atol=1e-5)


def published_fire(length: int, trained: int, mlp: Callable[[Tensor], Tensor], c: float) -> Tensor:
    """arXiv:2310.04418, f(psi(i - j) / psi(max(L, i))) with psi(x) = log(c x + 1), for the last query of a text, which sees

    all others: (length, heads). L is as long as the training.
    """
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    largest = max(trained, length - 1)
    share = torch.log(c * distance + 1) / (math.log(c * largest + 1) + 1e-6)
    return mlp(torch.stack([torch.zeros_like(share), share], dim=-1))


@pytest.mark.parametrize("length", [4, 7, 20])
def test_fire_on_a_row_is_fire_on_a_text_for_the_last_query(length: int) -> None:
    torch.manual_seed(0)
    encoding = create_encoding("fire", HEADS, HEAD_DIM, (1, 7)).double()
    q, k = queries_and_keys((1, length))
    bias = encoding.bias(q, k, (1, length)).dense()[:, -1]  # (h, N)
    torch.testing.assert_close(bias, published_fire(length, 7, encoding.network, 0.1).T, rtol=1e-6, atol=1e-6)


def published_pape(x: Tensor, encoding: Any, grid: Grid) -> Tensor:
    """arXiv:2602.01418 with a channel for every parabola, as in its code: [c, a, 2 a p, b.p, b] . [1, -p^2, p, 1, -p]."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1).double() + 1  # counted from 1 there
    p = torch.einsum("np,hmp->hnm", places, encoding.directions).expand(len(x), -1, -1, -1)
    a = torch.einsum("bnd,hmd->bhnm", x, encoding.curvature).exp().log1p()
    b = torch.einsum("bnd,hmd->bhnm", x, encoding.slope)
    one = torch.ones_like(p[..., :1])
    of_query = torch.cat([-(a * p * p).sum(-1, True), a, 2 * a * p, (b * p).sum(-1, True), b], -1)
    of_key = torch.cat([one, -p * p, p, one, -p], -1)
    return of_query @ of_key.transpose(-1, -2) / HEAD_DIM**0.5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pape_against_its_published_channels(grid: Grid) -> None:
    torch.manual_seed(0)
    encoding = create_encoding("pape", HEADS, HEAD_DIM, grid).double()
    q, k = queries_and_keys(grid)
    x = torch.randn(2, grid[0] * grid[1], HEADS * HEAD_DIM, dtype=torch.float64)
    bias = encoding.bias(q, k, grid, x).dense()
    torch.testing.assert_close(bias, published_pape(x, encoding, grid), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pope_against_pope_pytorch(grid: Grid) -> None:
    """Logits under the encoding; x and y have half of the channels each there, too. It computes angles in float32."""
    library = pytest.importorskip("PoPE_pytorch", exc_type=ImportError)
    half = HEAD_DIM // 2
    theirs = library.AxialPoPE(HEAD_DIM, heads=HEADS, axial_dims=(half, half), theta=50.0)
    torch.nn.init.uniform_(theirs.bias, -6, 0)
    encoding = create_encoding("pope:temperature=50", HEADS, HEAD_DIM, grid)
    encoding.load_state_dict({"phase": theirs.bias.detach()})
    q, k = queries_and_keys(grid, torch.float32)
    turned_q, turned_k = theirs.apply_pope_to_qk(theirs(grid), q, k)
    expected = turned_q @ turned_k.mT / HEAD_DIM**0.5
    torch.testing.assert_close(logits(q, k, grid, encoding), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "axis"), [((1, 9), 1), ((9, 1), 0)])
def test_forget_gates_on_one_line_against_x_transformers(grid: Grid, axis: int) -> None:
    library = pytest.importorskip("x_transformers.x_transformers", exc_type=ImportError)
    torch.manual_seed(0)
    dim = HEADS * HEAD_DIM
    theirs = library.DataDependentAlibi(dim, HEADS, causal=False).double()
    encoding = create_encoding("forget", HEADS, HEAD_DIM, grid).double()
    gates = theirs.to_forget_gates[0]
    gates.weight.data.copy_(encoding.weight[axis].flatten(0, 1))  # backwards first, as there
    gates.bias.data.copy_(encoding.offset[axis].flatten())
    q, k = queries_and_keys(grid)
    x = torch.randn(2, 9, dim, dtype=torch.float64)
    torch.testing.assert_close(encoding.bias(q, k, grid, x).dense(), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_heads", [3, 8])
def test_alibi_on_one_line_against_x_transformers(num_heads: int) -> None:
    library = pytest.importorskip("x_transformers.x_transformers", exc_type=ImportError)
    q = torch.zeros(1, num_heads, 9, HEAD_DIM)
    bias = create_encoding("alibi", num_heads, HEAD_DIM, (1, 9)).bias(q, q, (1, 9)).dense()
    torch.testing.assert_close(bias, library.AlibiPositionalBias(num_heads)(9, 9))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("count", ["suffix", "causal"])
@pytest.mark.parametrize("num_positions", [10, 22])
def test_cope_against_x_transformers(grid: Grid, count: str, num_positions: int) -> None:
    """It is given the logits, without their mask as on images, or with it; its bias is not divided by sqrt(d)."""
    library = pytest.importorskip("x_transformers.x_transformers", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = library.CoPE(HEAD_DIM, HEADS, max_pos=num_positions).double()
    encoding = create_encoding(f"cope:count={count},num_positions={num_positions}", HEADS, HEAD_DIM, grid).double()
    torch.nn.init.normal_(encoding.table)
    theirs.load_state_dict({"pos_emb": encoding.table.detach()})
    q, k = queries_and_keys(grid)
    products = q @ k.mT / HEAD_DIM**0.5
    if count == "causal":
        products = products.masked_fill(torch.ones(products.shape[-2:]).triu(1).bool(), -torch.inf)
    expected = theirs(q, products) / HEAD_DIM**0.5
    torch.testing.assert_close(encoding.bias(q, k, grid).dense(), expected, rtol=1e-10, atol=1e-10)


def published_views(grid: Grid) -> dict[str, Tensor]:
    """What the authors' code of LookHere (arXiv:2405.13985) leaves to see, (N, N) for each direction: of corners the rows and

    columns on the right side, of triangles what lies between the two diagonals through the patch.
    """
    height, width = grid
    views: dict[str, list[Tensor]] = {}
    for y, x in itertools.product(range(height), range(width)):
        rows, columns = torch.arange(height)[:, None].expand(grid), torch.arange(width).expand(grid)
        down, falling = rows >= y, torch.ones(grid).tril(x - y).bool()  # on or below the diagonal that falls to the right
        right, rising = columns >= x, torch.ones(grid).tril(width - 1 - x - y).flip(1).bool()
        over_falling, over_rising = ~torch.ones(grid).tril(x - y - 1).bool(), rows + columns <= y + x
        seen = {"up left": (rows <= y) & (columns <= x), "up right": (rows <= y) & right}
        seen |= {"down left": down & (columns <= x), "down right": down & right}
        seen |= {"up": over_falling & over_rising, "down": falling & rising}
        seen |= {"left": falling & over_rising, "right": over_falling & rising}
        for direction, patches in seen.items():
            views.setdefault(direction, []).append(patches.flatten())
    return {direction: torch.stack(each) for direction, each in views.items()}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lookhere_against_the_corners_triangles_and_distances_of_its_published_code(grid: Grid) -> None:
    """Twelve heads, as there: four corners, four triangles, four that look around."""
    q = torch.zeros(1, 12, grid[0] * grid[1], HEAD_DIM, dtype=torch.float64)
    bias = create_encoding("lookhere", 12, HEAD_DIM, grid).bias(q, q, grid).dense()
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    views = [*published_views(grid).values(), *[torch.ones_like(distance).bool()] * 4]
    for head, (view, slope) in enumerate(zip(views, [*[1 / 2] * 8, 1 / 4, 1 / 16, 1 / 64, 1 / 256], strict=True)):
        torch.testing.assert_close(bias[head], (-2 * slope * distance).where(view, torch.tensor(-500.0).double()))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_commuting_lie_rotations_are_rope_mixed_in_another_basis(grid: Grid, dtype: torch.dtype, close: float) -> None:
    """LieRE (arXiv:2406.10322) turns q and k by exp(x A_x + y A_y), A skew-symmetric. Where these commute, they are blocks of

    2x2 in a common basis V: A = V diag(w J) V^T. Then the exponential is V (the rotation of rope_mixed) V^T.
    """
    torch.manual_seed(0)
    encoding = create_encoding("rope_mixed", HEADS, HEAD_DIM, grid).to(dtype)
    q, k = queries_and_keys(grid, dtype)
    turned = encoding.rotate(q, k, grid)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    for head in range(HEADS):
        basis = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, dtype=dtype)).Q
        along_x, along_y = (
            basis @ torch.block_diag(*(w * quarter_turn for w in frequencies)) @ basis.T
            for frequencies in encoding.frequencies[:, head].detach()
        )
        torch.testing.assert_close(along_x @ along_y, along_y @ along_x, rtol=close, atol=close)
        torch.testing.assert_close(along_x, -along_x.T, rtol=close, atol=close)
        for n in range(grid[0] * grid[1]):
            rotation = torch.linalg.matrix_exp(n % grid[1] * along_x + n // grid[1] * along_y)
            for ours, vectors in zip(turned, (q, k), strict=True):
                expected = vectors[:, head, n] @ basis.T @ rotation.T @ basis  # in the basis, turned, and back
                torch.testing.assert_close(ours[:, head, n], expected, rtol=close, atol=close)


def test_cope_with_ten_positions_clamps_most_of_an_8x8_grid() -> None:
    """What P = 10 does: at the start, gates near 1/2, all but the last twenty keys share one position."""
    q, k = queries_and_keys((8, 8))
    positions = create_encoding("cope:num_positions=10", HEADS, HEAD_DIM, (8, 8)).double().maps(q, k, (8, 8))["positions"]
    assert (positions > 9).double().mean() > 0.6
    assert positions.max() <= 64
