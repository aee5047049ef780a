"""What a mask hides: counts skip it, as in the literal loops; a grid of which a rectangle is seen is that rectangle."""

import pytest
import torch

from sape2 import reference
from sape2.encodings import AttentionEncoding, create_encoding, find_encoding, list_encodings
from sape2.encodings.content import Content

GRID = (3, 4)
HIDDEN = {  # name: options of the loop
    "sape2": {},
    "sape2:count=both": {"count": "both"},
    "sape2:count=between": {"count": "between"},
    "sape2:count=cyclic,readout=direct": {"count": "cyclic", "readout": "direct"},
    "sape2:dot=key,count=prefix": {"dot": "key", "count": "prefix"},
    "sape2:normalize=sqrt_length,readout=squared_distance": {"normalize": "sqrt_length", "readout": "squared_distance"},
    "sape2:axes=raster": {},
    "sape2:gates=constant": {"gates": "constant"},
    "sape2:gates=none,count=between": {"gates": "none", "count": "between"},
    "cope": {},
    "cope:count=causal": {"count": "causal"},
    "cope:count=between": {"count": "between"},
    "forget": {},
}


def make(name):
    encoding = create_encoding(name, 2, 8, GRID).double().eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in encoding.parameters():
        parameter.normal_()
    return encoding


def content(grid=GRID, batch=2, **more):
    torch.manual_seed(1)
    tokens = grid[0] * grid[1]
    q, k = torch.randn(2, batch, 2, tokens, 8, dtype=torch.float64)
    return Content(q, k, grid, tokens=q.transpose(1, 2).flatten(2), **more)


def loop(name, encoding, given, options, image, head):
    q, k, seen = given.q[image, head], given.k[image, head], given.visible[image, 0]
    if name.startswith("cope"):
        return reference.cope(q, k, encoding.table, visible=seen, **options)
    if name == "forget":
        weight, offset = encoding.weight[:, :, head], encoding.offset[:, :, head]
        return reference.forget(given.tokens[image], weight, offset, GRID, visible=seen)
    tables = {axis: getattr(encoding, f"table_{axis}") for axis in encoding.axes}
    return reference.sape2(q, k, tables, GRID, visible=seen, **options)["bias"]


@pytest.mark.parametrize("name", HIDDEN)
def test_counts_skip_what_a_patch_does_not_see_as_the_loops_do(name):
    """Patches hidden pair by pair in one image; in the other a column is hidden from all, and a patch besides."""
    visible = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    visible[1] = True
    visible[1, :, :, [1, 5, 9, 6]] = False
    encoding, given = make(name), content(visible=visible)
    bias = encoding.make_bias(given).dense()
    for image in range(2):
        for head in range(2):
            expected = loop(name, encoding, given, HIDDEN[name], image, head)
            torch.testing.assert_close(bias[image, head], expected, rtol=1e-10, atol=1e-10)


OFFSETS = ["alibi", "rpe:beyond=clamp", "rpe_contextual", "rpe_decomposed:beyond=clamp", "lookhere", "log_cpb", "pape"]


@pytest.mark.parametrize("name", [*HIDDEN, "sape2:beyond=rescale", "cope:beyond=rescale", *OFFSETS])
def test_a_grid_of_which_a_rectangle_is_seen_gives_the_bias_of_that_rectangle(name):
    grid, rows, columns = (4, 6), slice(1, 3), slice(1, 6)
    whole = content(grid, batch=1)
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[rows, columns] = True
    inside = inside.flatten()
    visible = inside.expand(1, 1, 24, 24)
    parts = [t[..., inside, :] for t in (whole.q, whole.k, whole.tokens)]
    encoding = make(name)
    expected = encoding.make_bias(Content(parts[0], parts[1], (2, 5), tokens=parts[2])).dense()
    found = encoding.make_bias(Content(whole.q, whole.k, grid, tokens=whole.tokens, visible=visible)).dense()
    torch.testing.assert_close(found[..., inside, :][..., inside], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in list_encodings() if issubclass(find_encoding(n), AttentionEncoding)])
def test_what_a_hidden_patch_holds_changes_nothing_between_the_others(name):
    visible = torch.ones(12, dtype=torch.bool)
    visible[[2, 7, 8]] = False
    encoding, given = make(name), content(visible=visible.expand(1, 1, 12, 12))
    biases = []
    for change in (0.0, 1.0):
        q, k = (each + change * ~visible[:, None] for each in (given.q, given.k))
        bias = encoding.make_bias(Content(q, k, GRID, tokens=q.transpose(1, 2).flatten(2), visible=given.visible))
        biases.append(torch.zeros(1, 12, 12) if bias is None else bias.dense())
    between = [bias[..., visible, :][..., visible] for bias in biases]
    torch.testing.assert_close(between[0], between[1], rtol=1e-10, atol=1e-10)
