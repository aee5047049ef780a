"""The figures of a run folder: the bias of its first test image is drawn from the same record as `explain`."""

import html
import re

import pytest
import torch

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import ImageData, Splits
from sape2.inspect.drawing import Drawing
from sape2.inspect.pictures import pictures
from sape2.models.trained import build_model
from sape2.runs.checkpoint import save_weights
from sape2.runs.run import Run

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def files(folder, encoding):
    """What draws each file, by its name, for an untrained run."""
    config = override(get_recipe("digits"), ["model.depth=2", f"model.encoding={encoding}"])
    run = Run(folder, config)
    run.start()
    save_weights(folder / "model.safetensors", build_model(config))
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(images, torch.tensor([3, 1, 2]), tuple("abcdefghij"), config.data.mean, config.data.std)
    return {path.name: draw for path, draw in pictures(run, lambda: Splits(data, data, data)).items()}


def test_the_bias_of_the_first_test_image_says_its_label_and_the_prediction(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Drawing, "save", lambda drawing, path: saved.append(drawing))
    assert files(tmp_path / "run", "ape+sape2")["bias.png"]() == tmp_path / "run" / "figures" / "bias.png"
    texts = [html.unescape(words) for words in re.findall(r"<text[^>]*>([^<]*)</text>", saved[0].svg())]
    assert texts[0].startswith("First test image: predicted ")
    assert "the first of the test set, labelled d" in " ".join(texts)
    assert {"layer 1: all pairs", "layer 2: all pairs", "Bias from patch a"} <= set(texts)


@pytest.mark.parametrize("encoding", ["ape", "rope", "none"])
def test_a_model_without_a_bias_has_no_picture_of_one(tmp_path, encoding):
    assert set(files(tmp_path / "run", encoding)) == {"curves.png", "confusion.png"}
