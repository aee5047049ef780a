"""Drawings: the same shapes as SVG and as pixels; panels that show the numbers they are given."""

import base64
import io
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from sape2.inspect.drawing import Drawing, colour, dot, flow, ink_on, line, raster, rect, stack, text
from sape2.inspect.figures import answer_figure, as_one, counts_figure, distance_figure, even_columns, pairs_figure
from sape2.inspect.panels import (
    HEAD,
    OVERLAID,
    Over,
    ends_of,
    heads_panel,
    image_panel,
    limits_of,
    line_panel,
    map_panel,
    number,
)
from sape2.inspect.plots import bars_panel, by_distance, table_panel

SVG = "{http://www.w3.org/2000/svg}"


def tree(drawing):
    return ET.fromstring(drawing.svg(standalone=True))


def titles(drawing):
    return [element.text for element in tree(drawing).iter(f"{SVG}title")]


def texts(drawing):
    return [element.text or "" for element in tree(drawing).iter(f"{SVG}text")]


def cells(drawing):
    """Patch -> what its cell is filled with."""
    return {rect.get("data-patch"): rect.get("fill") for rect in tree(drawing).iter(f"{SVG}rect") if rect.get("data-patch")}


def pixels(drawing, scale=2):
    return np.asarray(Image.open(io.BytesIO(drawing.png(scale))).convert("RGB"))


def test_shapes_are_where_they_were_put_in_both_forms():
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 255, 0, 0
    shapes = (
        rect(0, 0, 10, 10, "#00ff00", title="a < b", patch="1,2"),
        raster(20, 0, 20, 10, image),
        dot(50, 5, 4, "#0000ff"),
    )
    drawing = Drawing(60, 10, shapes, "green, black & red, blue")
    found = pixels(drawing)
    assert found.shape == (20, 120, 3)
    places = {(10, 10): (0, 255, 0), (10, 30): (255,) * 3, (10, 50): (0, 0, 0), (10, 70): (255, 0, 0), (10, 100): (0, 0, 255)}
    for (y, x), rgb in places.items():
        assert tuple(found[y, x]) == rgb
    root = tree(drawing)
    assert root.get("aria-label") == "green, black & red, blue"
    box = root.findall(f"{SVG}rect")[1]  # the first is the ground
    assert (box.get("data-patch"), box.get("fill"), box.find(f"{SVG}title").text) == ("1,2", "#00ff00", "a < b")


def test_lines_areas_and_text_leave_ink():
    shapes = (
        line(((0, 5), (40, 5)), "#000000", 2),
        line(((0, 10), (40, 10), (40, 20)), "none", 0, "#ff0000"),
        text(2, 38, "text", 14),
    )
    found = pixels(Drawing(40, 40, shapes))
    assert found[10, 40].max() < 60
    assert tuple(found[24, 70]) == (255, 0, 0)
    assert found[50:, :].min() < 100
    assert np.all(pixels(Drawing(40, 40, ())) == 255)


def test_drawings_flow_into_rows_and_stack():
    boxes = [Drawing(30, 10 * (at + 1), (rect(0, 0, 1, 1),)) for at in range(3)]
    row = flow(boxes, 70, gap=10)
    assert (row.width, row.height) == (70, 20 + 10 + 30)
    moves = [group.get("transform") for group in tree(row).iter(f"{SVG}g")]
    assert moves == ["translate(0.00 0.00)", "translate(40.00 0.00)", "translate(0.00 30.00)"]
    assert stack(boxes, gap=10).height == 80


@pytest.mark.parametrize("name", ["cividis", "RdBu_r"])
def test_colours_are_those_of_matplotlib(name):
    shares = np.linspace(0, 1, 256)
    assert np.abs(colour(shares, name) - 255 * mpl.colormaps[name](shares)[:, :3]).max() <= 0.5


def test_numbers_on_colours_can_be_read():
    assert ink_on(np.array([255, 255, 255])) == "#000"
    assert ink_on(np.array([0, 34, 78])) == "#fff"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (0.12345, "0.123"), (12.345, "12.35"), (-2.5, "-2.500"), (1.2e-5, "1.2e-05")]
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_a_map_says_every_value_where_it_is():
    values = np.arange(6.0).reshape(2, 3)
    panel = map_panel(values, "Bias", "logits")
    assert titles(panel) == [f"row {y}, column {x}: {values[y, x]:.5g} logits" for y in range(2) for x in range(3)]
    found = cells(panel)
    assert list(found) == ["0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    assert (found["0,0"], found["1,2"]) == ("#00224e", "#fee838")


def test_lines_and_heads_say_what_their_colours_mean():
    image = np.zeros((1, 4, 4), np.uint8)
    values = {"gate": np.array([0.2, 0.4]), "position": np.array([1.0, 2.0, 0.5, 3.0]), "vector": np.array([-2.0, 1.0])}
    panel = line_panel(image, (2, 2), (0, 0), "x", values, "Along the row")
    assert texts(panel)[-9:] == ["gate (share)", "0.000", "1.000", "position (rows)", "0.500", "3.000", "vector (logits)",
                                 "-2.000", "2.000"]  # fmt: skip
    heads = heads_panel(np.array([[0.5, 1.5]]), "Positions", "rows of the table", 1.5)
    assert texts(heads)[-2:] == ["0.000", "1.500"]


def test_the_table_is_read_where_the_positions_are():
    panel = table_panel(np.array([0.0, 2.0, 4.0]), np.array([0.5, 5.0]), "x", "Table")
    assert titles(panel)[-2:] == [
        "column 0: position 0.5, value 1",
        "column 1: position 2, beyond the last row of the table (5), value 4",
    ]


# --- figures of explain ----------------------------------------------------------------------------------------------


def test_all_pairs_and_each_patch_are_where_they_belong():
    """The map of a patch is its row of the pairs, on the grid; both on one scale."""
    pairs = torch.arange(144.0).view(12, 12)
    matrix, layer = pairs_figure({"layer 1": pairs}, (3, 4), {"the centre": (1, 2)})
    data = next(tree(matrix).iter(f"{SVG}image")).get("href").removeprefix("data:image/png;base64,")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(shown, colour(pairs.numpy() / 143))
    expected = colour(pairs[6].view(3, 4).numpy() / 143)
    assert cells(layer) == {
        f"{y},{x}": "#{:02x}{:02x}{:02x}".format(*expected[y, x].tolist()) for y in range(3) for x in range(4)
    }


@pytest.mark.parametrize("opacity", [0.0, 0.25, 1.0])
def test_a_map_over_an_image_is_mixed_with_it_in_both_forms(opacity):
    image = np.full((3, 4, 6), 200, np.uint8)
    values = np.array([[0.0, 0.5, 1.0], [0.25, 0.75, 0.5]])
    over = Over(values, "logits", opacity=opacity)
    plain, panel, answer = answer_figure(image, (2, 3), [], {"Bias": over}, [("cat", 0.5)])
    assert (plain.label, answer.label) == ("Image 4x6 px, 2x3 patches", "Prediction: cat 50.0%")
    boxes = [box for box in tree(panel).iter(f"{SVG}rect") if box.get("data-patch")]
    assert {box.get("fill-opacity") for box in boxes} == {f"{opacity:g}"}
    assert titles(panel)[1] == "row 0, column 1: 0.5 logits"
    found = pixels(panel, 1)
    for (y, x), value in np.ndenumerate(values):
        middle = int(HEAD + (y + 0.5) * OVERLAID / 3), int((x + 0.5) * OVERLAID / 3)
        expected = (1 - opacity) * 200 + opacity * colour(value).astype(float)
        np.testing.assert_allclose(found[middle], expected, atol=1.5)


def test_a_tall_image_leaves_room_for_its_scale():
    tall = image_panel(np.zeros((1, 90, 10), np.uint8), (9, 1), [], "Image", over=Over(np.ones((9, 1)), "logits"))
    assert tall.height < 2 * tall.width
    assert texts(tall)[-2:] == ["1.000 everywhere", ""]


@pytest.mark.parametrize(
    ("limits", "ends"),
    [
        ((0.0047, 0.0054), ("0.0047", "0.0054")),
        ((0.00449, 0.00551), ("0.0045", "0.0055")),
        ((0.0, 1.0), ("0.000", "1.000")),
        ((1e-9, 0.286), ("0.000", "0.286")),
        ((1.2e-5, 1.3e-5), ("1.2e-05", "1.3e-05")),
        ((2.0, 2.0 + 1e-9), ("2.000", "")),
    ],
)
def test_the_ends_of_a_scale_can_be_told_apart(limits, ends):
    assert ends_of(limits) == ends


def test_rounding_is_not_stretched_over_all_colours():
    values = 1 / 196 + 1e-9 * np.arange(4.0)
    low, high = limits_of([values])
    assert (values.max() - low) / (high - low) < 0.1


def test_long_names_of_classes_are_shortened_but_pointed_at_whole():
    names = ["the longest of all the names of classes", "the longest of all the other names of classes"]
    panel = bars_panel(names, [0.6, 0.4], "Prediction")
    shown = texts(panel)[1::2]
    assert len(set(shown)) == 2
    assert max(map(len, shown)) <= 24
    assert titles(panel)[::2] == [f"{names[0]}: 0.600000", f"{names[1]}: 0.400000"]


def test_the_bias_against_distance_is_mean_and_spread_of_the_pairs():
    maps = torch.randn(2, 4, 4)  # two heads, four patches in a row
    mean, spread = by_distance(maps.numpy(), (1, 4))
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    np.testing.assert_allclose(mean, [maps[:, apart == step].mean().item() for step in range(4)], rtol=1e-5)
    np.testing.assert_allclose(spread, [maps[:, apart == step].std(correction=0).item() for step in range(4)], rtol=1e-5)
    (panel,) = distance_figure({"layer 1": maps}, (1, 4))
    assert titles(panel)[2] == f"2 patches: mean {mean[2]:.5g}, standard deviation {spread[2]:.3g}"


def test_rows_are_as_even_as_can_be():
    assert [even_columns(number, 6) for number in (1, 4, 6, 7, 9, 12, 13)] == [1, 4, 6, 4, 5, 6, 5]
    assert [even_columns(4, most) for most in (1, 2, 3)] == [1, 2, 2]


@pytest.mark.parametrize(("channels", "depth"), [(1, 1), (3, 7)])  # 7: two rows of layers
def test_every_figure_of_an_image_can_be_made(tmp_path, channels, depth):
    image = torch.randint(0, 256, (channels, 6, 8), dtype=torch.uint8)
    layers = {
        f"layer {layer}": torch.zeros(2, 12, 12) if layer == 1 else torch.randn(2, 12, 12) for layer in range(1, depth + 1)
    }
    row = {"gates": torch.rand(2, 4), "positions": 3 * torch.rand(2, 8)}
    column = {"gates": torch.rand(2, 3), "positions": torch.zeros(2, 3)}
    sequence = {"gates": torch.rand(2, 12), "positions": torch.rand(2, 12)}
    figures = {
        "pairs": pairs_figure({n: m.mean(0) for n, m in layers.items()}, (3, 4), {"a": (0, 0), "b": (2, 3)}),
        "distance": distance_figure(layers, (3, 4)),
        "counts": counts_figure(image, {"x": row, "y": column, "sequence": sequence}, (3, 4), (1, 2)),
    }
    for name, drawings in figures.items():
        whole = as_one("photo.png: dog, 70.1%", "vit_small with ape", drawings[:1], drawings)
        ET.fromstring(whole.svg(standalone=True))
        assert "nan" not in whole.svg()
        assert texts(whole)[:2] == ["photo.png: dog, 70.1%", "vit_small with ape"]
        if depth == 1:
            whole.save(tmp_path / f"{name}.png")
            assert Image.open(tmp_path / f"{name}.png").size[0] > 300


def test_a_long_heading_stands_in_several_lines_and_is_whole():
    heading = "a" * 200 + ".png: dog, 70.1%"
    whole = as_one(heading, "about", [Drawing(300, 10, [])], [Drawing(300, 10, [])])
    lines = texts(whole)[:-1]
    assert "".join("".join(lines).split()) == "".join(heading.split())
    assert max(map(len, lines)) * 10 < whole.width


def test_without_the_library_of_pixels_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"resvg-py.*sape2\[viz\]"):
        Drawing(10, 10, ()).png()


def test_pixels_do_not_depend_on_the_fonts_of_the_system(monkeypatch):
    """Text is drawn where no font is installed: it is that of matplotlib."""
    called = []
    real = sys.modules.get("resvg_py") or __import__("resvg_py")
    monkeypatch.setattr(real, "svg_to_bytes", lambda **how: called.append(how) or b"")
    Drawing(10, 10, (text(0, 9, "a"),)).png()
    assert called[0]["skip_system_fonts"]
    assert all(Path(file).is_file() for file in called[0]["font_files"])
