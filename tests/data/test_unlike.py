"""In what an image is unlike the training images: a sentence with numbers beyond each limit, none just within it."""

import numpy as np
import pytest
import torch
from own_cases import fill, finished_run
from PIL import Image

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import load_data
from sape2.data.picture import COLOUR, Picture, read_picture, unlike
from sape2.runs.run import Run

DIGITS = get_recipe("digits")
RGB = override(DIGITS, ["image_size=16", "in_channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]"])


@pytest.fixture
def found(tmp_path, as_users_call_it):
    """What is said of pixels in a file, by the name of the rule."""

    def say(pixels, config=RGB, trained=((16, 16),)):
        path = tmp_path / "image.png"
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
        return {each.name: each.sentence for each in unlike(read_picture(path, config.model), config.data, list(trained))}

    return say


def check(found, said):
    """The names of the rules, and the numbers and words that each sentence must hold."""
    assert found.keys() == said.keys()
    assert [part for name, parts in said.items() for part in parts if part not in found[name]] == []


def noise(height=16, width=16, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, size=(height, width, 3))


def tinted(pixels):
    """Grey squares, 20x20, of which the first `pixels` are coloured as little as counts; all others as much as does not."""
    image = np.repeat(noise(4, 4, 0, 200)[..., :1], 3, axis=2).repeat(5, 0).repeat(5, 1)
    image[..., 0] += COLOUR
    image.reshape(400, 3)[:pixels, 0] += 1
    return image


def test_colour_that_a_grey_model_does_not_see(found):
    assert found(tinted(4), DIGITS, [(20, 20)]) == {}  # 1 %
    check(found(tinted(8), DIGITS, [(20, 20)]), {"colour": ["2%", "grey"]})
    assert found(tinted(400), RGB, [(20, 20)]) == {}


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((256, 256), {}),
        ((260, 260), {"size": ["260x260", "16x16", "16 times larger"]}),
        ((4, 4), {}),
        ((3, 3), {"size": ["3x3", "16x16", "5 times smaller"]}),
        ((16, 32), {}),
        ((16, 34), {"proportions": ["34x16", "16x16", "2.1 times"]}),
        ((34, 16), {"proportions": ["16x34", "16x16", "2.1 times"]}),
    ],
)
def test_size_and_proportions(size, said):
    picture = Picture(torch.from_numpy(noise().astype(np.uint8)).permute(2, 0, 1), size, 0.0)
    check({each.name: each.sentence for each in unlike(picture, RGB.data, [(16, 16)])}, said)


def test_large_photographs_are_nothing_special_where_training_images_were_large(found):
    photograph = noise(10, 10).repeat(20, 0).repeat(30, 1)
    assert found(photograph, trained=[(8, 9), (240, 260), (2, 900)]) == {}
    assert found(photograph, trained=[(4, 5), (8, 9)]).keys() == {"size"}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (196, 232, {}),
        (206, 240, {"brightness": ["brighter", "1.9"]}),
        (24, 59, {}),
        (16, 50, {"brightness": ["darker", "1.9"]}),
        (100, 156, {}),
        (120, 136, {"contrast": ["0.09 times"]}),
    ],
)
def test_brightness_and_contrast(found, low, high, said):
    spread = np.tile([[[low] * 3], [[high] * 3]], (8, 16, 1))
    pixels = spread if not said or "brightness" in said else noise(low=low, high=high)
    check(found(pixels), said)


def test_digits_are_like_digits():
    images = load_data(DIGITS.data, DIGITS.model).test.images
    flagged = [pixels for pixels in images if unlike(Picture(pixels, (8, 8), 0.0), DIGITS.data, [(8, 8)])]
    assert len(flagged) <= len(images) / 100


def test_a_photograph_is_unlike_digits(found):
    photograph = noise(480, 640, 40, 110)
    assert found(photograph, DIGITS, [(8, 8)]).keys() == {"colour", "size", "contrast"}


def test_a_run_knows_the_sizes_of_its_images_and_shrugs_at_damage(tmp_path, as_users_call_it):
    fill(tmp_path / "mine" / "train", {"cat": 3, "dog": 3}, (30, 40))
    fill(tmp_path / "mine" / "test", {"cat": 1, "dog": 1}, (90, 20))
    finished_run(tmp_path / "run", tmp_path / "mine")
    assert Run.open(tmp_path / "run").image_sizes == [(40, 30)]
    (tmp_path / "run" / "data.json").write_text('{"train": {"sizes": [[0, 3], 4, ["a", 5]]}, "classes": 3}')
    assert Run.open(tmp_path / "run").image_sizes == [(32, 32)]
    assert Run.open(tmp_path / "run").classes == ["0", "1"]
