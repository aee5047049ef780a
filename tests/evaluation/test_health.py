"""Health of encodings: numbers against literal loops and the known facts, warnings on known bad cases, the position probe."""

import math

import numpy as np
import pytest
import torch
from evaluation_cases import labelled_images

from sape2 import create_model
from sape2.data import ImageData
from sape2.encodings import create_encoding
from sape2.evaluation.base import row
from sape2.evaluation.findings import RULES, findings
from sape2.evaluation.health import (
    TableUse,
    bias_statistics,
    encodings_of,
    gate_statistics,
    health,
    position_statistics,
    tabled_positions,
)
from sape2.evaluation.position import moments, position_content, ridge, shuffle_patches


def small(encoding, **changes):
    settings = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "num_heads": 3, "pool": "mean"}
    return create_model("vit_nano", encoding=encoding, **(settings | changes)).eval()


def find(rows, **conditions):
    return [row for row in rows if all(row.get(key) == value for key, value in conditions.items())]


def every(rows, **conditions):
    """At least one row."""
    found = find(rows, **conditions)
    assert found
    return found


def value(rows, **conditions):
    (found,) = find(rows, **conditions)
    return found["value"]


def random_maps(encoding_name, grid, head_dim=64, images=8):
    encoding = create_encoding(encoding_name, 2, head_dim, grid)
    q, k = torch.randn(2, images, 2, grid[0] * grid[1], head_dim)
    return encoding, encoding.maps(q, k, grid)


# --- gates and positions ---------------------------------------------------------------------------------------------


def test_gate_statistics_against_the_literal_loop():
    gates = torch.rand(2, 3, 5, 4).pow(4)
    for b in range(2):
        flat = gates[b].flatten().tolist()
        mean = sum(flat) / len(flat)
        expected = {
            "gate_mean": mean,
            "gate_std": math.sqrt(sum((g - mean) ** 2 for g in flat) / len(flat)),
            "gate_low_share": sum(g < 0.01 for g in flat) / len(flat),
            "gate_high_share": sum(g > 0.99 for g in flat) / len(flat),
            "gate_saturated_share": sum(g < 0.01 or g > 0.99 for g in flat) / len(flat),
            "gate_slope": sum(g * (1 - g) for g in flat) / len(flat),
        }
        found = {name: values[b].item() for name, values in gate_statistics(gates).items()}
        assert found == pytest.approx(expected, rel=1e-9)


def test_unscaled_gates_saturate_and_scaled_gates_do_not():
    """Fact 8: 55 % below 0.01 or above 0.99 at d = 64 for unit-variance q and k, mean slope 0.052; scaled none, 0.206."""
    _, maps = random_maps("sape2:gate_scale=none", (8, 8))
    unscaled = gate_statistics(maps["gates_x"])
    assert unscaled["gate_saturated_share"].mean().item() == pytest.approx(0.55, abs=0.02)
    assert unscaled["gate_slope"].mean().item() == pytest.approx(0.052, abs=0.005)
    _, maps = random_maps("sape2", (8, 8))
    scaled = gate_statistics(maps["gates_x"])
    assert scaled["gate_saturated_share"].mean().item() < 0.001
    assert scaled["gate_slope"].mean().item() == pytest.approx(0.206, abs=0.005)


@pytest.mark.parametrize(("columns", "share"), [(8, 0.0), (16, 0.009), (24, 0.27), (32, 0.45)])
def test_ten_positions_clamp_on_longer_lines(columns, share):
    """Fact 7: P = 10 clamps 0.9 % of the positions at 16 columns, 27 % at 24, 45 % at 32."""
    encoding, maps = random_maps("sape2:num_positions=10", (4, columns))
    positions, num_rows = tabled_positions(maps, encoding)["x"]
    assert num_rows == 10
    found = position_statistics(positions, num_rows)["position_clamped_share"].mean().item()
    assert found == pytest.approx(share, abs=0.01 if share > 0.1 else 0.003)


def test_table_use_against_the_literal_loop():
    positions = torch.rand(3, 2, 4, 5) * 4 + 1.5
    positions[0, 0, 0, 0] = 12.0  # clamped to the last row
    use = TableUse(9)
    use.add(positions[:2])
    use.add(positions[2:])
    read = set()
    for p in positions.flatten().tolist():
        p = min(p, 8)
        read |= {math.floor(p), math.ceil(p)}
    rows = {row["name"]: row for row in use.rows(layer=1, axis="x")}
    assert rows["table_use"]["value"] == pytest.approx(len(read) / 9)
    assert rows["position_max"]["value"] == 12.0
    assert rows["table_rows"]["value"] == 9
    assert rows["table_use"]["n"] == 3


def test_a_position_on_an_integer_reads_one_row():
    use = TableUse(5)
    use.add(torch.full((1, 2), 3.0))
    assert use.read.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("name", "axes"),
    [("sape2", {"x": 9, "y": 9}), ("cope", {"sequence": 33}), ("cope+sape2:axes=raster", {"sequence": 33, "raster": 33})],
)
def test_positions_are_joined_with_the_table_that_they_read(name, axes):
    encoding, maps = random_maps(name, (4, 8), head_dim=8, images=1)
    assert {axis: rows for axis, (_, rows) in tabled_positions(maps, encoding).items()} == axes
    assert tabled_positions(maps, create_encoding("rpe_decomposed", 2, 8, (4, 8))) == {}  # its tables hold no positions


# --- bias against content --------------------------------------------------------------------------------------------


def literal_bias_statistics(content, bias):
    """One head, from its logits, with numpy."""
    logits = content + bias
    b, c, a = (values - values.mean(1, keepdims=True) for values in (bias, content, logits))
    return {
        "bias_mean": bias.mean(),
        "bias_std": bias.std(),
        "bias_row_std": np.sqrt((b * b).mean()),
        "content_row_std": np.sqrt((c * c).mean()),
        "bias_to_content": np.sqrt((b * b).mean() / (c * c).mean()),
        "bias_variance_share": (b * a).mean() / (a * a).mean(),
        "bias_content_correlation": (b * c).mean() / np.sqrt((b * b).mean() * (c * c).mean()),
    }


def test_bias_statistics_against_numpy_from_the_attention_weights_alone():
    bias, content = torch.randn(2, 2, 3, 10, 10, dtype=torch.float64)
    content = content + 0.5 * bias
    found = bias_statistics((content + bias).softmax(-1), bias)
    for b in range(2):
        heads = [literal_bias_statistics(content[b, h].numpy(), bias[b, h].numpy()) for h in range(3)]
        for name, values in found.items():
            assert values[b].item() == pytest.approx(np.mean([head[name] for head in heads]), rel=1e-9), name


def test_the_share_of_the_bias_is_one_half_zero_one_and_is_fair_where_both_go_together():
    content = torch.randn(1, 1, 200, 200, dtype=torch.float64)
    other = torch.randn(1, 1, 200, 200, dtype=torch.float64)

    def share(content, bias):
        return bias_statistics((content + bias).softmax(-1), bias)["bias_variance_share"].item()

    assert share(content, other) == pytest.approx(0.5, abs=0.02)
    assert share(content, content) == pytest.approx(0.5)
    assert share(content, 0 * content) == 0
    assert share(0 * content, other) == pytest.approx(1)
    assert share(content, -0.5 * content) == pytest.approx(-1)  # the bias takes away: 1.0 - 0.5 = 0.5 is left
    assert share(content, other) + share(other, content) == pytest.approx(1)


def test_a_constant_added_to_a_row_of_the_bias_changes_nothing_that_is_centred():
    bias, content = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    shifted = bias + torch.arange(8).double()[:, None]
    one, other = (bias_statistics((content + b).softmax(-1), b) for b in (bias, shifted))
    for name in ("bias_row_std", "content_row_std", "bias_variance_share"):
        torch.testing.assert_close(one[name], other[name])


def test_weights_that_underflow_count_as_the_smallest_number():
    attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    found = bias_statistics(attention, torch.zeros(1, 1, 2, 2), torch.finfo(torch.float32).tiny)
    assert found["content_row_std"].item() == pytest.approx(87.3366 / 2 / math.sqrt(2), rel=1e-4)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_of_a_sape2_model_has_every_number_per_layer_and_axis():
    rows = list(health(small("ape+sape2:sign=learned,gate_scale=learned"), labelled_images(8), limit=6))
    for layer in (1, 2):
        for axis in "xy":
            names = {row["name"] for row in find(rows, layer=layer, axis=axis) if "patches" not in row}
            assert {"gate_saturated_share", "gate_slope", "position_clamped_share", "position_max", "table_use"} <= names
        assert {row["name"] for row in find(rows, layer=layer) if "axis" not in row} >= {"bias_variance_share", "dead"}
        assert [row["value"] for row in find(rows, layer=layer, name="parameter_value", parameter="gain")] == [1.0] * 3
        assert len(find(rows, layer=layer, name="parameter_value", parameter="gate_scale")) == 3
        assert value(rows, layer=layer, name="gradient_rms", parameter="table_x") > 0
    assert rows[-1]["name"] == "warnings"
    assert all({"measure", "name", "value", "unit", "n", "protocol"} <= set(row) for row in rows)


def test_gates_and_positions_of_the_report_are_those_of_the_model():
    model, data = small("sape2"), labelled_images(4)
    rows = list(health(model, data))
    maps = model.maps(next(data.batches(4))[0])[1]
    assert value(rows, layer=2, axis="y", name="gate_mean") == pytest.approx(maps["gates_y"].mean().item(), rel=1e-5)
    assert value(rows, layer=2, axis="y", name="position_max") == pytest.approx(maps["positions_y"].max().item(), rel=1e-6)
    assert value(rows, layer=2, name="bias_mean") == pytest.approx(maps["bias"].mean().item(), rel=1e-5)
    q, k, _ = model.blocks[1].attn.project(model.blocks[1].norm1(model.maps(next(data.batches(4))[0])[0]["tokens"]))
    content = (q @ k.transpose(-1, -2)).double() / q.shape[-1] ** 0.5
    centred = content - content.mean(-1, keepdim=True)
    expected = centred.square().mean((-1, -2)).sqrt().mean().item()
    assert value(rows, layer=2, name="content_row_std") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("encoding", ["none", "ape", "sincos", "cpe", "rope"])
def test_without_a_bias_there_is_the_position_probe_and_nothing_else(encoding):
    assert {row["name"] for row in health(small(encoding), labelled_images(8))} == {"position_r2", "position_error"}


@pytest.mark.parametrize("encoding", ["rpe", "alibi", "rpe_contextual"])
def test_a_bias_without_gates_has_bias_rows_and_no_gate_rows(encoding):
    names = {row["name"] for row in health(small(encoding), labelled_images(4))}
    assert "bias_row_std" in names
    assert not any(name.startswith(("gate_", "table_use")) for name in names)


def test_layers_that_leave_the_encoding_out_have_no_rows():
    rows = list(health(small("sape2:every=2"), labelled_images(4)))
    assert find(rows, name="bias_row_std", layer=1) == []
    assert len(find(rows, name="bias_row_std", layer=2)) == 1


def test_a_bias_of_a_joined_encoding_is_found():
    model = small("rope+sape2")
    assert list(encodings_of(model)) == [1, 2]
    assert len(find(list(health(model, labelled_images(4))), name="table_use")) == 4


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings_of(model, number=4):
    rows = list(health(model, labelled_images(number)))
    found = [row for row in rows if row["name"].startswith("warning_")]
    assert rows[-1]["value"] == len(found)
    return found


def test_a_fresh_model_of_the_listing_gets_no_warning_about_gates_positions_or_gradients():
    names = {row["name"] for row in warnings_of(small("sape2:table_std=0.5"))}
    assert names <= {"warning_unused_rows", "warning_bias_dominates"}  # fresh content logits are tiny


def test_saturated_gates_are_named_with_layer_share_and_way_out():
    model = small("sape2:gate_scale=none", dim=96)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 15
    saturated = find(warnings_of(model), name="warning_saturated_gates")
    assert {(row["layer"], row["axis"]) for row in saturated} == {(1, "x"), (1, "y"), (2, "x"), (2, "y")}
    message = saturated[0]["message"]
    assert "layer 1, axis x" in message
    assert f"{saturated[0]['value']:.0%}" in message
    assert "gate_scale=sqrt_dim" in message
    assert "\n" not in message


def test_constant_gates_are_a_choice_and_no_saturation():
    names = {row["name"] for row in warnings_of(small("sape2:gates=none,count=between"))}
    assert "warning_saturated_gates" not in names


def test_clamped_positions_are_named_with_the_rows_that_would_do():
    clamped = find(warnings_of(small("sape2:num_positions=2")), name="warning_clamped_positions")
    assert len(clamped) == 4
    assert "num_positions=4" in clamped[0]["message"]  # four gates of about 1/2: positions a little above 2


def test_an_all_zero_table_is_dead_constant_and_without_gradient():
    model = small("sape2:table_std=1.0")
    torch.nn.init.zeros_(model.blocks[1].attn.encoding.table_x)
    torch.nn.init.zeros_(model.blocks[1].attn.encoding.table_y)
    with pytest.warns(UserWarning, match="all zero"):  # the encoding's own warning, when it learns
        model.train()(torch.randn(1, 3, 16, 16))
    found = warnings_of(model)
    (dead,) = find(found, name="warning_dead")
    assert dead["layer"] == 2
    assert "table_x is all zero" in dead["message"]
    assert [row["layer"] for row in find(found, name="warning_constant_bias")] == [2]
    assert {(row["layer"], row["parameter"]) for row in find(found, name="warning_no_gradient")} == {
        (2, "table_x"),
        (2, "table_y"),
    }


def test_the_bias_of_the_last_layer_under_a_class_token_gets_no_gradient_and_the_message_says_why():
    found = find(warnings_of(small("sape2", pool="class")), name="warning_no_gradient")
    assert {row["layer"] for row in found} == {2}
    assert "class token" in found[0]["message"]


def test_a_zero_table_that_learns_is_constant_but_not_dead():
    names = {row["name"] for row in warnings_of(small("cope"))}
    assert "warning_constant_bias" in names
    assert not {"warning_dead", "warning_no_gradient"} & names


def test_a_bias_that_drowns_the_content_is_named():
    assert find(warnings_of(small("alibi")), name="warning_bias_dominates")  # fresh content logits are tiny


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_speaks_beyond_its_limit_and_is_silent_within(rule):
    within = {
        "gate_saturated_share": 0.25,
        "gate_std": 0.1,
        "gate_slope": 0.2,
        "position_clamped_share": 0.05,
        "position_max": 4.2,
        "table_rows": 5,
        "table_use": 0.5,
        "bias_row_std": 0.01,
        "bias_to_content": 3.0,
        "gradient_rms": 1e-9,
    }
    beyond = {
        "gate_saturated_share": 0.26,
        "position_clamped_share": 0.06,
        "table_use": 0.49,
        "bias_row_std": 0.009,
        "bias_to_content": 3.1,
        "gradient_rms": 0.0,
    }
    for numbers, expected in ((within, 0), (within | {rule.of: beyond[rule.of]}, 1)):
        rows = list(findings([row("health", name, float(v), "unit", 7, "protocol", layer=3) for name, v in numbers.items()]))
        assert rows[-1]["value"] == len(rows) - 1 == expected
        for warning in rows[:-1]:
            assert (warning["name"], warning["value"], warning["n"], warning["layer"]) == (rule.name, beyond[rule.of], 7, 3)
            assert "layer 3" in warning["message"]


# --- position probe --------------------------------------------------------------------------------------------------


def test_ridge_against_numpy_on_standardised_features():
    features, targets = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3.0]), torch.randn(50, 2).double()
    sums = moments(features[:20], targets[:20]) + moments(features[20:], targets[20:])
    weights, intercept = ridge(sums, penalty=0.1)
    x = (features - features.mean(0)) / features.std(0, unbiased=False)
    y = targets - targets.mean(0)
    solution = np.linalg.solve((x.T @ x).numpy() / 50 + 0.1 * np.eye(4), (x.T @ y).numpy() / 50)
    expected = targets.mean(0) + x @ torch.from_numpy(solution)
    torch.testing.assert_close(features @ weights + intercept, expected, rtol=1e-9, atol=1e-9)


def test_a_feature_that_never_changes_gets_weight_zero():
    features, targets = torch.randn(50, 3).double(), torch.randn(50, 2).double()
    features[:, 1] = 0.1
    assert ridge(moments(features, targets))[0][1].tolist() == [0, 0]


class GivenTokens(torch.nn.Module):
    """A model whose tokens are `make(images)`, (B, N, D), in front of its only layer and behind it."""

    num_prefix_tokens = 1

    def __init__(self, make):
        super().__init__()
        self.make = make

    def embed(self, images):
        tokens = self.make(images)
        return torch.cat([torch.randn(len(images), 1, tokens.shape[-1]), tokens], dim=1), (4, 4)

    def maps(self, images):
        return [{"attention": torch.full((len(images), 1, 17, 17), 1 / 17), "tokens": self.embed(images)[0]}]


PLACES = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], dim=-1).float()


def test_tokens_that_hold_their_coordinates_are_read_perfectly():
    mixing = torch.randn(4, 6)

    def tokens(images):
        return torch.cat([PLACES.expand(len(images), -1, -1), torch.randn(len(images), 16, 2)], dim=-1) @ mixing

    rows = list(position_content("health", GivenTokens(tokens), labelled_images(40)))
    for found in every(rows, name="position_r2"):
        assert found["value"] == pytest.approx(1, abs=1e-4)
    for found in every(rows, name="position_error"):
        assert found["value"] < 0.01
        assert found["chance"] == 1.0  # of columns 0 to 3 the mean is 1.5, so 1 patch off on average


def test_noise_is_read_at_chance():
    rows = list(position_content("health", GivenTokens(lambda images: torch.randn(len(images), 16, 6)), labelled_images(200)))
    for found in every(rows, name="position_r2"):
        assert found["value"] == pytest.approx(0, abs=0.03)
        assert found["chance"] == 0.0
    for found in every(rows, name="position_error"):
        assert found["value"] == pytest.approx(found["chance"], abs=0.03)


def test_one_axis_does_not_tell_the_other():
    def columns_only(images):
        return torch.cat([PLACES[:, 1:].expand(len(images), -1, -1), torch.randn(len(images), 16, 2)], dim=-1)

    rows = list(position_content("health", GivenTokens(columns_only), labelled_images(100)))
    assert value(rows, name="position_r2", axis="x", layer=1, patches="in place") > 0.999
    assert abs(value(rows, name="position_r2", axis="y", layer=1, patches="in place")) < 0.05


def gradient_images(number=60):
    """Brighter to the right and to the bottom: content that tells the place."""
    ramp = torch.arange(16).float()
    made = 6 * (ramp[:, None] + ramp) + 20 * torch.rand(number, 3, 16, 16)
    return ImageData(made.byte(), torch.arange(number) % 5, tuple("abcde"), (0.5,) * 3, (0.25,) * 3)


def test_content_that_tells_the_place_is_told_from_an_encoding_by_shuffling_the_patches():
    rows = list(position_content("health", small("none"), gradient_images()))
    assert value(rows, name="position_r2", axis="x", layer=0, patches="in place") > 0.3
    for found in every(rows, name="position_r2", patches="shuffled"):  # no encoding: nothing is left
        assert found["value"] == pytest.approx(0, abs=0.05)
    rows = list(position_content("health", small("sincos"), gradient_images()))
    for found in every(rows, name="position_r2", patches="shuffled"):
        assert found["value"] > 0.9
    assert {row["layer"] for row in rows} == {0, 1, 2}
    assert {row["n"] for row in rows} == {30}


def test_a_single_row_of_patches_has_no_row_to_read():
    rows = list(position_content("health", small("sincos", image_size=(4, 16)), images_of(4, 16)))
    assert value(rows, name="position_r2", axis="y", layer=0, patches="in place") is None
    assert value(rows, name="position_r2", axis="x", layer=0, patches="in place") > 0.9


def images_of(height, width, number=20):
    return ImageData(
        torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8),
        torch.zeros(number).long(),
        ("a",),
        (0.5,) * 3,
        (1.0,) * 3,
    )


def test_one_image_cannot_be_fitted_and_measured():
    with pytest.raises(ValueError, match=r" 2 images.* 1\b"):
        list(position_content("health", small("none"), labelled_images(8), limit=1))


def test_images_for_measuring_are_never_among_those_for_fitting():
    seen = []
    model = GivenTokens(lambda batch: seen.append(batch[:, 0, 0, 0].tolist()) or torch.randn(len(batch), 16, 2))
    data = ImageData(
        torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous(),
        torch.zeros(9).long(),
        ("a",),
        (0.0,),
        (1 / 255,),
    )
    list(position_content("health", model, data, batch_size=3))  # an odd batch would mix the halves
    parities = [{round(number) % 2 for number in batch} for batch in seen if batch]
    assert all(len(parity) == 1 for parity in parities)
    assert sorted({round(number) for batch in seen for number in batch}) == list(range(9))


def test_shuffling_keeps_every_patch_whole():
    pictures = torch.arange(2 * 3 * 8 * 12).float().view(2, 3, 8, 12)
    shuffled = shuffle_patches(pictures, (2, 3), torch.Generator().manual_seed(0))

    def patches(batch):
        return [sorted(image[:, y : y + 4, x : x + 4].flatten().tolist() for y in (0, 4) for x in (0, 4, 8)) for image in batch]

    assert shuffled.shape == pictures.shape
    assert patches(shuffled) == patches(pictures)
    assert not torch.equal(shuffled, pictures)
