"""Attention against its literal loops: prefix tokens, biases of every kind, and all ways to compute the products."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sape2 import SaPEAttention, create_encoding, reference
from sape2.attention import Attention, attend, choose_path, describe_path, module, paths
from sape2.attention.kernels import workspace
from sape2.encodings.base import AttentionEncoding, Composite, NoEncoding
from sape2.encodings.bias import AttentionBias, Factors, Matrix, Places
from sape2.encodings.distances import Distances

GRID = (3, 4)


class GivenBias(AttentionEncoding):
    """Returns the bias it was made with; its tensors are parameters, as those of an encoding would be."""

    def __init__(self, bias):
        super().__init__(2, 4, GRID)
        self.given = bias
        self.made_of = nn.ParameterList([] if bias is None else bias.tensors())

    def make_bias(self, content):
        return self.given


class DoubleRotation(AttentionEncoding):
    """Multiplies q by 2: stands for any rotation of grid tokens."""

    def __init__(self):
        super().__init__(2, 4, GRID)

    def rotate(self, q, k, grid):
        return 2 * q, k


def random(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def random_bias(kind):
    tokens = GRID[0] * GRID[1]
    kinds = {
        "dense": lambda: Matrix(random(2, 2, tokens, tokens)),
        "shared": lambda: Matrix(random(2, tokens, tokens)),  # one map for all images
        "alike": lambda: Matrix(random(tokens, tokens)),  # and for all heads
        "factored": lambda: Factors(random(2, 2, tokens, 5), random(1, 1, tokens, 5)),
        "places": lambda: Places(random(2, 2, tokens, 3), random(2, 2, tokens, 4)),
        "distances": lambda: Distances((random(2, 2, tokens, 4), random(2, 2, tokens, 3)), -0.5),
        "gained": lambda: Distances((random(2, 2, tokens, 4),), random(2, 1, 1)),
    }
    if kind == "none":
        return None
    return AttentionBias(*(kinds[name]() for name in (KINDS if kind == "sum" else [kind])))


KINDS = ["dense", "shared", "alike", "factored", "places", "distances", "gained"]


def random_qkv(num_prefix, dtype=torch.float64):
    return torch.randn(3, 2, 2, num_prefix + GRID[0] * GRID[1], 4, dtype=dtype)


def literal(q, k, v, bias, num_prefix):
    tokens = GRID[0] * GRID[1]
    dense = torch.zeros(2, 2, tokens, tokens).double() if bias is None else bias.dense().detach().expand(2, 2, -1, -1)
    heads = [[reference.attention(q[b, h], k[b, h], v[b, h], dense[b, h], num_prefix) for h in range(2)] for b in range(2)]
    return torch.stack([torch.stack(image) for image in heads])


PATHS = ["products", "fused", "blocks", "small blocks", "blocks of rows"]


def choose(monkeypatch, path):
    """Makes attention take a path; the last two cut the work smaller than it is, and keep no weights."""
    monkeypatch.setattr(module, "choose_path", lambda *_: path if path in PATHS[:3] else "blocks")
    monkeypatch.setattr(workspace, "BLOCK_ELEMENTS", 2**20 if path in PATHS[:3] else 100)
    monkeypatch.setattr(paths, "KEPT_ELEMENTS", 0 if path == "blocks of rows" else 2**25)


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("kind", ["none", *KINDS, "sum"])
def test_attention_agrees_with_the_literal_loops(kind, num_prefix, path, monkeypatch):
    choose(monkeypatch, path)
    bias = random_bias(kind)
    q, k, v = random_qkv(num_prefix)
    output = attend(q, k, v, GRID, GivenBias(bias))
    torch.testing.assert_close(output, literal(q, k, v, bias, num_prefix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [*KINDS, "sum"])
def test_all_paths_have_the_same_gradients(kind, monkeypatch):
    encoding = GivenBias(random_bias(kind))
    q, k, v = random_qkv(1)
    gradients = []
    for path in PATHS[:3]:
        choose(monkeypatch, path)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attend(*leaves, GRID, encoding).square().sum()
        gradients.append(torch.autograd.grad(output, [*leaves, *encoding.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-8, atol=1e-10)


CONTENT = ["sape2", "sape2:sign=learned,gate_scale=learned", "sape2:count=prefix,dot=key,normalize=sqrt_length",
           "sape2:count=cyclic,readout=direct", "sape2:readout=squared_distance", "sape2:num_positions=3,axes=x",
           "sape2:axes=raster", "sape2:beyond=rescale", "cope", "rope+sape2", "rpe+sape2+cope"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS[2:])
@pytest.mark.parametrize("name", CONTENT)
def test_blocks_equal_products_forward_and_backward(name, path, monkeypatch):
    """In float64, with prefix tokens, on an oblong grid that is not the one the tables were made for."""
    encoding = create_encoding(name, num_heads=3, head_dim=8, grid=(4, 3)).double()
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(3, 5, 3, 2 + 15, 8, dtype=torch.float64)
    results = []
    for way in ("products", path):
        choose(monkeypatch, way)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attend(*leaves, (3, 5), encoding)
        results.append([output, *torch.autograd.grad(output.sin().sum(), [*leaves, *encoding.parameters()])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["pape", "pape:form=rotation_invariant", "rope+forget", "pape+sape2"])
def test_encodings_that_read_the_input_of_the_block_get_its_grid_tokens(name, monkeypatch):
    """Products and the fused kernel agree, and gradients reach the input; blocks do not hand it on and are not chosen."""
    encoding = create_encoding(name, num_heads=3, head_dim=8, grid=(4, 3)).double()
    q, k, v = torch.randn(3, 5, 3, 2 + 15, 8, dtype=torch.float64)
    x = torch.randn(5, 2 + 15, 24, dtype=torch.float64)
    assert choose_path(q, encoding) == "products"
    results = []
    for way in ("products", "fused"):
        choose(monkeypatch, way)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, x)]
        output = attend(*leaves[:3], (3, 5), encoding, tokens=leaves[3])
        results.append([output, *torch.autograd.grad(output.sin().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)
    assert (results[0][-1][:, :2] == 0).all()  # prefix tokens have no bias
    assert (results[0][-1][:, 2:].abs().amax((0, 2)) > 0).all()
    with pytest.raises(ValueError, match="input of the block"):
        attend(q, k, v, (3, 5), encoding)


def test_tokens_of_another_width_are_refused():
    encoding = create_encoding("pape", num_heads=3, head_dim=8, grid=(4, 3))
    q = torch.randn(1, 3, 12, 8)
    with pytest.raises(ValueError, match=r"width 24 .* got 32"):
        attend(q, q, q, (4, 3), encoding, tokens=torch.randn(1, 12, 32))


def test_a_wrong_gradient_of_a_term_is_seen(monkeypatch):
    """The comparison above fails for a term that forgets one of the two sides of a distance."""
    monkeypatch.setattr(Distances, "accumulate", lambda *_: None)
    with pytest.raises(AssertionError):
        test_all_paths_have_the_same_gradients("distances", monkeypatch)


@pytest.mark.parametrize("name", ["sape2", "rpe_contextual"])
def test_float32_stays_within_1e_4_of_float64(name):
    torch.manual_seed(0)
    encoding = create_encoding(name, num_heads=2, head_dim=16, grid=(6, 5))
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, std=0.2)
    q, k, v = torch.randn(3, 4, 2, 30, 16)
    found = attend(q, k, v, (6, 5), encoding)
    expected = attend(q.double(), k.double(), v.double(), (6, 5), encoding.double())
    assert (found - expected).abs().max() < 1e-4


def test_a_second_backward_pass_and_autocast_work_in_blocks():
    encoding = create_encoding("sape2", num_heads=2, head_dim=8, grid=GRID)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 12, 8))
    output = attend(q, k, v, GRID, encoding)
    first = torch.autograd.grad(output.sum(), [q, encoding.table_x], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), [q, encoding.table_x]), first)
    with torch.autocast("cpu", torch.bfloat16):
        half = attend(q, k, v, GRID, encoding)
    assert half.dtype == torch.bfloat16
    assert (half - output).abs().max() < 0.05
    assert torch.autograd.grad(half.float().sum(), [q])[0].isfinite().all()


def test_prefix_tokens_are_neither_rotated_nor_biased():
    q, k, v = random_qkv(2)
    doubled = q.clone()
    doubled[:, :, 2:] *= 2
    encoding = Composite([DoubleRotation(), GivenBias(random_bias("dense"))])
    expected = literal(doubled, k, v, encoding.bias(q[:, :, 2:], k[:, :, 2:], GRID), 2)
    torch.testing.assert_close(attend(q, k, v, GRID, encoding), expected, rtol=1e-9, atol=1e-9)


def test_biases_of_a_composite_add_up_whatever_their_form():
    dense, factored = random_bias("dense"), random_bias("factored")
    both = Composite([GivenBias(dense), NoEncoding(), GivenBias(factored)]).bias(*random_qkv(0)[:2], GRID)
    torch.testing.assert_close(both.dense(), dense.dense() + factored.dense())
    twice = factored + factored
    torch.testing.assert_close(twice.dense(), 2 * factored.dense())
    assert twice.unfactored() is None


def test_attention_maps_are_the_weights_that_forward_uses():
    attention = SaPEAttention(dim=8, num_heads=2, encoding="sape2", grid=GRID).double()
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    maps = attention.maps(x, GRID)
    values = attention.project(x)[2]
    output = attention.proj((maps["attention"] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, attention(x, grid=GRID))
    assert maps["gates_x"].shape == (2, 2, 12, 4)
    assert maps["attention"].shape == (2, 2, 14, 14)


def test_the_path_is_chosen_by_the_bias_the_length_and_what_is_asked_of_the_graph():
    q, sape2 = torch.zeros(1, 2, 12, 4), create_encoding("sape2", num_heads=2, head_dim=4, grid=GRID)
    assert choose_path(q, NoEncoding()) == "products"
    assert choose_path(torch.zeros(1, 1, 600, 4), NoEncoding()) == "fused"
    assert choose_path(q, sape2) == choose_path(q, Composite([NoEncoding(), sape2])) == "blocks"
    assert choose_path(q, sape2, dropout=0.1) == "products"
    assert choose_path(q.to("meta"), sape2) == "products"
    assert torch.func.vmap(lambda x: torch.tensor(choose_path(x, sape2) == "products"))(q[None]).all()
    assert describe_path(q, q, q, GRID, sape2) == "blocks, distances, weights kept"
    assert describe_path(q, q, q, GRID, NoEncoding()) == "products"


AS_KEYS = ["sape2:readout=direct,gates=constant", "sape2:readout=direct,gates=none,count=both,sign=learned,divide_bias=true",
           "sape2:readout=direct,gates=constant,count=prefix,axes=raster,normalize=sqrt_length,beyond=rescale",
           "key_table", "key_table:by=token,heads=shared,divide_bias=false",
           "rpe+key_table", "rpe_contextual+sape2:readout=direct,gates=constant+log_cpb",
           "rope+key_table", "rope_mixed+key_table:by=token+sape2:readout=direct,gates=constant"]  # fmt: skip


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("name", AS_KEYS)
def test_vectors_added_to_keys_equal_the_bias(name, num_prefix, monkeypatch):
    """Prefix tokens get none of it: as queries they meet the keys as they are."""
    encoding = create_encoding(name, num_heads=3, head_dim=8, grid=(4, 3)).double()
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(3, 5, 3, num_prefix + 15, 8, dtype=torch.float64)
    how = "channels beside the keys" if name.startswith("rope") else "added to keys"
    if not name.startswith("rpe"):
        assert describe_path(q, k, v, (3, 5), encoding) == f"products, {how}"
    elif not num_prefix:
        assert describe_path(q, k, v, (3, 5), encoding).startswith("blocks, ")
        assert describe_path(q, k, v, (3, 5), encoding).endswith("weights kept, added to keys")

    def results():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attend(*leaves, (3, 5), encoding)
        return [output, *torch.autograd.grad(output.sin().sum(), [*leaves, *encoding.parameters()])]

    found = results()
    encoding.gives_key_vectors = encoding.gives_some_key_vectors = False
    choose(monkeypatch, "products")
    torch.testing.assert_close(found, results(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cope", "blocks, matrix, weights kept"),
        ("rope+sape2:readout=direct,gates=constant", "products, channels beside the keys"),  # queries are turned
        ("rpe+sape2:readout=direct,gates=constant", "blocks, matrix, weights kept, added to keys"),
        ("rope+rpe+sape2:readout=direct,gates=constant", "blocks, matrix, places, weights kept"),  # turned, and a map
        ("sape2:readout=direct,gates=constant,dot=key", "blocks, places, weights kept"),
        ("sape2:readout=direct,gates=constant,count=between", "blocks, places, weights kept"),
        ("key_table+sape2:readout=direct,gates=constant", "products, added to keys"),
        ("key_table:to=both", "blocks, places, factors, weights kept"),
    ],
)
def test_a_bias_is_added_to_keys_where_it_is_nothing_else(name, path):
    q = torch.zeros(1, 2, 12, 4)
    encoding = create_encoding(name, num_heads=2, head_dim=4, grid=GRID)
    assert describe_path(q, q, q, GRID, encoding) == path
    assert attend(q, q, q, GRID, encoding).isfinite().all()


def test_attention_on_a_cpu_imports_no_kernel_of_a_device():
    code = """
import sys, torch
from sape2.attention import attend
from sape2 import create_encoding
q = torch.zeros(1, 2, 12, 4, requires_grad=True)
attend(q, q, q, (3, 4), create_encoding("sape2", 2, 4, (3, 4))).sum().backward()
assert not [name for name in sys.modules if name.startswith(("triton.", "sape2.attention.kernels.distance"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functional_and_forward_mode_derivatives_equal_the_gradient():
    encoding = create_encoding("sape2", num_heads=2, head_dim=4, grid=GRID).double().requires_grad_(False)
    q, k, v = random_qkv(0)
    direction = torch.randn_like(q)

    def loss(queries):
        return attend(queries, k, v, GRID, encoding).sin().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected, rtol=1e-8, atol=1e-10)
    slope = torch.func.jvp(loss, (q,), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-8, atol=1e-10)


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
            "12 .*11",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_checkpointing_over_two_sizes_changes_no_gradient():
    encoding = create_encoding("sape2", num_heads=2, head_dim=8, grid=GRID).double()
    inputs = {grid: torch.randn(3, 2, 2, grid[0] * grid[1], 8, dtype=torch.float64) for grid in (GRID, (2, 5))}

    def gradients(call):
        outputs = [call(lambda q, k, v, grid=grid: attend(q, k, v, grid, encoding), *qkv) for grid, qkv in inputs.items()]
        return torch.autograd.grad(sum(output.square().sum() for output in outputs), list(encoding.parameters()))

    def checkpointed(function, *tensors):
        return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)

    torch.testing.assert_close(gradients(checkpointed), gradients(lambda function, *tensors: function(*tensors)))
