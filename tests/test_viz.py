"""Pictures of rows: which points are drawn, where, with which intervals; and that every picture can be made."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from sape2 import viz
from sape2.viz.base import LINES
from sape2.viz.curves import Panel, Point, _curve

mpl.use("Agg")


def row(name, value, **conditions):
    return {"name": name, "value": value} | conditions


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept open."""
    figures = []
    monkeypatch.setattr("sape2.viz.curves.save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr("sape2.viz.maps.save", lambda figure, path: figures.append(figure))
    yield figures
    mpl.pyplot.close("all")


SHIFTS = [
    row("shift_accuracy", 0.7, ci_low=0.6, ci_high=0.8, shift_px=2, axis="x", border="circular", chance=0.1),
    row("shift_accuracy", 0.8, ci_low=0.75, ci_high=0.85, shift_px=0, axis="x", border="circular", chance=0.1),
    row("shift_accuracy", 0.3, shift_px=2, axis="y", border="circular"),
    row("shift_accuracy", 0.1, shift_px=4, axis="x", border="reflect"),
    row("shift_agreement", 0.9, shift_px=2, axis="x", border="circular"),
    row("shift_accuracy", None, shift_px=6, axis="x", border="circular"),
]


def test_a_curve_holds_the_rows_that_are_meant_in_the_order_of_their_places():
    panel = Panel("", "shift_px", "", {"axis": "x", "border": "circular"})
    assert _curve(SHIFTS, "shift_accuracy", panel) == [Point(0, 0.8, 0.75, 0.85, 0.1), Point(2, 0.7, 0.6, 0.8, 0.1)]


def test_of_several_proportions_the_most_common_is_drawn_at_its_height():
    sizes = [row("accuracy_at_size", 0.5, size=size) for size in ("48x48", "32x32", "32x48", "24x24")]
    assert [point.place for point in _curve(sizes, "accuracy_at_size", Panel("", "size", "", {}))] == [24, 32, 48]


def test_shift_curves_show_every_run_along_both_axes_with_its_interval(drawn):
    viz.plot_shift({"ape": SHIFTS, "sape2": SHIFTS[:2]}, "unused")
    along_x, along_y = drawn[0].axes
    lines = [line for line in along_x.lines if len(line.get_xdata()) == 2 and line.get_label() != "chance"]
    assert [line.get_label() for line in lines] == ["ape", "sape2"]
    assert lines[0].get_xydata().tolist() == [[0, 0.8], [2, 0.7]]
    assert [line.get_color() for line in lines] == list(LINES[:2])
    band = along_x.collections[0].get_paths()[0].vertices
    assert {(0.0, 0.75), (0.0, 0.85), (2.0, 0.6), (2.0, 0.8)} <= {(x, round(y, 9)) for x, y in band.tolist()}
    assert along_x.get_xlabel() == "shift (px)"
    assert [line.get_label() for line in along_y.lines] == ["ape"]


def test_resolution_curves_show_the_rule_that_a_run_was_built_with(drawn):
    rows = [
        row("accuracy_at_size", value, size=size, transform=transform, rule=rule)
        for rule, value in (("clamp", 0.5), ("rescale", 0.9))
        for transform in ("scaled", "padded")
        for size in ("16x16", "32x32")
    ]
    viz.plot_resolution({"sape2": rows}, "unused")
    assert [axis.get_title() for axis in drawn[0].axes] == ["content scaled", "content padded"]
    assert all(line.get_ydata().tolist() == [0.5, 0.5] for axis in drawn[0].axes for line in axis.lines)


def test_a_number_is_shown_by_layer_for_the_mean_of_heads(drawn):
    rows = [row("same_label_lift", 1.0 + layer, layer=layer, masks="scenes", distance="far", chance=1.0) for layer in (2, 1)]
    rows += [row("same_label_lift", 9.0, layer=1, masks="scenes", distance="far", head=1)]
    viz.plot_layers({"none": rows}, "unused", "same_label_lift", "lift (ratio)", masks="scenes", distance="far")
    line, chance = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 3]]
    assert chance.get_ydata() == [1.0, 1.0]


def test_more_runs_than_colours_differ_in_their_dashes(drawn):
    viz.plot_layers({str(run): [row("n", 1.0, layer=1)] for run in range(12)}, "unused", "n", "n (unit)")
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines]
    assert len(set(styles)) == 12


def test_rows_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"no run has a row shift_accuracy .*measure it first"):
        viz.plot_shift({"ape": []}, "unused")


def test_all_pairs_and_each_patch_are_where_they_belong(drawn):
    """The map of a patch is its row of the pairs, on the grid; both on one scale."""
    pairs = torch.randn(12, 12)
    image = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8)
    viz.plot_pairs(image, {"layer 1": pairs}, (3, 4), {"centre": (1, 2)}, "unused")
    images = [artist for axis in drawn[0].subfigs[0].axes for artist in axis.images]
    maps = [np.asarray(artist.get_array()) for artist in images if np.asarray(artist.get_array()).ndim == 2]
    assert [found.shape for found in maps] == [(12, 12), (3, 4)]
    np.testing.assert_allclose(maps[0], pairs.numpy())
    np.testing.assert_allclose(maps[1], pairs[6].view(3, 4).numpy())
    assert len({artist.get_clim() for artist in images if np.asarray(artist.get_array()).ndim == 2}) == 1


def test_the_bias_against_distance_is_mean_and_spread_of_the_pairs(drawn):
    maps = torch.randn(2, 4, 4)  # two heads, four patches in a row
    viz.plot_distance({"layer 1": maps}, (1, 4), "unused")
    (line,) = drawn[0].axes[0].lines
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    expected = [maps[:, apart == step].mean().item() for step in range(4)]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 8])
def test_every_picture_of_an_image_can_be_made(tmp_path, channels, depth):
    image = torch.randint(0, 256, (channels, 6, 8), dtype=torch.uint8)
    layers = {
        f"layer {layer}": torch.zeros(2, 12, 12) if layer == 1 else torch.randn(2, 12, 12) for layer in range(1, depth + 1)
    }
    line = {"gates": torch.rand(2, 4), "positions": 3 * torch.rand(2, 8)}
    column = {"gates": torch.rand(2, 3), "positions": torch.zeros(2, 3)}
    sequence = {"gates": torch.rand(2, 12), "positions": torch.rand(2, 12)}
    viz.plot_pairs(image, {n: m.mean(0) for n, m in layers.items()}, (3, 4), {"a": (0, 0), "b": (2, 3)}, tmp_path / "pairs.png")
    viz.plot_distance(layers, (3, 4), tmp_path / "distance.png")
    viz.plot_counts(image, {"x": line, "y": column, "sequence": sequence}, (3, 4), (1, 2), tmp_path / "counts.png", "title")
    for path in sorted(tmp_path.iterdir()):
        assert Image.open(path).size[0] > 300
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["counts.png", "distance.png", "pairs.png"]
