"""Tables on other grids: the sums of F.interpolate, also where it, or ONNX's form of it, goes wrong."""

import pytest
import torch
from torch.nn import functional as F

from sape2.encodings import create_encoding
from sape2.encodings.resample import resample


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("old", [(1, 1), (3, 4), (8, 8), (15, 7), (1, 5), (5, 1)])
def test_it_is_the_interpolation_of_pytorch(old, kernel, antialias):
    """Taken along one axis after the other, always as a row: PyTorch's own is wrong on images of one column."""

    def along_rows(image, length):
        size = (image.shape[-2], length)
        return F.interpolate(image.contiguous()[None], size, mode=kernel, align_corners=False, antialias=antialias)[0]

    image = torch.randn(2, *old, dtype=torch.float64)
    for new in ((1, 1), (2, 3), (8, 8), (1, 20), (31, 1), (14, 9)):
        expected = along_rows(along_rows(image, new[1]).mT, new[0]).mT
        torch.testing.assert_close(resample(image, new, kernel, antialias), expected)


@pytest.mark.parametrize("antialias", [True, False])
def test_a_column_is_resampled_as_a_row_is(antialias):
    row = torch.arange(3.0, dtype=torch.float64)[None, None]
    across, down = resample(row, (1, 6), "bilinear", antialias), resample(row.mT, (6, 1), "bilinear", antialias)
    assert across.flatten().tolist() == down.flatten().tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.0]


def test_a_learned_table_tells_the_rows_of_one_column_apart():
    table = create_encoding("ape", 1, 4, (4, 4))
    with torch.no_grad():
        table.table.copy_(torch.arange(4.0)[:, None, None].expand(4, 4, 4))
    assert table.resampled((4, 1))[:, 0, 0].tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_autocast_leaves_it_whole():
    image = torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = resample(image, (7, 6), "bicubic", antialias=True)
    torch.testing.assert_close(found, resample(image, (7, 6), "bicubic", antialias=True), rtol=0, atol=0)
