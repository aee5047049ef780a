"""Synthetic scenes with true masks, labels of patches from masks, and colour clusters."""

import pytest
import torch

from sape2.evaluation.base import LabelledImages
from sape2.evaluation.masks import colour_clusters, patch_labels
from sape2.evaluation.scenes import GAP, NOISE, make_scenes

GRIDS = [(3, 3), (3, 8), (4, 4), (8, 8), (14, 14)]


def patches_of(scenes, grid):
    return patch_labels(scenes.masks, grid).unflatten(1, grid)


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
    for labels in patches_of(make_scenes(20, 3, grid, (2, 2)), grid):
        assert set(labels.unique().tolist()) == {0, 1, 2}
        for label in (1, 2):
            segments = pieces(map(tuple, (labels == label).nonzero().tolist()))
            assert len(segments) == 2
            first, second = segments
            assert min(max(abs(y - v), abs(x - u)) for y, x in first for v, u in second) >= GAP


def test_no_patch_is_mixed_and_shapes_are_those_of_the_model():
    scenes = make_scenes(5, 1, (4, 6), (3, 2))
    assert scenes.images.shape == (5, 1, 12, 12)
    assert scenes.masks.shape == (5, 12, 12)
    assert (patches_of(scenes, (4, 6)).repeat_interleave(3, 1).repeat_interleave(2, 2) == scenes.masks).all()


def test_a_seed_gives_the_same_scenes_and_another_seed_others():
    scenes, again, other = (make_scenes(3, 3, (8, 8), (4, 4), seed) for seed in (1, 1, 2))
    assert torch.equal(scenes.images, again.images)
    assert torch.equal(scenes.masks, again.masks)
    assert not torch.equal(scenes.images, other.images)
    assert torch.equal(make_scenes(2, 3, (8, 8), (4, 4), 1).images, scenes.images[:2])  # the first do not depend on how many


def test_patches_look_more_like_their_own_label_than_like_others():
    """The mean colour of a patch differs within a label by noise and grating, across labels by a standard deviation."""
    scenes = make_scenes(50, 3, (8, 8), (4, 4))
    labels = patch_labels(scenes.masks, (8, 8))
    colours = scenes.images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(2).transpose(1, 2)
    apart = torch.cdist(colours, colours)
    same = labels[:, :, None] == labels[:, None]
    assert apart[~same].mean() > 3 * apart[same].mean()
    assert 0.5 < scenes.images.std() < 2  # in units of a normalised image
    assert scenes.images.mean().abs() < 0.5


def test_there_is_noise_on_all_of_it():
    image = make_scenes(1, 1, (8, 8), (8, 8)).images[0, 0]
    assert (image[:, 1:] - image[:, :-1]).abs().min() > 0
    assert (image[:, 1:] - image[:, :-1]).std() > NOISE


def test_a_grid_without_room_is_refused():
    with pytest.raises(ValueError, match=r"3x3 .*2x8"):
        make_scenes(1, 3, (2, 8), (4, 4))


def test_scenes_are_a_data_set():
    assert isinstance(make_scenes(5, 3, (4, 4), (2, 2)), LabelledImages)


def test_a_patch_has_the_label_of_more_than_half_of_its_pixels():
    mask = torch.tensor([[7, 7, 1, 1], [7, 0, 2, 2], [-1, -1, 5, 6], [-1, -1, 6, 6]])
    assert patch_labels(mask[None], (2, 2)).tolist() == [[7, -1, -1, 6]]


def literal_clusters(colours):
    """2-means of a list of colours by the book."""
    total = [float(colour.sum()) for colour in colours]
    centres = [colours[total.index(min(total))], colours[total.index(max(total))]]
    labels = None
    while True:
        now = [0 if (c - centres[0]).square().sum() <= (c - centres[1]).square().sum() else 1 for c in colours]
        if now == labels:
            return labels
        labels = now
        for cluster in (0, 1):
            members = [c for c, label in zip(colours, labels, strict=True) if label == cluster]
            centres[cluster] = torch.stack(members).mean(0) if members else centres[cluster]


def test_colour_clusters_against_the_literal_loop():
    images = torch.randn(8, 3, 12, 8, dtype=torch.float64)
    found = colour_clusters(images, (4, 4))
    for image, labels in zip(images, found, strict=True):
        colours = [image[:, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2].mean((1, 2)) for y in range(4) for x in range(4)]
        assert labels.tolist() == literal_clusters(colours)


def test_colour_clusters_find_a_bright_square_and_nothing_in_a_flat_image():
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, 2:4, 4:8] = 1.0
    assert colour_clusters(images, (4, 4)).unflatten(1, (4, 4)).nonzero().tolist() == [[0, 1, 2], [0, 1, 3]]
