"""Shift measurements: the moves against loops and torch's own, every metric on models whose value is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import (
    CentrePixel,
    CircularConvolution,
    Constant,
    Images,
    PixelReadout,
    random_images,
    random_vit,
    select,
    values,
)
from torch import nn

from sape2.attention import module
from sape2.encodings import list_encodings
from sape2.encodings.sape2 import SaPE2
from sape2.evaluation import MEASURES
from sape2.evaluation.base import chance_agreement, patch_size
from sape2.evaluation.equivariance import centred, equivariance, relative_error, token_order
from sape2.evaluation.lie import lie_derivative, lie_derivative_error
from sape2.evaluation.shift import consistency, predict_moved, same_for_all, shift, shift_curve, softmax_change, worst_case
from sape2.evaluation.translation import (
    ShiftRange,
    consistency_ranges,
    shift_derivative,
    shift_sets,
    shift_sizes,
    source_index,
    translate,
)

BORDERS = ["circular", "reflect"]
EXACT = 1e-11  # float64 leaves about 1e-14 where sums are taken in another order


# --- moves -----------------------------------------------------------------------------------------------------------


def literal_translation(image, dy, dx, border):
    """out[y, x] = in[y - dy, x - dx], bilinear, pixel by pixel."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            low_y, low_x = math.floor(y - dy), math.floor(x - dx)
            for yy, wy in ((low_y, 1 - (y - dy - low_y)), (low_y + 1, y - dy - low_y)):
                for xx, wx in ((low_x, 1 - (x - dx - low_x)), (low_x + 1, x - dx - low_x)):
                    result[:, y, x] += wy * wx * image[:, outside(yy, height, border), outside(xx, width, border)]
    return result


def outside(place, length, border):
    """Walks back into 0..length-1, turning round at the centre of a border pixel where it is reflected."""
    if border == "circular":
        return place % length
    while not 0 <= place < length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@pytest.mark.parametrize("border", BORDERS)
def test_translation_agrees_with_the_literal_loop(border):
    images = torch.randn(5, 2, 5, 4, dtype=torch.float64)
    shifts = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.25, 0.5], [-1.75, 3.125], [9.5, -13.0]], dtype=torch.float64)
    expected = torch.stack([literal_translation(i, *s.tolist(), border) for i, s in zip(images, shifts, strict=True)])
    torch.testing.assert_close(translate(images, shifts, border), expected, rtol=0, atol=EXACT)


def test_a_whole_circular_shift_is_torch_roll_bit_for_bit():
    images = torch.randn(3, 2, 6, 8)
    for shift_px in [(0, 0), (1, 0), (0, -3), (5, 7), (-8, 17)]:
        moved = translate(images, torch.tensor([shift_px]).float().expand(3, 2), "circular")
        assert torch.equal(moved, images.roll(shift_px, (-2, -1)))


def test_a_reflected_shift_is_a_crop_of_the_padded_image():
    images, pad = torch.randn(2, 3, 8, 8), 3
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    for dy, dx in [(0, 0), (3, -3), (-2, 1)]:
        crop = padded[:, :, pad - dy : pad - dy + 8, pad - dx : pad - dx + 8]
        assert torch.equal(translate(images, torch.tensor([[dy, dx]]).float().expand(2, 2), "reflect"), crop)


def test_a_line_of_one_pixel_is_seen_everywhere():
    place = torch.arange(-3, 4)
    assert source_index(place, 1, "reflect").eq(0).all()
    assert source_index(place, 1, "circular").eq(0).all()


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_the_shift_derivative_is_the_central_difference_of_translation(axis, border):
    images, step = torch.randn(2, 3, 5, 7, dtype=torch.float64), 0.25  # linear up to a whole pixel, so any step is exact
    ahead = torch.tensor([[0.0, step] if axis == "x" else [step, 0.0]]).double().expand(2, 2)
    difference = (translate(images, ahead, border) - translate(images, -ahead, border)) / (2 * step)
    torch.testing.assert_close(shift_derivative(images, axis, border), difference, rtol=0, atol=EXACT)


def test_shifts_are_drawn_from_the_whole_range_and_no_further():
    shifts = ShiftRange("", "circular", (-1, 0), (1, 3), (1, 4)).draw(4, 500, seed=0)
    assert set(shifts[..., 0].flatten().tolist()) == {-1, 0, 1}
    assert set(shifts[..., 1].flatten().tolist()) == {0, 4, 8, 12}
    assert torch.equal(shifts, ShiftRange("", "circular", (-1, 0), (1, 3), (1, 4)).draw(4, 500, seed=0))


def test_ranges_sizes_and_sets_of_a_cifar_model():
    ranges = {r.label: str(r) for r in consistency_ranges((32, 32), (4, 4))}
    assert ranges["sub_patch"] == "dy in 0..3, dx in 0..3 px"
    assert ranges["full"] == "dy in 0..31, dx in 0..31 px"
    assert ranges["patch_multiples"] == "dy in 4 * 0..7, dx in 4 * 0..7 px"
    assert ranges["crops"] == "dy in -4..4, dx in -4..4 px"
    assert shift_sizes((32, 32), (4, 4)) == [0, 1, 2, 3, 4, 8, 16]
    sets = shift_sets((4, 4))
    assert len(sets["patch"][1]) == 16
    assert len(sets["plus_minus"][1]) == 25
    assert len(shift_sets((16, 16))["patch"][1]) == 64


def test_a_patch_of_one_pixel_has_no_shifts_within():
    assert [r.label for r in consistency_ranges((6, 6), (1, 1))] == ["full", "patch_multiples", "crops"]
    assert list(shift_sets((1, 1))) == ["plus_minus"]
    assert consistency_ranges((6, 6), (1, 1))[-1].high == (1, 1)


# --- predictions -----------------------------------------------------------------------------------------------------


def test_a_model_invariant_by_construction_is_fully_consistent():
    model, data = CircularConvolution(), random_images(30)
    for shifts in consistency_ranges((8, 8), (2, 2)):
        rows = consistency(model, data, shifts, limit=30)
        if shifts.border == "circular":
            assert values(rows, "circular_consistency") == [1.0]
            assert select(rows, "circular_consistency")[0]["chance"] < 0.9  # its predictions do vary
    assert set(values(shift_curve(model, data, "circular", [0, 1, 4], limit=30), "shift_agreement")) == {1.0}
    rows = worst_case(model, data, "patch", *shift_sets((2, 2))["patch"], limit=30)
    assert values(rows, "worst_case_agreement") == [1.0]
    assert values(rows, "worst_case_accuracy") == values(rows, "shifted_accuracy")


def test_a_model_that_reads_places_is_not():
    model, data = PixelReadout(), random_images(60)
    for shifts in consistency_ranges((8, 8), (2, 2)):
        name = "circular_consistency" if shifts.border == "circular" else "cropped_consistency"
        (row,) = select(consistency(model, data, shifts, limit=60), name)
        assert row["value"] < 0.7
        assert row["ci_low"] < row["value"] < row["ci_high"]
    assert max(values(shift_curve(model, data, "circular", [0, 1, 4], limit=60), "shift_agreement")) < 0.7
    rows = worst_case(model, data, "patch", *shift_sets((2, 2))["patch"], limit=60)
    assert values(rows, "worst_case_agreement")[0] < 0.5
    assert values(rows, "worst_case_accuracy")[0] <= values(rows, "shifted_accuracy")[0]


def test_consistency_and_accuracy_against_rolls_one_by_one():
    model, data = PixelReadout(), random_images(20)
    full = ShiftRange("full", "circular", (0, 0), (7, 7))
    rows = consistency(model, data, full, limit=20, batch_size=7, pairs=3)
    draws = full.draw(6, 20, seed=0).int()
    found = torch.tensor(
        [
            [model(data.images[i : i + 1].roll(tuple(draws[d, i].tolist()), (-2, -1))).argmax().item() for i in range(20)]
            for d in range(6)
        ]
    )
    agree = sum((found[2 * p] == found[2 * p + 1]).sum().item() for p in range(3)) / 60
    assert values(rows, "circular_consistency") == pytest.approx([agree])
    assert values(rows, "shifted_accuracy") == pytest.approx([(found == data.labels).float().mean().item()])
    shares = [(found == label).double().mean().item() for label in range(5)]
    assert rows[0]["chance"] == pytest.approx(sum(share**2 for share in shares))


def test_predictions_that_ignore_the_image_agree_as_often_as_chance_says():
    class Noise(nn.Module):
        def forward(self, images):
            return torch.randn(len(images), 4, generator=self.generator) + torch.tensor([0.0, 0.5, 1.0, 1.5])

    model, data = Noise(), random_images(1000, 4, 4)
    model.generator = torch.Generator().manual_seed(0)
    (row, _) = consistency(model, data, ShiftRange("full", "circular", (0, 0), (3, 3)), limit=1000)
    assert row["ci_low"] < row["chance"] < row["ci_high"]


def test_chance_is_the_product_of_the_shares():
    assert chance_agreement(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5 * 0.25 + 0.25 * 0.75)
    assert chance_agreement(torch.tensor([3, 3]), torch.tensor([3])) == 1.0


def test_the_worst_case_is_right_under_every_shift():
    model, data = PixelReadout(), random_images(40)
    border, shifts = shift_sets((2, 2))["plus_minus"]
    predictions = predict_moved(model, data, same_for_all(shifts, 40), border, batch_size=9)
    labels = data.labels.tolist()
    wrong_somewhere = [set(found) != {label} for found, label in zip(predictions.T.tolist(), labels, strict=True)]
    rows = worst_case(model, data, "plus_minus", border, shifts, limit=40)
    assert values(rows, "worst_case_accuracy") == pytest.approx([1 - sum(wrong_somewhere) / 40])


@pytest.mark.parametrize("kind", ["integer", "fractional"])
def test_the_softmax_change_is_zero_for_a_blind_model_and_as_defined_for_another(kind):
    data = random_images(6)
    assert values(softmax_change(Constant(), data, limit=6), f"eq_t_{kind}") == [0.0]
    model, draws = PixelReadout(), 4
    generator = torch.Generator().manual_seed(0)
    shifts = (torch.rand(draws, 6, 2, generator=generator) * 2 - 1) * 0.125 * 8
    shifts = shifts.round() if kind == "integer" else shifts
    expected = 0.0
    for d in range(draws):
        for i in range(6):
            moved = literal_translation(data.images[i], *shifts[d, i].tolist(), "reflect")
            p, q = (model(image[None]).softmax(-1)[0] for image in (moved, data.images[i]))
            expected += ((p - q) ** 2).mean().item() / (draws * 6)
    found = values(softmax_change(model, data, limit=6, draws=draws), f"eq_t_{kind}")
    assert found == pytest.approx([expected], rel=1e-5)  # logits are read in float32
    assert expected > 1e-5


# --- Lie derivative --------------------------------------------------------------------------------------------------

FORWARD_MODE = [
    *list_encodings(),
    "ape+sape2",
    "rope+sape2",
    "sape2:preset=equations",
    "sape2:dot=key",
    "sape2:count=both",
    "sape2:count=between",
    "sape2:count=cyclic",
    "sape2:readout=squared_distance",
    "sape2:readout=direct",
    "sape2:sign=learned,gate_scale=learned,normalize=sqrt_length",
    "sape2:axes=raster",
]


@pytest.mark.parametrize("encoding", FORWARD_MODE)
def test_forward_mode_through_every_encoding_agrees_with_moving_the_image(encoding):
    """A step of 1e-7 px leaves 1e-7 of the curvature, and 1e-9 of rounding."""
    model, images = random_vit(encoding, depth=1), random_images(2).images
    step = torch.tensor([[0.0, 1e-7]], dtype=torch.float64).expand(2, 2)
    with torch.no_grad():
        ahead, behind = (model(translate(images, shift, "reflect")).softmax(-1) for shift in (step, -step))
        derivative = lie_derivative(model, images, "x", "reflect")
        assert derivative.abs().max() > 1e-3
        torch.testing.assert_close(derivative, (ahead - behind) / 2e-7, rtol=1e-3, atol=1e-4)
        step = 1e-5 * shift_derivative(images, "x", "reflect")
        difference = (model(images + step).softmax(-1) - model(images - step).softmax(-1)) / 2e-5
        torch.testing.assert_close(derivative, difference, rtol=1e-4, atol=1e-5)


def test_forward_mode_runs_through_prefix_tokens_and_the_fused_path(monkeypatch):
    model, images = random_vit("rope+sape2", pool="class", num_registers=1), random_images(2).images
    expected = lie_derivative(model, images, "y", "circular")
    monkeypatch.setattr(module, "choose_path", lambda *_: "fused")
    torch.testing.assert_close(lie_derivative(model, images, "y", "circular"), expected, rtol=0, atol=1e-9)


def test_of_logits_linear_in_the_image_it_is_the_softmax_of_a_known_change():
    """dp = p (W dx - p . W dx)."""
    model, data = PixelReadout(), random_images(4)
    change = model(shift_derivative(data.images, "x", "reflect"))
    p = model(data.images).softmax(-1)
    expected = p * (change - (p * change).sum(-1, keepdim=True))
    torch.testing.assert_close(lie_derivative(model, data.images, "x", "reflect"), expected, rtol=0, atol=EXACT)
    error, magnitude = lie_derivative_error(model, data, "x", "reflect", batch_size=3)
    assert error["value"] == pytest.approx(expected.square().sum(-1).mean().item() / 5, rel=1e-5)
    assert magnitude["value"] == pytest.approx(expected.abs().mean().item(), rel=1e-5)


def test_it_is_zero_for_a_constant_and_for_the_mean_of_a_torus_but_not_of_a_mirror():
    class MeanColour(nn.Module):
        def forward(self, images):
            return images.mean((-1, -2))

    data = random_images(5)
    for axis in ("x", "y"):
        assert values(lie_derivative_error(Constant(), data, axis, "reflect"), "lie_derivative_error") == [0.0]
        circular = values(lie_derivative_error(MeanColour(), data, axis, "circular"), "lie_derivative_error")
        assert circular[0] < EXACT**2
        assert values(lie_derivative_error(MeanColour(), data, axis, "reflect"), "lie_derivative_error")[0] > 1e-6


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Sine(nn.Module):
    """The sine of the mean colour, in an operation that has no forward derivative."""

    def forward(self, images):
        return NoForwardMode.apply(images.mean((-1, -2)))


def test_a_model_without_forward_mode_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"a Sine has no forward-mode derivative \(.+\), so its Lie"):
        lie_derivative_error(Sine(), random_images(2, dtype=torch.float32), "x", "reflect")


# --- features and biases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["none", "sape2:count=cyclic", "cpe:padding=circular", "sape2:gates=constant"])
def test_features_of_models_without_places_move_with_the_image(encoding):
    rows = equivariance(random_vit(encoding), random_images(3))
    assert {row["layer"] for row in rows} == {0, 1, 2}
    assert {(row["axis"], row["shift_px"]) for row in rows} == {("x", 2), ("x", 4), ("y", 2), ("y", 4)}
    assert max(values(rows, "feature_equivariance_error")) < EXACT


@pytest.mark.parametrize(("encoding", "first"), [("ape", 0), ("rope", 1), ("rpe", 1), ("sape2", 1), ("cope", 1)])
def test_features_of_models_with_places_do_not_from_the_layer_on_that_knows_them(encoding, first):
    rows = equivariance(random_vit(encoding), random_images(3))
    for layer in range(3):
        errors = values(rows, "feature_equivariance_error", layer=layer)
        assert min(errors) > 1e-3 if layer >= first else max(errors) < EXACT


@pytest.mark.parametrize(("axes", "still"), [("x", "y"), ("y", "x")])
def test_p4_a_table_along_one_axis_does_not_see_shifts_along_the_other(axes, still):
    rows = equivariance(random_vit(f"sape2:axes={axes}"), random_images(3))
    assert max(values(rows, "bias_equivariance_error", axis=still)) < EXACT
    assert min(values(rows, "bias_equivariance_error", axis=axes)) > 1e-2


def test_p10_a_cyclic_count_moves_with_the_image_in_every_layer():
    rows = select(equivariance(random_vit("sape2:count=cyclic"), random_images(3)), "bias_equivariance_error")
    assert {row["layer"] for row in rows} == {1, 2}
    assert max(values(rows, "bias_equivariance_error")) < EXACT


def test_p10_fails_under_an_absolute_table():
    rows = equivariance(random_vit("ape+sape2:count=cyclic"), random_images(3))
    assert min(values(rows, "bias_equivariance_error", layer=1)) > 1e-2


def test_p5_the_bias_of_random_tokens_is_off_by_about_fifteen_percent():
    """METHOD: b^x of random tokens, 8x8, after a circular step along x; the whole bias, before its rows are centred."""
    grid, tokens = (8, 8), torch.randn(16, 2, 1, 64, 64)
    encoding = SaPE2(1, 64, grid, axes="x").requires_grad_(False)
    order = token_order(grid, (0, 1), torch.device("cpu"))

    def bias(x):
        return encoding.bias(x[:, 0], x[:, 1], grid).dense()

    moved, expected = bias(tokens[..., order, :]), bias(tokens)[..., order, :][..., order]
    assert relative_error(moved, expected).mean().item() == pytest.approx(0.146, abs=0.02)
    assert relative_error(centred(moved), centred(expected)).mean().item() > 0.146


def test_an_error_relative_to_nothing_is_undefined():
    model = random_vit("cope")
    for block in model.blocks:
        block.attn.encoding.table.zero_()
    rows = select(equivariance(model, random_images(2)), "bias_equivariance_error")
    assert {(row["value"], row["n"]) for row in rows} == {(None, 0)}


def test_the_moved_order_is_that_of_a_roll():
    grid, tokens = (3, 4), torch.randn(12, 2)
    order = token_order(grid, (1, 2), torch.device("cpu"))
    assert torch.equal(tokens[order], tokens.unflatten(0, grid).roll((1, 2), (0, 1)).flatten(0, 1))


# --- the whole measure -----------------------------------------------------------------------------------------------


def test_every_row_names_its_transform_and_border_and_its_interval_holds_the_value():
    model, data = random_vit("ape+sape2", torch.float32, depth=1), random_images(40, dtype=torch.float32)
    rows = list(shift(model.train(), data, limit=24))
    assert model.training
    for row in rows:
        assert row["measure"] == "shift"
        assert row["transform"] == "translation"
        assert row["border"] in row["protocol"]
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row.get("axis", "x") in ("x", "y")
    names = {row["name"] for row in rows}
    assert names == {
        "circular_consistency",
        "cropped_consistency",
        "shifted_accuracy",
        "shift_accuracy",
        "shift_agreement",
        "worst_case_accuracy",
        "worst_case_agreement",
        "eq_t_integer",
        "eq_t_fractional",
        "lie_derivative_error",
        "lie_derivative_magnitude",
        "feature_equivariance_error",
        "bias_equivariance_error",
    }
    assert {row["n"] for row in rows if row["name"] == "circular_consistency"} == {24}
    assert {row["n"] for row in rows if row["name"] == "worst_case_accuracy"} == {20}
    guessable = ("circular_consistency", "cropped_consistency", "shift_agreement", "shift_accuracy", "shifted_accuracy")
    assert all(0 < row["chance"] <= 1 for row in rows if row["name"] in guessable)
    keys = [tuple(sorted((k, str(v)) for k, v in row.items() if k in KEYS)) for row in rows]
    assert len(set(keys)) == len(keys)  # no two rows say that they are the same number
    assert rows[:8] == list(itertools.islice(MEASURES["shift"](model, data, limit=24), 8))  # the same draws again


KEYS = ("name", "transform", "border", "axis", "shift_px", "layer", "shifts")


def test_a_model_that_cannot_be_looked_into_is_measured_from_outside():
    rows = list(shift(CircularConvolution(), random_images(20), limit=20))
    assert values(rows, "circular_consistency", shifts="full") == [1.0]
    assert not select(rows, "feature_equivariance_error")
    with pytest.raises(ValueError, match=r"which must have embed, maps .*CentrePixel has not"):
        equivariance(CentrePixel(), random_images(2))


def test_the_patch_is_read_off_the_model_or_asked_for():
    data = random_images(1)
    assert patch_size(random_vit("none", patch_size=4), data) == (4, 4)
    timm_like = nn.Module()
    timm_like.patch_embed = nn.Module()
    timm_like.patch_embed.patch_size = (2, 4)
    assert patch_size(timm_like, data) == (2, 4)
    with pytest.raises(ValueError, match=r"Linear .*model\.patch_size"):
        list(shift(nn.Linear(2, 2), data))


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match=r"images .* 0"):
        list(shift(CircularConvolution(), Images(torch.randn(2, 3, 8, 8).double()), limit=0))
