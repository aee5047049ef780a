"""Gates on the object and on the canvas are told apart by the patches that they meet."""

import placed_gates
import pytest
import torch


def test_a_patch_of_one_colour_is_canvas():
    images = torch.zeros(1, 3, 4, 8)
    images[0, :, :, 4:] = torch.rand(3, 4, 4)
    assert placed_gates.is_canvas(images, 4).tolist() == [[[True, False]]]
    images[0, 1, 0, 0] = 0.5
    assert placed_gates.is_canvas(images, 4).tolist() == [[[False, False]]]


def test_gates_of_the_object_are_averaged_by_what_they_meet():
    """One row of three patches: canvas, object, object. Patch 1 opens to its like alone, patch 0 is no object."""
    canvas = torch.tensor([[[True, False, False]]])
    along_x = torch.tensor([[9.0, 9.0, 9.0], [0.1, 0.8, 0.6], [0.3, 0.4, 1.0]])[None, None]
    along_y = torch.tensor([[9.0], [0.5], [0.7]])[None, None]  # each meets itself
    found = placed_gates.mean_gates({"gates_x": along_x, "gates_y": along_y}, canvas)
    assert found == {
        placed_gates.OBJECT: pytest.approx((0.8 + 0.6 + 0.4 + 1.0 + 0.5 + 0.7) / 6),
        placed_gates.CANVAS: pytest.approx((0.1 + 0.3) / 2),
    }
    met = placed_gates.gates_met({"gates_x": along_x, "gates_y": along_y}, canvas)
    expected = torch.tensor([[[(0.1 + 0.3) / 2, (0.8 + 0.4 + 0.5) / 3, (0.6 + 1.0 + 0.7) / 3]]])
    torch.testing.assert_close(met, expected)


def test_seeds_share_a_line():
    rows = [
        {"encoding": "sape2", "seed": seed, "layer": 1, "name": name, "value": value}
        for seed, values in ((1, (0.5, 0.1)), (2, (0.7, 0.3)))
        for name, value in zip((placed_gates.OBJECT, placed_gates.CANVAS), values, strict=True)
    ]
    line = placed_gates.table(rows).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["`sape2`", "1", "2", "0.60 ± 0.14", "0.20 ± 0.14"]
