"""The look: an image passes the model once, and the record is what the model computes."""

import pytest
import torch

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.inspect.explain import as_picture, page
from sape2.inspect.explanation import explained
from sape2.inspect.look import look
from sape2.models.trained import build_model


def model_of(encoding, *settings):
    config = override(get_recipe("digits"), ["model.depth=2", f"model.encoding={encoding}", *settings])
    return build_model(config).eval(), config


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("encoding", ["ape+sape2", "cpe+rope", "rpe"])
def test_what_a_page_and_a_picture_show_comes_from_one_pass(encoding, pixels):
    model, config = model_of(encoding)
    passed = []
    for module in (model.patch_embed, *model.blocks):
        module.register_forward_hook(lambda module, *_: passed.append(module))
    found = explained(model, config, pixels, list("abcdefghij"), "digit.png", "a digit")
    page(found)
    as_picture(found)
    assert passed == [model.patch_embed, *model.blocks]


@pytest.mark.parametrize("settings", [("model.pool=class", "model.num_registers=2"), ("model.pool=mean",)])
@pytest.mark.parametrize("encoding", ["ape+sape2", "cpe+rope"])
def test_the_answer_and_the_layers_are_those_of_the_model(encoding, settings, pixels):
    model, _ = model_of(encoding, *settings)
    batch = torch.randn(1, 1, 8, 8)
    seen = look(model.train(), batch, pixels)
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(seen.probabilities, model(batch)[0].double().softmax(-1))
        maps = model.maps(batch)
    first = model.num_prefix_tokens
    for layer, expected in zip(seen.layers, maps, strict=True):
        torch.testing.assert_close(layer.leaving, expected["tokens"][:, first:].double())
        torch.testing.assert_close(layer.among_all, expected["attention"][:, :, first:, first:])
    torch.testing.assert_close(seen.layers[1].before, maps[0]["tokens"])
