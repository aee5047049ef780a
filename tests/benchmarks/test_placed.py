"""The images of benchmarks/placed.py: whole, on a canvas of one colour, of all sides and places, the same every time."""

import numpy as np
import placed
import pytest
from PIL import Image


@pytest.fixture
def image():
    """Black, so that it is told from nearly every canvas."""
    return Image.new("RGB", (placed.SIDE, placed.SIDE))


def box(canvas):
    """(side, left, top) of the black part."""
    rows, columns = np.nonzero(~np.asarray(canvas).any(-1))
    side = int(np.ptp(rows)) + 1
    assert int(np.ptp(columns)) + 1 == side
    assert rows.size == side**2
    return side, int(columns.min()), int(rows.min())


def test_an_object_has_every_side_and_place_and_one_colour_around_it(image):
    draw = np.random.default_rng(0)
    canvases = [placed.placed(image, draw) for _ in range(4000)]
    sides, lefts, tops = (set(values) for values in zip(*map(box, canvases), strict=True))
    assert sides == set(range(placed.LEAST, placed.SIDE + 1))
    assert lefts == tops == set(range(placed.SIDE - placed.LEAST + 1))
    assert all(len(canvas.getcolors()) <= 2 for canvas in canvases)


def test_the_same_seed_places_alike(image):
    one, other = (placed.placed(image, np.random.default_rng(3)).tobytes() for _ in range(2))
    assert one == other
