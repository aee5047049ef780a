"""The peers of the benchmarks compute what they stand for: the literal loops, and the same numbers as our encodings."""

import importlib
import sys

import pytest
import straightforward
import torch
from peers import PLAIN, contenders, make_straightforward, random_tokens

from sape2 import create_model, reference
from sape2.evaluation.cost.measure import forward_backward
from sape2.runs.rows import read_rows

HEADS, HEAD_DIM = 2, 8
GRIDS = [(3, 4), (5, 2)]


def attention_loops(q, k, v, bias_of_head):
    """Literal attention of every image and head; `bias_of_head(q, k)` is (N, N)."""
    heads = [
        [reference.attention(q[b, h], k[b, h], v[b, h], bias_of_head(q[b, h], k[b, h]), 0) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.stack(image) for image in heads])


def tokens(grid):
    torch.manual_seed(0)
    return [t.detach() for t in random_tokens(1, HEADS, grid, HEAD_DIM, torch.float64)[:3]]


# A square root of a difference of products is right to about the root of the rounding: 1e-7 in float64.
@pytest.mark.parametrize(("mode", "tolerance"), [("use_mm_for_euclid_dist", 1e-6), ("donot_use_mm_for_euclid_dist", 1e-12)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_straightforward_sape2_against_the_literal_loops(grid, mode, tolerance):
    q, k, v = tokens(grid)
    tables = {axis: torch.randn(max(grid) + 1, HEAD_DIM, dtype=torch.float64) for axis in ("x", "y")}
    found = straightforward.sape2(q, k, v, tables["x"], tables["y"], grid, mode)
    expected = attention_loops(q, k, v, lambda q, k: reference.sape2(q, k, tables, grid)["bias"])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_straightforward_cope_against_the_literal_loops(grid):
    q, k, v = tokens(grid)
    table = torch.randn(7, HEAD_DIM, dtype=torch.float64)
    expected = attention_loops(q, k, v, lambda q, k: reference.cope(q, k, table))
    torch.testing.assert_close(straightforward.cope(q, k, v, table), expected, rtol=1e-12, atol=1e-12)


def same_encoding():
    """(ours, peer) by name: every peer against ours of the same encoding."""
    names = list(contenders(HEADS, HEAD_DIM, (3, 4)))
    groups = {name.partition(":")[0]: name for name in names if name.endswith(": ours")} | {"plain": "none: ours"}
    return [(groups[name.partition(":")[0]], name) for name in names if not name.endswith(": ours")]


@pytest.mark.parametrize("grid", [(3, 4), (6, 6)], ids=str)
@pytest.mark.parametrize(("ours", "peer"), same_encoding())
def test_a_peer_gives_the_output_and_the_gradients_of_ours(ours, peer, grid):
    torch.manual_seed(0)
    modules = {name: module.double() for name, module in contenders(HEADS, HEAD_DIM, grid, table_std=1.0).items()}
    inputs = random_tokens(2, HEADS, grid, HEAD_DIM, torch.float64)
    tolerance = 1e-6 if "straightforward" in peer else 1e-10
    torch.testing.assert_close(modules[peer](*inputs[:3]), modules[ours](*inputs[:3]), rtol=tolerance, atol=tolerance)
    found, expected = forward_backward(modules[peer], inputs), forward_backward(modules[ours], inputs)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-5, atol=1e-6)


def test_every_encoding_of_the_goals_has_a_peer():
    assert {ours.partition(":")[0] for ours, _ in same_encoding()} == {
        "none",
        "sape2",
        "rpe_decomposed",
        "rpe_contextual",
        "cope",
    }


def test_the_comparison_sees_a_peer_that_is_wrong():
    q, k, v = tokens((3, 4))
    tables = torch.randn(2, 5, HEAD_DIM, dtype=torch.float64)
    right = straightforward.sape2(q, k, v, *tables, (3, 4))
    exchanged = straightforward.sape2(q, k, v, *tables.flip(0), (3, 4))  # the table of rows read along columns
    assert (right - exchanged).abs().max() > 0.01
    assert (right - contenders(HEADS, HEAD_DIM, (3, 4))[PLAIN](q, k, v)).abs().max() > 0.01


def test_a_model_made_straightforward_gives_the_same_logits():
    torch.manual_seed(0)
    model = create_model("vit_nano", encoding="ape+sape2", image_size=(12, 16), patch_size=4, num_classes=3).double()
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    expected = model(images)
    torch.testing.assert_close(make_straightforward(model)(images), expected, rtol=1e-6, atol=1e-6)
    assert {type(block.attn.encoding).__name__ for block in model.layers()} == {"StraightforwardSaPE2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "smaller", "results"),
    [
        ("attention_cost", {"SHAPES": [(1, (2, 3))]}, 2 * 15),
        ("model_cost", {"SHAPES": [(1, 32, 16)]}, 2 * 5),
        ("memory", {"SIDES": [2, 4], "MAX_SIDE": 40, "LAW": (5, 6), "IN_BLOCKS": (49, 52)}, 2 * 6 + 6 + 3 + 2),
    ],
)
def test_benchmarks_run_from_end_to_end(module, smaller, results, tmp_path, monkeypatch, capsys):
    benchmark = importlib.import_module(module)
    for name, value in smaller.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(sys, "argv", [module, "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "rows.jsonl")])
    benchmark.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == results
    assert all({"date", "hardware", "torch", "threads", "commit"} <= row.keys() for row in rows)
    assert "| form |" in capsys.readouterr().out.replace("encoding |", "form |")
