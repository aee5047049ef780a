"""The fused kernels of attention with distances, run by Triton's interpreter on a CPU (tests/conftest.py switches it on)."""

import contextlib
import importlib.util
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sape2 import create_encoding, reference
from sape2.attention import attend, choose_path, describe_path, kernels, module, paths
from sape2.attention.kernels import distance_attention, trial
from sape2.attention.kernels.readable import readable_attention
from sape2.attention.products import fused_width
from sape2.encodings.bias import AttentionBias, Factors, Matrix
from sape2.encodings.distances import Distances

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

HEADS = 2
SMALL = [  # grid, prefix tokens, head_dim, dtype
    ((3, 5), 0, 32, torch.float32),
    ((5, 7), 1, 64, torch.bfloat16),
    ((7, 3), 5, 80, torch.float16),
]
LARGE = [
    (grid, num_prefix, head_dim, dtype)
    for grid in ((3, 5), (9, 8))
    for num_prefix in (0, 1, 5)
    for head_dim in (32, 64, 80, 128)
    for dtype in trial.DTYPES
]
CASES = [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest number


def random_case(grid, num_prefix, head_dim, dtype, images=1):
    """q, k, v, the gain and the vectors of two axes."""
    tokens = grid[0] * grid[1]
    q, k, v = torch.randn(3, images, HEADS, num_prefix + tokens, head_dim).to(dtype)
    return [q, k, v, torch.tensor([0.7, -0.4]), *(torch.randn(images, HEADS, tokens, length) for length in grid[::-1])]


def literal(q, k, v, gain, *vectors, grid, num_prefix):
    """The loops of reference.py, in float64."""
    q, k, v, gain, *vectors = (t.detach().double() for t in (q, k, v, gain, *vectors))
    tokens = grid[0] * grid[1]

    def bias(image, head):
        pairs = torch.zeros(tokens, tokens, dtype=torch.float64)
        for i in range(tokens):
            for n in range(tokens):
                pairs[i, n] = sum(reference.sape2_pair(s[image, head], i, n, grid, "x", "distance") for s in vectors)
        return gain[head] * pairs

    heads = [
        [reference.attention(q[b, h], k[b, h], v[b, h], bias(b, h), num_prefix) for h in range(q.shape[1])]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(image) for image in heads])


def fused(q, k, v, gain, *vectors, num_prefix):
    return distance_attention(q, k, v, vectors, gain, num_prefix)


def gradients(attention, given, **options):
    leaves = [t.detach().requires_grad_() for t in given]
    return torch.autograd.grad(attention(*leaves, **options).double().sin().sum(), leaves)


def assert_close(found, expected, tolerance):
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    assert error <= tolerance


# --- against the equations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "num_prefix", "head_dim", "dtype"), CASES)
def test_the_output_equals_the_literal_loops(grid, num_prefix, head_dim, dtype):
    given = random_case(grid, num_prefix, head_dim, dtype)
    found = fused(*given, num_prefix=num_prefix)
    assert found.dtype == dtype
    assert_close(found, literal(*given, grid=grid, num_prefix=num_prefix), TOLERANCES[dtype])


@pytest.mark.parametrize(("grid", "num_prefix", "head_dim", "dtype"), CASES)
def test_gradients_equal_those_of_the_readable_form_in_float64(grid, num_prefix, head_dim, dtype):
    given = random_case(grid, num_prefix, head_dim, dtype)
    scale = head_dim**-0.5
    expected = gradients(
        lambda q, k, v, gain, *s: readable_attention(q, k, v, s, gain, num_prefix, scale), [t.double() for t in given]
    )
    for found, wanted in zip(gradients(fused, given, num_prefix=num_prefix), expected, strict=True):
        assert_close(found, wanted, 2 * TOLERANCES[dtype])


def test_gradients_equal_finite_differences_of_the_literal_loops():
    grid, num_prefix = (2, 3), 1
    given = random_case(grid, num_prefix, 16, torch.float32)
    found = gradients(fused, given, num_prefix=num_prefix)
    for place, gradient in enumerate(found):
        direction = torch.randn_like(given[place]).double()

        def loss(step, place=place, direction=direction):
            moved = [t.double() + step * direction if i == place else t for i, t in enumerate(given)]
            return literal(*moved, grid=grid, num_prefix=num_prefix).sin().sum()

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-5)


def test_the_readable_form_equals_the_literal_loops():
    given = [t.double() for t in random_case((3, 5), 2, 8, torch.float32, images=2)]
    q, k, v, gain, *vectors = given
    found = readable_attention(q, k, v, tuple(vectors), gain, 2, 8**-0.5)
    torch.testing.assert_close(found, literal(*given, grid=(3, 5), num_prefix=2), rtol=1e-12, atol=1e-12)


# --- distances of exactly 0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [14, 100])
def test_equal_vectors_are_exactly_0_apart(places):
    """With q = 0 and v the identity the output is the softmax of the distances; vectors are far from 0 and long."""
    kinds = torch.arange(15) % 3
    vectors = (100 + 10 * torch.randn(3, places))[kinds].expand(1, 1, -1, -1)
    zeros, identity = torch.zeros(1, 1, 15, 16), torch.eye(15, 16).expand(1, 1, -1, -1)
    weights = distance_attention(zeros, zeros, identity, [vectors, vectors], 0.05)[0, 0, :, :15]
    same = kinds[:, None] == kinds
    assert torch.equal(weights[same].view(15, 5), weights.diagonal()[:, None].expand(-1, 5))
    assert (weights[~same].view(15, 10) > weights.diagonal()[:, None]).all()


def test_where_all_vectors_are_equal_there_is_no_bias_and_no_gradient():
    q, k, v, gain, *vectors = random_case((3, 5), 1, 16, torch.float32)
    vectors = [s[:, :, :1].expand_as(s) for s in vectors]
    assert torch.equal(fused(q, k, v, gain, *vectors, num_prefix=1), fused(q, k, v, 0 * gain, *vectors, num_prefix=1))
    *content, to_gain, to_x, to_y = gradients(fused, [q, k, v, gain, *vectors], num_prefix=1)
    assert not torch.cat([to_gain, to_x.flatten(), to_y.flatten()]).any()
    assert all(t.isfinite().all() and t.any() for t in content)


def test_a_vector_that_is_no_number_is_not_taken_for_0():
    q, k, v, gain, *vectors = random_case((3, 5), 1, 16, torch.float32)
    vectors[0][0, 1, 4, 2] = math.nan
    found = fused(q, k, v, gain, *vectors, num_prefix=1)
    assert found[0, 1, 1:].isnan().all()
    assert found[0, 1, 0].isfinite().all()  # the prefix token, which has no bias
    assert found[0, 0].isfinite().all()


# --- memory, autograd, tracing ---------------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward_pass_grows_with_n():
    """The inputs, the output and one number for each query; the gradients alone fill what is made in it."""
    given = [t.requires_grad_() for t in random_case((3, 5), 1, 16, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = fused(*given, num_prefix=1)
    assert sorted(kept) == sorted([*(t.shape for t in given), output.shape, output.shape[:-1]])


def case_of_operator():
    q, k, v, gain, *vectors = (t.requires_grad_() for t in random_case((2, 3), 1, 16, torch.float32))
    return q, k, v, vectors, gain, 1, 0.25


@pytest.mark.parametrize(
    "test",
    ["test_schema", "test_autograd_registration", "test_faketensor",
     pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_operators_pass_the_checks_of_pytorch(test):
    from sape2.attention.kernels.operator import fused_attention, fused_gradients

    given = case_of_operator()
    torch.library.opcheck(fused_attention, given, test_utils=test)
    q, k, v, vectors, gain, *numbers = given
    inputs = (q.detach(), k.detach(), v.detach(), [s.detach() for s in vectors], gain.detach(), *numbers)
    output, lse = fused_attention(*inputs)
    torch.library.opcheck(fused_gradients, (torch.randn_like(output), *inputs, output, lse), test_utils=test)


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_readable_form():
    given = random_case((3, 5), 1, 16, torch.float32)

    def second(attention):
        leaves = [t.detach().requires_grad_() for t in given]
        first = torch.autograd.grad(attention(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    expected = second(lambda q, k, v, gain, *s: readable_attention(q, k, v, s, gain, 1, 0.25))
    for found, wanted in zip(second(lambda *leaves: fused(*leaves, num_prefix=1)), expected, strict=True):
        assert_close(found, wanted, 1e-4)


# --- attention under an encoding -------------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch):
    """Attention behaves as on a CUDA device whose kernels have passed their trial."""
    monkeypatch.setattr(module, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(paths, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(paths, "_kernels_take", lambda q, bias: kernels.distance.fits(q, bias))


NAMES = ["sape2", "rope+sape2:sign=learned,count=both"]
MORE = ["rpe_decomposed+sape2:divide_bias=true", "sape2:axes=raster", "sape2:axes=x,normalize=sqrt_length", "sape2:sign=minus"]


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_attention_by_the_kernels_equals_the_plain_products(name, on_device, monkeypatch):
    encoding = create_encoding(name, num_heads=2, head_dim=8, grid=(4, 3))
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(3, 1, 2, 2 + 15, 8)
    assert describe_path(q, k, v, (3, 5), encoding).startswith("triton")

    def results():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attend(*leaves, (3, 5), encoding)
        return [output, *torch.autograd.grad(output.sin().sum(), [*leaves, *encoding.parameters()])]

    found = results()
    monkeypatch.setattr(module, "choose_path", lambda *_: "products")
    for ours, plain in zip(found, results(), strict=True):
        assert_close(ours, plain, 1e-4)


def test_a_compiled_model_goes_through_the_kernels(on_device):
    encoding = create_encoding("sape2", num_heads=2, head_dim=16, grid=(3, 4))
    q, k, v = torch.randn(3, 1, 2, 13, 16)
    expected = attend(q, k, v, (3, 4), encoding)
    traced = []

    def backend(graph, _):
        traced.append(graph.code)
        return graph

    found = torch.compile(lambda *qkv: attend(*qkv, (3, 4), encoding), backend=backend, fullgraph=True)(q, k, v)
    assert "sape2.distance_attention" in traced[0]
    torch.testing.assert_close(found, expected)


def test_under_autocast_the_kernels_get_the_low_precision(on_device):
    encoding = create_encoding("sape2", num_heads=2, head_dim=16, grid=(3, 4))
    q, k, v = torch.randn(3, 1, 2, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, (3, 4), encoding)
    assert found.dtype == torch.bfloat16
    assert_close(found, attend(q, k, v, (3, 4), encoding), 0.05)


# --- which way -------------------------------------------------------------------------------------------------------


def test_a_device_takes_no_mask_where_none_is_needed(on_device):
    def path(name, dtype=torch.float32):
        encoding = create_encoding(name, num_heads=2, head_dim=16, grid=(3, 5)).to(dtype)
        return describe_path(*torch.zeros(3, 1, 2, 16, 16, dtype=dtype), (3, 5), encoding)

    assert path("sape2") == "triton, distances"
    assert path("sape2", dtype=torch.float64) == "fused, distances, a map as mask"
    assert path("sape2:readout=squared_distance") == "fused, factors, 26 channels"
    assert path("sape2:readout=direct") == "fused, places, 24 channels"
    assert path("sape2:readout=direct,gates=constant") == "fused, added to keys"
    assert path("rpe") == path("cope") == "fused, matrix, a map as mask"


def test_fused_attention_on_a_device_has_channels_in_eights():
    assert [fused_width(26, 16, torch.device(kind)) for kind in ("cuda", "cpu")] == [32, 26]


def test_what_the_kernels_do_not_take_goes_another_way():
    q = torch.zeros(1, 2, 16, 16)
    distances, factors, matrix = (
        Distances((torch.zeros(1, 2, 15, 5),)),
        Factors(*torch.zeros(2, 1, 2, 15, 4)),
        Matrix(torch.zeros(15, 15)),
    )

    def fits(*terms, q=q):
        return kernels.distance.fits(q, AttentionBias(*terms))

    assert fits(distances)
    assert fits(factors, distances)
    assert not fits(factors)
    assert not fits(matrix, distances)
    assert not fits(distances, distances)
    assert not fits(distances, q=q.double())
    assert not fits(distances, q=torch.zeros(1, 2, 16, 257))
    assert not fits(factors, distances, q=torch.zeros(1, 2, 16, 253))
    assert not kernels.takes(q, AttentionBias(distances))  # on a CPU


@pytest.fixture
def untried():
    trial._passes.cache_clear()
    yield
    trial._passes.cache_clear()


@pytest.mark.parametrize("inside", [contextlib.nullcontext, torch.inference_mode, FakeTensorMode])
def test_kernels_that_agree_are_trusted_without_a_word(inside, untried):
    """Also where the first use records no gradients, or has no numbers."""
    before = torch.get_rng_state()
    with warnings.catch_warnings(), inside():
        warnings.simplefilter("error")
        assert trial.trusted(torch.device("cpu"), torch.float32, 16)
    assert torch.equal(torch.get_rng_state(), before)


def wrong_output(q, k, v, vectors, gain, num_prefix):
    return 1.01 * readable_attention(q, k, v, tuple(vectors), gain, num_prefix, q.shape[-1] ** -0.5)


def wrong_gradient(q, k, v, vectors, gain, num_prefix):
    return readable_attention(q, k, v, tuple(s.detach() + 0 * s for s in vectors), gain, num_prefix, q.shape[-1] ** -0.5)


def refuses(*_):
    raise RuntimeError("no such instruction\non this device")


@pytest.mark.parametrize(
    ("fake", "message"),
    [(wrong_output, "the output differs"), (wrong_gradient, "gradient of s_y"), (refuses, "RuntimeError: no such instruction")],
)
def test_kernels_that_fail_their_trial_are_left_out_with_one_warning(fake, message, untried, monkeypatch):
    monkeypatch.setattr(kernels.distance, "distance_attention", fake)
    with pytest.warns(UserWarning, match=message) as caught:
        assert not trial.trusted(torch.device("cpu"), torch.float32, 16)
    assert not trial.trusted(torch.device("cpu"), torch.float32, 16)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_without_triton_the_kernels_are_not_asked(untried, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not trial.trusted(torch.device("cpu"), torch.float32, 16)
    with pytest.raises(RuntimeError, match="Triton"):
        fused(*random_case((2, 3), 0, 16, torch.float32), num_prefix=0)


def test_a_device_whose_kernels_are_not_trusted_gets_a_map(monkeypatch):
    """On tensors without memory that say that they are on a device."""
    encoding = create_encoding("sape2", num_heads=2, head_dim=16, grid=(3, 5))
    with FakeTensorMode():
        q = torch.empty(1, 2, 15, 16, device="cuda")
        bias = AttentionBias(Distances((torch.empty(1, 2, 15, 5, device="cuda"),)))
        for trusted, path in ((True, "triton"), (False, "fused")):
            monkeypatch.setattr(kernels.distance, "trusted", lambda *_, trusted=trusted: trusted)
            assert choose_path(q, encoding, bias=bias) == path
        assert choose_path(q, encoding, dropout=0.1, bias=bias) == "fused"


# --- bad input -------------------------------------------------------------------------------------------------------


def call(**changes):
    q, k, v, gain, *vectors = random_case((3, 5), 1, 16, torch.float32)
    given = {"q": q, "k": k, "v": v, "vectors": vectors, "gain": gain, "num_prefix": 1} | changes
    return distance_attention(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 2, 15, 16)}, r"\(1, 2, 15, 16\)"),
        ({"q": torch.zeros(2, 16, 16), "k": torch.zeros(2, 16, 16)}, r"\(B, h, T, d\)"),
        ({"v": torch.zeros(1, 2, 16, 300)}, "256 channels a head; got 16, v 300"),
        ({name: torch.zeros(1, 2, 16, 512) for name in "qk"}, "256 channels a head; got 512"),
        ({"v": torch.zeros(1, 2, 16, 16, dtype=torch.float64)}, "float16.*got torch.float32, torch.float32, torch.float64"),
        ({"num_prefix": 2}, r"\(1, 2, 14, S\).*num_prefix=2; got \(1, 2, 15, 5\)"),
        ({"num_prefix": -1}, "num_prefix=-1"),
        ({"vectors": []}, "got none"),
        ({"gain": torch.ones(3)}, r"2 heads; got \(3,\)"),
    ],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_what_does_not_fit_is_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_a_cpu_without_the_interpreter_says_what_to_set(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        call()
