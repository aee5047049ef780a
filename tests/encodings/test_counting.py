"""The two forms of counting and reading: `fast` gives the numbers and the gradients of `readable`."""

import pytest
import torch

from sape2.encodings.counting import fast, form_for, readable
from sape2.encodings.grid import line_coordinate

GRID = (3, 5)


def random_lines(axis):
    """Gates and products of two images and two heads, and the place of every token in its line."""
    length = {"x": 5, "y": 3, "raster": 15}[axis]
    gates = torch.rand(2, 2, 15, length, dtype=torch.float64)
    return gates.requires_grad_(), torch.randn(2, 2, 15, 4, dtype=torch.float64).requires_grad_(), line_coordinate(GRID, axis)


def vectors(form, gates, products, place, count):
    return form.interpolate(products, form.count_positions(gates, count, place))


@pytest.mark.parametrize("axis", ["x", "y", "raster"])
@pytest.mark.parametrize("count", ["suffix", "prefix", "both", "between", "cyclic"])
def test_both_forms_agree_also_beyond_the_table(count, axis):
    """A table of four positions, so that long counts are clamped."""
    gates, products, place = random_lines(axis)
    results = []
    for form in (readable, fast):
        values = vectors(form, gates, products, place, count)
        results.append([values, *torch.autograd.grad(values.sin().sum(), [gates, products])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_gradients_of_the_fast_form_can_be_differentiated_again():
    gates, products, place = random_lines("x")
    curvatures = []
    for form in (readable, fast):
        values = vectors(form, gates, products, place, "suffix").sin().sum()
        (first,) = torch.autograd.grad(values, gates, create_graph=True)
        curvatures.append(torch.autograd.grad(first.square().sum(), [gates, products]))
    torch.testing.assert_close(curvatures[1], curvatures[0], rtol=1e-12, atol=1e-12)


def test_the_readable_form_is_taken_where_gradients_cannot_be_written_by_hand():
    gates = random_lines("x")[0]
    assert form_for(gates) is fast
    assert form_for(gates.to("meta")) is readable
    assert torch.func.vmap(lambda g: torch.tensor(form_for(g) is readable))(gates).all()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(gates.detach(), torch.ones_like(gates))
        assert form_for(torch.zeros(1), dual) is readable
