"""The facts of the method SaPE2: gradients, symmetries, precision, mistakes. Its loops: test_encodings_against_reference."""

import math
import warnings

import pytest
import torch

from sape2.encodings import SaPE2, create_encoding

GRIDS = [(3, 5), (5, 2), (1, 4)]


def random_qk(grid, heads=2, batch=2, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, heads, grid[0] * grid[1], dim)
    q, k = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return q, k


def sape2(grid, heads=2, dim=8, **options):
    """A double SaPE2 with a table large enough that positions matter."""
    torch.manual_seed(0)
    options = {"table_std": 0.5} | options
    encoding = SaPE2(num_heads=heads, head_dim=dim, grid=grid, **options).double()
    for name, value in (("gate_scale", dim**-0.5), ("gain", encoding.options.gain_init or 1.0)):
        if name in dict(encoding.named_parameters()):  # float32 when made: put the rounding right
            torch.nn.init.constant_(getattr(encoding, name), value)
    return encoding


def test_presets_carry_both_readings_of_the_paper():
    assert SaPE2(2, 8, (3, 5)).options == SaPE2.listing(2, 8, (3, 5)).options
    equations = SaPE2.equations(2, 8, (3, 5)).options
    assert (equations.gate_scale, equations.divide_bias) == ("none", True)
    assert create_encoding("sape2:preset=equations", 2, 8, (3, 5)).options == equations


def test_default_tables_have_one_position_more_than_the_longer_side():
    encoding = SaPE2(num_heads=6, head_dim=64, grid=(8, 12))
    assert encoding.table_x.shape == encoding.table_y.shape == (13, 64)
    assert 0.015 < encoding.table_x.std() < 0.025


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dot": "key"}, {"count": "cyclic"}, {"count": "both", "sign": "learned"}, {"readout": "direct", "count": "between"},
     {"readout": "squared_distance"}, {"gate_scale": "learned", "normalize": "sqrt_length"}, {"preset": "equations"}],
    ids=str,
)  # fmt: skip
def test_gradients_agree_with_finite_differences(options):
    grid = (2, 3)
    encoding = sape2(grid, heads=1, dim=4, **options)
    q, k = ((t / 2).requires_grad_() for t in random_qk(grid, heads=1, batch=1, dim=4))
    positions = torch.cat([v.flatten() for n, v in encoding.maps(q, k, grid).items() if n.startswith("positions")])
    kinks = (positions - positions.round()).abs()  # between counts stand on an exact 0 at the patch itself, by construction
    assert kinks[positions > 0].min() > 1e-4, "choose another seed: a position stands on a kink"
    parameters = list(encoding.parameters())

    def bias(q, k, *_):
        return encoding.bias(q, k, grid).dense()

    assert torch.autograd.gradcheck(bias, (q, k, *parameters), eps=1e-7, atol=1e-5)


def test_forward_mode_gradients_agree_with_finite_differences():
    grid = (2, 3)
    encoding = sape2(grid, heads=1, dim=4)
    q, k = (t.requires_grad_() for t in random_qk(grid, heads=1, batch=1, dim=4))
    check = torch.autograd.gradcheck(
        lambda q, k: encoding.bias(q, k, grid).dense(), (q, k), eps=1e-7, atol=1e-5, check_forward_ad=True
    )
    assert check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_for_identical_tokens_and_on_the_diagonal(dtype):
    grid = (3, 4)
    encoding = SaPE2(2, 8, grid).to(dtype)
    q, k = (t[:, :, :1].expand(-1, -1, 12, -1).clone().requires_grad_() for t in random_qk(grid, dtype=dtype))
    bias = encoding.bias(q, k, grid).dense()
    assert not bias.any()
    bias.square().sum().backward()
    for gradient in (q.grad, k.grad, encoding.table_x.grad, encoding.table_y.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
    bias = encoding.bias(q, k, grid).dense()
    bias.sum().backward()
    assert q.grad.isfinite().all()


def test_positions_beyond_the_table_and_nan_do_not_index_outside():
    encoding = SaPE2(2, 8, (3, 4), num_positions=2)
    q, k = random_qk((3, 4), dtype=torch.float32)
    q[0, 0, 0, 0] = float("nan")
    bias = encoding.bias(q, k, (3, 4)).dense()
    assert bias[0, 0].isnan().any()
    assert bias[1].isfinite().all()


# --- facts of METHOD.md, section 3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("preset", ["listing", "equations"])
def test_bias_is_symmetric_not_negative_and_exactly_zero_on_the_diagonal(grid, preset):
    encoding = SaPE2(2, 8, grid, preset=preset)
    q, k = random_qk(grid, dtype=torch.float32)
    bias = encoding.bias(q, k, grid).dense()
    assert torch.equal(bias, bias.transpose(-1, -2))
    assert (bias >= 0).all()
    assert torch.equal(bias.diagonal(dim1=-2, dim2=-1), torch.zeros_like(bias[..., 0]))
    assert bias.max() > 0


def test_constant_gates_leave_no_position_at_all():
    grid, order = (3, 5), torch.randperm(15)
    encoding = sape2(grid)
    q, _ = random_qk(grid)
    k = torch.zeros_like(q)  # every gate is 1/2
    bias = encoding.bias(q, k, grid).dense()
    permuted = encoding.bias(q[:, :, order], k, grid).dense()
    torch.testing.assert_close(permuted, bias[:, :, order][..., order])
    with_content = encoding.bias(q, q, grid).dense()
    moved = encoding.bias(q[:, :, order], q[:, :, order], grid).dense()
    assert (moved - with_content[:, :, order][..., order]).abs().max() > 1e-2


def test_identical_tokens_in_one_row_have_no_distance_along_it():
    grid = (3, 5)
    encoding = sape2(grid, axes="x")
    q, k = random_qk(grid)
    q[:, :, 9], k[:, :, 9] = q[:, :, 6], k[:, :, 6]  # both in row 1
    bias = encoding.bias(q, k, grid).dense()
    assert bias[..., 6, 9].abs().max() == 0
    assert bias[..., 6, 8].min() > 1e-3


@pytest.mark.parametrize(("axis", "height_order"), [("x", True), ("y", False)])
def test_whole_lines_may_be_permuted_across_but_not_along(axis, height_order):
    grid = (4, 5)
    index = torch.arange(20).view(grid)
    across = index[torch.randperm(4)] if height_order else index[:, torch.randperm(5)]
    along = index.roll(1, 1 if height_order else 0)
    encoding = sape2(grid, axes=axis)
    q, k = random_qk(grid)
    bias = encoding.bias(q, k, grid).dense()

    def error(order):
        order = order.flatten()
        moved = encoding.bias(q[:, :, order], k[:, :, order], grid).dense()
        return ((moved - bias[:, :, order][..., order]).norm() / bias.norm()).item()

    assert error(across) < 1e-12
    assert error(along) > 0.02


def test_a_cyclic_count_is_equivariant_to_circular_shifts_and_the_paper_is_not():
    grid = (4, 5)
    q, k = random_qk(grid)
    order = torch.arange(20).view(grid).roll((1, 2), (0, 1)).flatten()

    def error(encoding):
        bias = encoding.bias(q, k, grid).dense()
        moved = encoding.bias(q[:, :, order], k[:, :, order], grid).dense()
        return ((moved - bias[:, :, order][..., order]).norm() / bias.norm()).item()

    assert error(sape2(grid, count="cyclic")) < 1e-12
    assert error(sape2(grid)) > 0.02


def test_the_bias_grows_with_the_square_root_of_the_width_unless_normalised():
    def mean(size, **options):
        torch.manual_seed(0)
        grid = (size, size)
        q, k = torch.randn(2, 1, 4, size * size, 64)
        return SaPE2(4, 64, grid, **options).bias(q, k, grid).dense().mean().item()

    plain = [mean(size) for size in (8, 16, 32)]
    assert plain == pytest.approx([0.93, 1.39, 2.02], rel=0.12)  # the values of METHOD.md, one draw
    normalised = [mean(size, normalize="sqrt_length") for size in (8, 32)]
    assert normalised[1] / normalised[0] == pytest.approx(plain[2] / plain[0] / 2, rel=1e-5)  # sqrt(8) / sqrt(32)


def test_ten_positions_clamp_few_counts_at_16_columns_and_many_at_32():
    def clamped(size):
        torch.manual_seed(0)
        q, k = torch.randn(2, 1, 2, size * size, 64)
        return (SaPE2(2, 64, (size, size)).maps(q, k, (size, size))["positions_x"] > 9).double().mean().item()

    assert clamped(16) == pytest.approx(0.009, abs=0.006)
    assert clamped(32) == pytest.approx(0.45, abs=0.03)


def test_unscaled_gates_saturate_and_scaled_ones_do_not():
    q, k = torch.randn(2, 2, 4, 64, 64)

    def saturated(preset):
        gates = SaPE2(4, 64, (8, 8), preset=preset).maps(q, k, (8, 8))["gates_x"]
        return ((gates < 0.01) | (gates > 0.99)).double().mean().item()

    assert saturated("equations") == pytest.approx(0.55, abs=0.05)
    assert saturated("listing") < 0.01


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"readout": "squared_distance"}, {"readout": "direct"}, {"count": "cyclic"}], ids=str)
def test_under_bf16_autocast_everything_inside_stays_float32(options):
    grid = (8, 8)
    encoding = SaPE2(2, 8, grid, table_std=0.5, **options)
    q, k = random_qk(grid, dtype=torch.bfloat16)
    exact = encoding.maps(q.float(), k.float(), grid)
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoding.maps(q, k, grid)
        bias = encoding.bias(q, k, grid)
    for name in ("gates_x", "positions_x", "vectors_y"):
        assert maps[name].dtype == torch.float32
        assert torch.equal(maps[name], exact[name])
    assert bias.dense().dtype == torch.bfloat16
    scale = exact["bias"].abs().max().item()
    assert (bias.dense().float() - exact["bias"]).abs().max() < 0.02 * scale  # the result is rounded to 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bias_has_the_dtype_of_the_queries(dtype):
    q, k = random_qk((3, 4), dtype=dtype)
    assert SaPE2(2, 8, (3, 4)).to(dtype).bias(q, k, (3, 4)).dense().dtype == dtype


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "sideways"}, "count.* suffix, prefix, both, between, cyclic"),
        ({"colour": "red"}, "'colour'.* preset, dot"),
        ({"num_positions": 1}, "num_positions.* 2"),
        ({"num_positions": 2.5}, "num_positions.* 2.5"),
        ({"table_std": 0.0}, "table_std"),
        ({"gain_init": 0.0}, "gain_init.*sign=learned"),
        ({"gates": "none", "gate_scale": "learned"}, "gate_scale=learned.*gates=none"),
        ({"preset": "figure"}, "listing, equations"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SaPE2(2, 8, (3, 4), **options)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 2, 12, 8), (3, 5), "15.* 12"),
        ((1, 3, 12, 8), (3, 4), "num_heads=2"),
        ((1, 2, 12, 6), (3, 4), "head_dim=8"),
        ((1, 2, 12, 8), (3, 0), "positive integers"),
    ],
)
def test_input_that_does_not_fit_is_named(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        SaPE2(2, 8, (3, 4)).bias(torch.randn(shape), torch.randn(shape), grid)


def test_a_dead_table_is_refused_for_training_and_warned_of_in_use():
    encoding = SaPE2(2, 8, (3, 4))
    torch.nn.init.zeros_(encoding.table_x)
    with pytest.raises(ValueError, match="table_x"):
        encoding.check_trainable()
    q, k = random_qk((3, 4), dtype=torch.float32)
    with pytest.warns(UserWarning, match="table_x is all zero"):
        encoding.bias(q, k, (3, 4))
    with pytest.warns(UserWarning, match="table_x is all zero"):
        SaPE2(2, 8, (3, 4)).load_state_dict(encoding.state_dict())


def test_a_zero_gain_has_no_effect_and_stays_alive():
    encoding = SaPE2(2, 8, (3, 4), sign="learned", gain_init=0.0)
    q, k = random_qk((3, 4), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bias = encoding.bias(q, k, (3, 4)).dense()
    assert not bias.any()
    bias.square().sum().backward()  # zero gradient of a zero bias ...
    encoding.zero_grad()
    (encoding.bias(q, k, (3, 4)).dense() * torch.randn(12, 12)).sum().backward()  # ... but not of a loss
    assert encoding.gain.grad.abs().min() > 0
    assert math.isclose(encoding.table_x.grad.abs().max().item(), 0.0)  # moves as soon as the gain has
