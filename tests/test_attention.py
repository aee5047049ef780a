"""Attention against its literal loops: prefix tokens, biases of both forms, and both ways to compute the products."""

import pytest
import torch

from sape2 import SaPEAttention, reference
from sape2.attention import Attention, attend, choose_path
from sape2.encodings.base import AttentionBias, AttentionEncoding, Composite, NoEncoding

GRID = (3, 4)


class GivenBias(AttentionEncoding):
    """Returns the bias it was made with."""

    def __init__(self, bias):
        super().__init__(2, 4, GRID)
        self.given = bias

    def bias(self, q, k, grid):
        return self.given


class DoubleRotation(AttentionEncoding):
    """Multiplies q by 2: stands for any rotation of grid tokens."""

    def __init__(self):
        super().__init__(2, 4, GRID)

    def rotate(self, q, k, grid):
        return 2 * q, k


def random_bias(kind):
    tokens = GRID[0] * GRID[1]
    dense = AttentionBias(matrix=torch.randn(2, 2, tokens, tokens, dtype=torch.float64))
    shared = AttentionBias(matrix=torch.randn(2, tokens, tokens, dtype=torch.float64))  # one map for all images
    factored = AttentionBias(factors=(torch.randn(2, 2, tokens, 5).double(), torch.randn(1, 1, tokens, 5).double()))
    return {"none": None, "dense": dense, "shared": shared, "factored": factored, "sum": dense + factored}[kind]


def random_qkv(num_prefix, dtype=torch.float64):
    return torch.randn(3, 2, 2, num_prefix + GRID[0] * GRID[1], 4, dtype=dtype)


def literal(q, k, v, bias, num_prefix):
    tokens = GRID[0] * GRID[1]
    dense = torch.zeros(2, 2, tokens, tokens).double() if bias is None else bias.dense().expand(2, 2, -1, -1)
    heads = [[reference.attention(q[b, h], k[b, h], v[b, h], dense[b, h], num_prefix) for h in range(2)] for b in range(2)]
    return torch.stack([torch.stack(image) for image in heads])


@pytest.mark.parametrize("path", ["products", "fused"])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("kind", ["none", "dense", "shared", "factored", "sum"])
def test_attention_agrees_with_the_literal_loops(kind, num_prefix, path, monkeypatch):
    monkeypatch.setattr("sape2.attention.choose_path", lambda *_: path)
    bias = random_bias(kind)
    q, k, v = random_qkv(num_prefix)
    output = attend(q, k, v, GRID, GivenBias(bias))
    torch.testing.assert_close(output, literal(q, k, v, bias, num_prefix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "factored", "sum"])
def test_both_paths_have_the_same_gradients(kind, monkeypatch):
    bias = random_bias(kind)
    for tensor in (bias.matrix, *(bias.factors or ())):
        if tensor is not None and tensor.is_leaf:
            tensor.requires_grad_()
    q, k, v = random_qkv(1)
    gradients = []
    for path in ("products", "fused"):
        monkeypatch.setattr("sape2.attention.choose_path", lambda *_, path=path: path)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        attend(*leaves, GRID, GivenBias(bias)).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_prefix_tokens_are_neither_rotated_nor_biased():
    q, k, v = random_qkv(2)
    doubled = q.clone()
    doubled[:, :, 2:] *= 2
    encoding = Composite([DoubleRotation(), GivenBias(random_bias("dense"))])
    expected = literal(doubled, k, v, encoding.bias(q, k, GRID), 2)
    torch.testing.assert_close(attend(q, k, v, GRID, encoding), expected, rtol=1e-9, atol=1e-9)


def test_biases_of_a_composite_add_up_whatever_their_form():
    dense, factored = random_bias("dense"), random_bias("factored")
    both = Composite([GivenBias(dense), NoEncoding(), GivenBias(factored)]).bias(*random_qkv(0)[:2], GRID)
    torch.testing.assert_close(both.dense(), dense.dense() + factored.dense())
    twice = factored + factored
    torch.testing.assert_close(twice.dense(), 2 * factored.dense())
    assert twice.matrix is None


def test_attention_maps_are_the_weights_that_forward_uses():
    attention = SaPEAttention(dim=8, num_heads=2, encoding="sape2", grid=GRID).double()
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    maps = attention.maps(x, GRID)
    values = attention.project(x)[2]
    output = attention.proj((maps["attention"] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, attention(x, grid=GRID))
    assert maps["gates_x"].shape == (2, 2, 12, 4)
    assert maps["attention"].shape == (2, 2, 14, 14)


def test_a_long_sequence_without_a_map_is_fused_and_a_map_with_gradient_is_not():
    q = torch.zeros(1, 1, 600, 4)
    matrix = torch.zeros(1, 1, 600, 600)
    assert choose_path(q, None) == "fused"
    assert choose_path(q, matrix) == "fused"
    assert choose_path(q, matrix.requires_grad_()) == "products"
    with torch.no_grad():
        assert choose_path(q, matrix) == "fused"
    assert choose_path(q[:, :, :64], None) == "products"


def test_dropout_acts_in_training_only():
    attention = SaPEAttention(dim=8, num_heads=2, encoding="sape2", grid=GRID, attention_dropout=0.5)
    x = torch.randn(2, 12, 8)
    assert not torch.equal(attention(x, grid=GRID), attention(x, grid=GRID))
    attention.eval()
    assert torch.equal(attention(x, grid=GRID), attention(x, grid=GRID))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(10, 3), "dim=10, num_heads=3"),
        (lambda: SaPEAttention(10, 3, grid=GRID), "dim=10, num_heads=3"),
        (lambda: SaPEAttention(8, 2, "ape", grid=GRID), "acts on the tokens"),
        (lambda: SaPEAttention(8, 2, "ape+sape2", grid=GRID), "ape acts on the tokens"),
        (
            lambda: SaPEAttention(8, 2, grid=GRID)(torch.randn(1, 11, 8), grid=GRID),
            "has 12 tokens but the sequence has only 11",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
