"""Pictures of rows: which points are drawn, where, with which intervals; and that every picture can be made."""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from sape2 import viz
from sape2.viz import confusion, curves, growth
from sape2.viz.base import LINES, shortened
from sape2.viz.curves import Panel, Point, _curve

mpl.use("Agg")
UNUSED = Path("unused.png")


def row(name, value, **conditions):
    return {"name": name, "value": value} | conditions


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept open."""
    figures = []
    for module in (confusion, curves, growth):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    yield figures
    plt.close("all")


SHIFTS = [
    row("shift_accuracy", 0.7, ci_low=0.6, ci_high=0.8, shift_px=2, axis="x", border="circular", chance=0.1),
    row("shift_accuracy", 0.8, ci_low=0.75, ci_high=0.85, shift_px=0, axis="x", border="circular", chance=0.1),
    row("shift_accuracy", 0.3, shift_px=2, axis="y", border="circular"),
    row("shift_accuracy", 0.1, shift_px=4, axis="x", border="reflect"),
    row("shift_agreement", 0.9, shift_px=2, axis="x", border="circular"),
    row("shift_accuracy", None, shift_px=6, axis="x", border="circular"),
]


def test_a_curve_holds_the_rows_that_are_meant_in_the_order_of_their_places():
    panel = Panel("shift_accuracy", "", "", "shift_px", "", {"axis": "x", "border": "circular"})
    assert _curve(SHIFTS, panel) == [Point(0, 0.8, 0.75, 0.85, 0.1), Point(2, 0.7, 0.6, 0.8, 0.1)]


def test_of_several_proportions_the_most_common_is_drawn_at_its_height():
    sizes = [row("accuracy_at_size", 0.5, size=size) for size in ("48x48", "32x32", "32x48", "24x24")]
    assert [point.place for point in _curve(sizes, Panel("accuracy_at_size", "", "", "size", "", {}))] == [24, 32, 48]


def test_shift_curves_show_every_run_along_both_axes_with_its_interval(drawn):
    viz.plot_shift({"ape": SHIFTS, "sape2": SHIFTS[:2]}, UNUSED)
    along_x, along_y, reflected = (axis for axis in drawn[0].axes if axis.axison)
    lines = [line for line in along_x.lines if len(line.get_xdata()) == 2 and line.get_label() != "chance"]
    assert [line.get_label() for line in lines] == ["ape", "sape2"]
    assert lines[0].get_xydata().tolist() == [[0, 0.8], [2, 0.7]]
    assert [line.get_color() for line in lines] == list(LINES[:2])
    band = along_x.collections[0].get_paths()[0].vertices
    assert {(0.0, 0.75), (0.0, 0.85), (2.0, 0.6), (2.0, 0.8)} <= {(x, round(y, 9)) for x, y in band.tolist()}
    assert along_x.get_xlabel() == "shift (px)"
    assert [line.get_label() for line in along_y.lines] == ["ape"]
    assert reflected.lines[0].get_xydata().tolist() == [[4, 0.1]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ape", "sape2", "chance"]


def test_resolution_curves_show_one_rule_and_one_border_each_from_the_size_trained_at(drawn):
    """A point a size: what the border is matters above the size trained at only."""
    rows = []
    for rule, value in (("clamp", 0.5), ("rescale", 0.9)):
        rows.append(row("accuracy_at_size", value, size="32x32", transform="scaled", border="none", rule=rule))
        for size, transform, border, less in (
            ("16x16", "scaled", "none", 0.1),
            ("64x64", "scaled", "none", 0.2),
            ("16x16", "padded", "none", 0.3),
            ("64x64", "padded", "reflect", 0.35),
            ("64x64", "padded", "mean", 0.4),
        ):
            at = {"size": size, "transform": transform, "border": border, "rule": rule}
            rows += [row("accuracy_at_size", value - less, **at), row("accuracy_drop", less, **at)]
    viz.plot_resolution({"sape2": rows}, UNUSED)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["image resized", "image padded by reflection", "image padded with the mean colour"]
    found = [[(x, round(y, 9)) for x, y in axis.lines[0].get_xydata()] for axis in drawn[0].axes]
    assert found == [
        [(16, 0.4), (32, 0.5), (64, 0.3)],
        [(16, 0.2), (32, 0.5), (64, 0.15)],
        [(16, 0.2), (32, 0.5), (64, 0.1)],
    ]
    assert drawn[0].axes[0].get_xlabel() == "image height (px), trained at 32x32"


@pytest.mark.parametrize(
    "places",
    [
        (0, 1, 2, 3, 4, 8, 16),
        (0, 1, 2, 4, 8, 16, 32, 112),
        (136, 152, 176, 192, 208, 224, 240, 256, 320, 448),
        range(0, 1200, 7),
    ],
    ids=str,
)
def test_labels_of_ticks_do_not_touch(drawn, places):
    rows = [row("shift_accuracy", 0.5, shift_px=px, axis=axis, border="circular") for px in places for axis in "xy"]
    viz.plot_shift({"ape": rows}, UNUSED)
    drawn[0].draw_without_rendering()
    for axis in (axis for axis in drawn[0].axes if axis.axison):
        extents = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        assert len(extents) >= 3
        assert all(left.x1 + 3 <= right.x0 for left, right in pairwise(extents))


# --- confusion -------------------------------------------------------------------------------------------------------


def confused(number):
    counts = 50 * torch.eye(number, dtype=torch.long)
    counts[3, 4], counts[1, 0] = 22, 9
    return counts, tuple(f"class number {at}" for at in range(number))


@pytest.mark.parametrize("number", [5, 20, 100, 1000])
def test_the_confusion_of_any_number_of_classes_fits_a_screen(tmp_path, number):
    viz.plot_confusion(*confused(number), tmp_path / "confusion.png", "vit_nano, 500 test images, last weights")
    width, height = Image.open(tmp_path / "confusion.png").size
    assert width <= 1440
    assert height <= 900


def test_the_pairs_confused_most_are_listed_and_the_weights_named(drawn):
    viz.plot_confusion(*confused(100), UNUSED, "vit_nano, 500 test images, last weights")
    matrix, listed = drawn[0].axes[:2]
    texts = [text.get_text() for text in listed.texts]
    assert texts == ["22 (31%)", "3 class number 3 → 4 class number 4", "9 (15%)", "1 class number 1 → 0 class number 0"]
    assert len(matrix.texts) == 0
    assert drawn[0].get_suptitle() == "vit_nano, 500 test images, last weights"


def test_few_classes_have_their_names_and_numbers(drawn):
    viz.plot_confusion(*confused(5), UNUSED)
    matrix = drawn[0].axes[0]
    assert [label.get_text() for label in matrix.get_yticklabels()] == list(confused(5)[1])
    assert sorted(int(text.get_text()) for text in matrix.texts) == [9, 22, *[50] * 5]


LIFT = {"masks": "scenes", "distance": "far", "chance": 1.0}


def test_a_number_is_shown_by_layer_for_the_mean_of_heads(drawn):
    rows = [row("same_label_lift", 1.0 + layer, layer=layer, **LIFT) for layer in (2, 1)]
    rows += [row("same_label_lift", 9.0, layer=1, head=1, **LIFT)]
    viz.plot_grouping({"none": rows}, UNUSED)
    (panel,) = drawn[0].axes
    line, chance = panel.lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 3]]
    assert chance.get_ydata() == [1.0, 1.0]
    assert "scenes" in panel.get_title()


def test_numbers_that_come_once_an_axis_are_averaged(drawn):
    rows = [row("gate_saturated_share", value, layer=1, axis=axis) for axis, value in (("x", 0.2), ("y", 0.4))]
    rows += [row("position_r2", value, layer=1, axis="x", patches=p) for p, value in (("in place", 0.9), ("shuffled", 0.1))]
    viz.plot_health({"sape2": rows}, UNUSED)
    assert [axis.lines[0].get_ydata().tolist() for axis in drawn[0].axes] == [[pytest.approx(0.3)], [0.1]]


def test_equivariance_errors_are_those_of_the_shortest_shift(drawn):
    rows = [
        row("feature_equivariance_error", px / 10, layer=1, axis=axis, shift_px=px) for px in (16, 4) for axis in ("x", "y")
    ]
    viz.plot_equivariance({"none": rows}, UNUSED)
    assert [axis.lines[0].get_ydata().tolist() for axis in drawn[0].axes] == [[0.4], [0.4]]


def test_errors_and_shares_start_at_zero_unless_one_is_negative(drawn):
    for values in ((0.5, 0.51), (0.0, 0.0), (-0.2, 0.5)):
        rows = [row("bias_variance_share", value, layer=layer) for layer, value in enumerate(values)]
        viz.plot_health({"a": rows}, UNUSED)
    limits = [figure.axes[0].get_ylim() for figure in drawn]
    assert limits[0] == pytest.approx((-0.03 * 1.08 * 0.51, 1.08 * 0.51))
    assert limits[1] == (-0.03, 1.0)
    assert limits[2][0] < -0.2


def test_a_measure_has_its_pictures_and_none_where_there_are_no_rows(tmp_path):
    rows = [row(name, 0.5, measure="shift", **at) for name, at in (
        ("shift_accuracy", {"shift_px": 1, "axis": "x", "border": "circular"}),
        ("shift_accuracy", {"shift_px": 0, "axis": "x", "border": "circular"}),
    )]  # fmt: skip
    written = viz.plot_measures({"a": rows}, ["accuracy", "shift", "grouping"], tmp_path, "-best")
    assert written == [tmp_path / "shift-best.png"]
    assert Image.open(written[0]).size[0] > 300


def test_training_curves_name_every_run_once_and_stay_apart_beyond_the_colours(drawn):
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    epochs = [dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0)]
    runs = [f"run {number}" for number in range(10)]
    viz.plot_curves(dict.fromkeys(runs, epochs), UNUSED)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [*runs, "validation", "training"]
    solid = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == "-"]
    assert len({(line.get_color(), line.get_marker()) for line in solid}) == 10


def test_a_run_of_one_epoch_is_a_point_and_long_names_leave_the_panels_their_size(drawn):
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    one, long = [dict.fromkeys(names, 1.0)], "sape2, " + ", ".join(f"setting_{number}={number}" for number in range(30))
    for runs in ({"sape2": one}, {long: one, f"{long} b": one}):
        viz.plot_curves(runs, UNUSED)
    assert all(line.get_marker() in list("osD^vPX*") for line in drawn[1].axes[0].lines)
    for figure in drawn:
        figure.draw_without_rendering()
    short, wrapped = (figure.axes[0].get_window_extent() for figure in drawn)
    assert wrapped.width == pytest.approx(short.width, rel=0.05)
    assert wrapped.height == pytest.approx(short.height, rel=0.25)
    assert drawn[1].legends[0].get_window_extent().width < drawn[1].bbox.width


@pytest.mark.parametrize("plot", [viz.plot_curves, viz.plot_health])
def test_a_legend_of_ten_long_names_leaves_most_of_the_figure_to_the_panels(drawn, plot):
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    rows = [dict.fromkeys(names, 1.0) | row("bias_variance_share", 0.5, layer=1)]
    shared = ",".join(f"setting_{number}={number}" for number in range(30))
    plot({f"sape2:{shared},sign={at},{shared}": rows for at in range(10)}, UNUSED)
    figure = drawn[0]
    figure.draw_without_rendering()
    panel, legend = figure.axes[0].get_window_extent(), figure.legends[0].get_window_extent()
    assert panel.height >= 0.55 * figure.bbox.height
    assert len(figure.axes) * panel.width >= 0.75 * figure.bbox.width
    assert legend.width <= figure.bbox.width
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {f"sape2…,sign={at}…" for at in range(10)}


def test_names_are_shortened_to_what_tells_them_apart():
    long = "x" * 30
    names = ["ape", f"ape+sape2:a={long},b=1, 3 epochs", f"ape+sape2:a={long},b=2, 3 epochs", f"rope:a={long},b=2"]
    assert shortened(names, 100) == names
    assert shortened(names[:3], 40) == ["ape", "ape…,b=1…", "ape…,b=2…"]
    cut = shortened([f"{long}{at}{long}" for at in range(3)], 20)
    assert len(set(cut)) == 3
    assert max(map(len, cut)) <= 20


def test_epochs_have_whole_numbers(drawn):
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    for last in (1, 2, 3, 300):
        viz.plot_curves({"a": [dict.fromkeys(names, float(epoch)) for epoch in range(1, last + 1)]}, UNUSED, "vit_nano, digits")
        ticks = drawn[-1].axes[0].get_xticks()
        assert all(float(tick).is_integer() for tick in ticks)
    assert drawn[-1].get_suptitle() == "vit_nano, digits"


def test_panels_of_one_quantity_share_a_scale(drawn):
    rows = [row("bias_auroc", value, layer=1, distance=far, masks="scenes", sign="minus") for far, value in
            (("near", 0.6), ("far", 0.9))]  # fmt: skip
    viz.plot_grouping({"a": [*rows, row("same_label_lift", 1.5, layer=1, **LIFT)]}, UNUSED)
    lift, near, far = (axis.get_ylim() for axis in drawn[0].axes if axis.axison)
    assert near == far != lift


def test_growth_has_plain_numbers_and_no_legend_of_what_is_not_drawn(drawn):
    viz.plot_growth({"a": {"sape2": [(16, 0.9), (64, 3.0), (256, 40.0)]}}, UNUSED, "time (ms)")
    viz.plot_growth({"a": {"sape2": [(16, 0.9)]}}, UNUSED, "time (ms)")
    for figure in drawn:
        figure.draw_without_rendering()
    texts = [
        t.get_text() for axis in (drawn[0].axes[0].xaxis, drawn[0].axes[0].yaxis) for t in axis.get_ticklabels(which="both")
    ]
    assert {"16", "64", "256", "10", "20"} <= set(texts)
    assert not any("10^" in text for text in texts)
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["sape2"]


def test_more_runs_than_colours_differ_in_their_dashes(drawn):
    viz.plot_grouping({str(run): [row("same_label_lift", 1.5, layer=1, **LIFT)] for run in range(12)}, UNUSED)
    lines = [line for line in drawn[0].axes[0].lines if line.get_label() != "chance"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_rows_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"no run has a row shift_accuracy .*measure it first"):
        viz.plot_shift({"ape": []}, UNUSED)
