"""Resolution measurements: views against torch's own, rows on models whose curve is known, rules beyond the tables."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from evaluation_cases import CentrePixel, Constant, Images, PixelReadout, random_images, random_vit, select, values
from torch import nn

from sape2.evaluation import MEASURES
from sape2.evaluation.base import bootstrap_interval, drawn
from sape2.evaluation.layers import layers_of
from sape2.evaluation.lie import lie_derivative_error
from sape2.evaluation.resolution import bias_size, fall_interval, predict_view, resolution, size_at_fall
from sape2.evaluation.views import View, oblong_sizes, on_canvas, plain_sizes, rules, scaled, views, with_beyond

BELOW, ABOVE, OBLONG = ["4x4", "6x6"], ["10x10", "12x12", "16x16"], ["8x12", "12x8"]  # of 8x8 images in patches of 2


# --- views -----------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_protocol_for_cifar_and_multiples_of_the_patch_elsewhere():
    assert plain_sizes((32, 32), (4, 4)) == [(s, s) for s in (20, 24, 28, 32, 40, 48, 64)]
    assert oblong_sizes((32, 32), (4, 4)) == [(32, 48), (48, 32)]
    assert all(h % 16 == w % 14 == 0 for h, w in plain_sizes((224, 224), (16, 14)))
    assert (224, 224) in plain_sizes((224, 224), (16, 16))
    assert min(plain_sizes((4, 4), (4, 4))) == (4, 4)


def test_every_size_is_seen_scaled_and_padded_and_nothing_twice():
    seen = views((8, 8), (2, 2))
    assert seen[0] == View((8, 8), "scaled")
    assert len(set(seen)) == len(seen)
    kinds = {(f"{v.size[0]}x{v.size[1]}", v.transform, v.border) for v in seen}
    expected = {(s, "scaled", "none") for s in ["8x8", *BELOW, *ABOVE, *OBLONG]} | {(s, "padded", "none") for s in BELOW}
    assert kinds == expected | {(s, "padded", border) for s in [*ABOVE, *OBLONG] for border in ("reflect", "mean")}


def test_a_larger_canvas_holds_the_image_in_its_middle():
    images = torch.randn(2, 3, 8, 6)
    assert torch.equal(on_canvas(images, (12, 8), "reflect"), F.pad(images, (1, 1, 2, 2), mode="reflect"))
    assert torch.equal(on_canvas(images, (12, 8), "mean"), F.pad(images, (1, 1, 2, 2)))
    assert torch.equal(on_canvas(images, (8, 9), "mean"), F.pad(images, (1, 2)))  # odd: one more to the right
    far = on_canvas(images, (40, 6), "reflect")  # further than F.pad goes
    assert torch.equal(far[:, :, 9:31], F.pad(images, (0, 0, 7, 7), mode="reflect"))


def test_a_smaller_canvas_is_the_middle_and_an_oblong_one_both():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(on_canvas(images, (4, 6), "mean"), images[:, :, 2:6, 1:7])
    assert torch.equal(on_canvas(images, (4, 12), "mean"), F.pad(images[:, :, 2:6], (2, 2)))


def test_scaling_keeps_constants_and_its_own_size():
    images = torch.randn(1, 3, 8, 8)
    assert scaled(images, (8, 8)) is images
    flat = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(scaled(flat, (20, 12)), torch.full((1, 3, 20, 12), 0.7))
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    assert (scaled(ramp, (64, 64)).diff(dim=-1)[..., 4:-4] > 0).all()  # x stays x


# --- curves that are known -------------------------------------------------------------------------------------------


def test_a_model_that_ignores_the_image_loses_nothing():
    rows = list(resolution(Constant(), random_images(20)))
    assert set(values(rows, "accuracy_drop")) == {0.0}
    assert not any("ci_low" in row for row in select(rows, "accuracy_drop"))  # equal differences tell no spread
    assert values(rows, "sizes_refused") == [0]
    for row in select(rows, "size_at_5_points"):
        assert (row["value"], row["ci_low"], row["ci_high"]) == (None, None, None)
        assert "never reached" in row["protocol"]


def test_a_model_that_reads_the_middle_pixel_ignores_the_canvas_but_not_the_scale():
    data = random_images(60)
    data.labels = CentrePixel()(data.images).argmax(1)
    rows = list(resolution(CentrePixel(), data))
    assert set(values(rows, "accuracy_at_size", transform="padded")) == {1.0}
    assert set(values(rows, "accuracy_drop", transform="padded")) == {0.0}
    assert min(values(rows, "accuracy_drop", transform="scaled")) > 0
    (fall,) = select(rows, "size_at_5_points", transform="scaled")
    assert 12 < fall["value"] < 16
    assert fall["ci_low"] <= fall["value"] <= (fall["ci_high"] or 16)
    assert {row["border"] for row in select(rows, "size_at_5_points", value=None)} == {"reflect", "mean"}


@pytest.fixture(scope="module")
def measured():
    """One model measured once: its rows over 8 of 12 images."""
    torch.manual_seed(0)
    model, data = random_vit("sape2", depth=1), random_images(12)
    return SimpleNamespace(model=model, data=data, rows=list(MEASURES["resolution"](model, data, limit=8)))


def test_rows_say_size_grid_transform_and_border_and_are_all_different(measured):
    rows = measured.rows
    (row,) = select(rows, "accuracy_at_size", size="8x12", transform="padded", border="reflect", rule="clamp")
    assert row["grid"] == "4x6"
    assert row["n"] == 8
    assert "reflected border" in row["protocol"]
    assert "SaPE2 clamp" in row["protocol"]
    assert {row["size"] for row in select(rows, "accuracy_at_size", transform="scaled")} == {"8x8", *BELOW, *ABOVE, *OBLONG}
    keys = [tuple(str(row.get(k)) for k in ("name", "size", "transform", "border", "rule", "layer")) for row in rows]
    assert len(set(keys)) == len(keys)


def test_means_leave_out_the_training_size_and_other_aspects():
    rows = list(resolution(CentrePixel(), random_images(25)))
    for side, sizes in (("below", BELOW), ("above", ABOVE)):
        single = [values(rows, "accuracy_at_size", size=size, transform="scaled")[0] for size in sizes]
        assert values(rows, f"mean_accuracy_{side}", transform="scaled") == pytest.approx([sum(single) / len(single)])
    assert {row["border"] for row in select(rows, "mean_accuracy_above")} == {"none", "reflect", "mean"}
    assert len(select(rows, "mean_accuracy_below")) == 2


def test_accuracy_at_a_size_is_that_of_the_resized_images(measured):
    model, data, view = measured.model, measured.data, View((12, 8), "scaled")
    resized = F.interpolate(data.images, size=(12, 8), mode="bicubic", antialias=True)
    expected = model(resized).argmax(1)
    assert torch.equal(predict_view(model, data, view, 12, batch_size=5), expected)
    (row,) = select(measured.rows, "accuracy_at_size", size="12x8", transform="scaled", rule="clamp")
    some = drawn(data, 8).index
    assert row["value"] == pytest.approx((expected[some] == data.labels[some]).double().mean().item())


def test_the_interval_of_a_drop_is_paired_image_by_image():
    """Half of the images are right at 8x8 and the same ones, but for two, elsewhere: the drop is far surer than either."""

    class Oracle(nn.Module):
        patch_size = 2

        def forward(self, images):
            right = images[:, 0].amax((1, 2)) > 0
            lost = (images[:, 1].amax((1, 2)) > 0) & (images.shape[-1] != 8)
            answer = torch.where(right & ~lost, images[:, 2, 0, 0].long(), 3)
            return nn.functional.one_hot(answer, 4).float()

    images = torch.zeros(100, 3, 8, 8)
    images[:50, 0] = 1
    images[:2, 1] = 1
    rows = list(resolution(Oracle(), Images(images, torch.zeros(100, dtype=torch.long))))
    (drop,) = select(rows, "accuracy_drop", size="16x16", transform="scaled")
    assert drop["value"] == pytest.approx(0.02)
    lost = torch.zeros(100).double()
    lost[:2] = 1
    assert (drop["ci_low"], drop["ci_high"]) == pytest.approx(bootstrap_interval(lost))
    (single,) = select(rows, "accuracy_at_size", size="16x16", transform="scaled")
    assert drop["ci_high"] - drop["ci_low"] < (single["ci_high"] - single["ci_low"]) / 2


# --- sizes that are refused ------------------------------------------------------------------------------------------


def test_refused_sizes_give_one_row_that_says_which_and_why():
    rows = list(resolution(PixelReadout(), random_images(10)))
    assert {row["size"] for row in select(rows, "accuracy_at_size")} == {"8x8"}
    assert not select(rows, "accuracy_drop")
    assert not select(rows, "mean_accuracy_above")
    (row,) = select(rows, "sizes_refused")
    assert row["value"] == len([*BELOW, *ABOVE, *OBLONG])
    assert "4x4, 6x6, 8x12, 10x10, 12x8, 12x12, 16x16" in row["protocol"]
    assert "shapes cannot be multiplied" in row["protocol"]


def test_a_model_that_does_not_run_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"8x8: .*shapes cannot be multiplied"):
        list(resolution(PixelReadout(height=6), random_images(10)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("on a GPU"), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_memory_that_runs_out_is_not_taken_for_a_refusal(error):
    class Greedy(CentrePixel):
        def forward(self, images):
            if images.shape[-1] > 8:
                raise error
            return super().forward(images)

    with pytest.raises(type(error), match=str(error)):
        list(resolution(Greedy(), random_images(10)))


# --- the size at which accuracy falls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.9, 0.87, 0.81, 0.5], 40 + 8 / 3),  # 0.85 is a third of the way from 0.87 to 0.81
        ([0.9, 0.85, 0.2, 0.1], 40),
        ([0.9, 0.8, 0.95, 0.1], 36),  # the first fall counts
        ([0.9, 0.86, 0.86, 0.86], float("inf")),
        ([0.03, 0.0, 0.0, 0.0], float("inf")),
    ],
)
def test_the_size_at_five_points_is_interpolated(accuracies, expected):
    other = [0.5, 0.4, 0.3, 0.2]  # curves do not see each other
    found = size_at_fall([32, 40, 48, 64], torch.tensor([other, accuracies], dtype=torch.float64)).tolist()
    assert found == pytest.approx([36, expected])


def test_the_interval_of_that_size_holds_it_and_has_no_end_where_it_may_never_fall():
    torch.manual_seed(0)
    accuracy = torch.tensor([0.9, 0.85, 0.6, 0.2])
    correct = (torch.rand(4, 400) < accuracy[:, None]).double()
    (value,) = size_at_fall([32, 40, 48, 64], correct.mean(1)[None]).tolist()
    low, high = fall_interval([32, 40, 48, 64], correct)
    assert 32 < low < value < high < 64
    flat = (torch.rand(2, 50) < 0.85).double()
    assert fall_interval([32, 40], flat)[1] is None


# --- rules beyond the tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("none", ["as built"]),
        ("ape", ["as built"]),
        ("sape2", ["clamp", "rescale"]),
        ("ape+sape2:beyond=rescale", ["rescale", "clamp"]),
        ("cope", ["clamp", "rescale"]),
        ("rpe", ["resize", "clamp"]),
        ("rope", ["extrapolate", "rescale"]),
        ("rope+sape2", ["as built", "rescale"]),
    ],
)
def test_every_rule_that_the_encodings_know_is_measured_the_own_one_first(encoding, expected):
    assert list(rules(random_vit(encoding))) == expected


@pytest.mark.parametrize(
    ("encoding", "rule"),
    [("sape2", "rescale"), ("cope", "rescale"), ("rpe", "clamp"), ("rpe_contextual", "resize"), ("rpe_decomposed", "clamp")],
)
def test_a_rule_changes_the_bias_beyond_the_training_grid_and_not_on_it(encoding, rule):
    model = random_vit(encoding)
    other = with_beyond(model, rule)
    assert {name: p.tolist() for name, p in model.named_parameters()} == {n: p.tolist() for n, p in other.named_parameters()}
    for size, changes in ((8, False), (16, True)):
        images = torch.randn(2, 3, size, size).double()
        first, second = (next(layers_of(m, images)).bias for m in (model, other))
        assert ((first - second).abs().max() > 1e-3) == changes
        assert torch.equal(first, next(layers_of(model, images)).bias)  # the model itself is as it was


def test_rescaling_is_what_an_encoding_built_so_does():
    model, built = random_vit("sape2"), random_vit("sape2:beyond=rescale")
    built.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 12).double()
    assert torch.equal(with_beyond(model, "rescale")(images), built(images))
    assert not torch.equal(model(images), built(images))


def test_what_is_taken_over_from_a_rule_that_changes_nothing_is_what_would_be_measured(measured, monkeypatch):
    calls = []
    monkeypatch.setattr(sys.modules["sape2.evaluation.resolution"], "answer_alike", lambda *_: calls.append(1))
    assert list(resolution(measured.model, measured.data, limit=8)) == measured.rows
    assert calls


# --- spread of the bias ----------------------------------------------------------------------------------------------


def test_the_spread_is_the_deviation_of_the_centred_bias_under_each_rule(measured):
    some = drawn(measured.data, 8).index
    large = F.interpolate(measured.data.images[some], size=(16, 16), mode="bicubic", antialias=True)
    spread = {}
    for rule, variant in rules(measured.model).items():
        bias = variant.maps(large)[0]["bias"]
        assert values(measured.rows, "bias_mean", size="16x16", layer=1, rule=rule) == pytest.approx([bias.mean().item()])
        bias = bias - bias.mean(-1, keepdim=True)
        spread[rule] = sum(head.square().mean().sqrt().item() for image in bias for head in image) / (8 * 2)
        assert values(measured.rows, "bias_row_std", size="16x16", layer=1, rule=rule) == pytest.approx([spread[rule]])
    assert abs(spread["clamp"] - spread["rescale"]) > 0.01 * spread["clamp"]


def test_p8_the_bias_of_random_content_grows_with_the_root_of_the_line():
    model = random_vit("sape2:num_positions=20", depth=1)
    means = {}
    for side in (8, 16):
        rows = bias_size(model, random_images(5, side, side), [View((side, side), "scaled")])
        (row,) = select(rows, "bias_mean")
        assert (row["grid"], row["n"], row["rule"]) == (f"{side // 2}x{side // 2}", 5, "as built")
        means[side] = row["value"]
    assert means[16] / means[8] == pytest.approx(2**0.5, rel=0.15)


def test_models_without_a_bias_have_no_spread():
    assert bias_size(random_vit("rope", depth=1), random_images(3), [View((8, 8), "scaled")]) == []
    assert bias_size(Constant(), random_images(3), [View((8, 8), "scaled")]) == []


# --- models of others ------------------------------------------------------------------------------------------------


def test_a_timm_model_is_measured_where_it_runs_and_differentiated_through_its_fused_attention():
    model = timm.models.VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2, num_classes=5).double()
    data = random_images(10)
    rows = list(resolution(model, data))
    assert {row["size"] for row in select(rows, "accuracy_at_size")} == {"8x8"}
    assert {row["rule"] for row in select(rows, "accuracy_at_size")} == {"as built"}
    assert values(rows, "sizes_refused") == [7]
    assert "Input height (4) doesn't match model (8)" in select(rows, "sizes_refused")[0]["protocol"]
    assert model.training
    (error, _) = lie_derivative_error(model, data, "x", "reflect")
    assert error["value"] > 0
