"""Synthetic scenes with the label of every patch."""

import pytest
import torch

from sape2.evaluation import scenes
from sape2.evaluation.scenes import GAP, NOISE, make_scenes

GRIDS = [(3, 3), (3, 8), (4, 4), (8, 8), (14, 14)]


def pieces(places):
    """The connected parts (4 neighbours) of a set of (y, x), by flooding."""
    left, found = set(places), []
    while left:
        front, piece = [left.pop()], set()
        while front:
            y, x = front.pop()
            piece.add((y, x))
            front += [n for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)) if n in left]
            left -= set(front)
        found.append(piece)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_type_has_two_segments_that_do_not_touch(grid):
    for labels in make_scenes(20, 3, grid, (2, 2))[1].unflatten(1, grid):
        assert set(labels.unique().tolist()) == {0, 1, 2}
        for label in (1, 2):
            segments = pieces(map(tuple, (labels == label).nonzero().tolist()))
            assert len(segments) == 2
            first, second = segments
            assert min(max(abs(y - v), abs(x - u)) for y, x in first for v, u in second) >= GAP


def test_no_patch_is_mixed_and_shapes_are_those_of_the_model(monkeypatch):
    monkeypatch.setattr(scenes, "NOISE", 0)
    monkeypatch.setattr(
        scenes._Texture, "paint", lambda self, height, width, _: self.colour[:, None, None].repeat(1, height, width)
    )
    images, labels = make_scenes(5, 1, (4, 6), (3, 2))
    assert images.shape == (5, 1, 12, 12)
    assert labels.shape == (5, 24)
    for image, label in zip(images[:, 0], labels.unflatten(1, (4, 6)), strict=True):
        wide = label.repeat_interleave(3, 0).repeat_interleave(2, 1)
        assert [len(image[wide == kind].unique()) for kind in (0, 1, 2)] == [1, 1, 1]


def test_a_seed_gives_the_same_scenes_and_another_seed_others():
    one, again, other = (make_scenes(3, 3, (8, 8), (4, 4), seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(make_scenes(2, 3, (8, 8), (4, 4), 1)[0], one[0][:2])  # the first do not depend on how many


def test_patches_look_more_like_their_own_label_than_like_others():
    """The mean colour of a patch differs within a label by noise and grating, across labels by a standard deviation."""
    images, labels = make_scenes(50, 3, (8, 8), (4, 4))
    colours = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(2).transpose(1, 2)
    apart = torch.cdist(colours, colours)
    same = labels[:, :, None] == labels[:, None]
    assert apart[~same].mean() > 3 * apart[same].mean()
    assert 0.5 < images.std() < 2  # in units of a normalised image
    assert images.mean().abs() < 0.5


def test_there_is_noise_on_all_of_it():
    image = make_scenes(1, 1, (8, 8), (8, 8))[0][0, 0]
    assert (image[:, 1:] - image[:, :-1]).abs().min() > 0
    assert (image[:, 1:] - image[:, :-1]).std() > NOISE


def test_a_grid_without_room_is_refused():
    with pytest.raises(ValueError, match=r"3x3 .*2x8"):
        make_scenes(1, 3, (2, 8), (4, 4))
