"""What a name that is not known is answered."""

import re

import pytest

from sape2.config import model_config
from sape2.config.names import did_you_mean, nearest, unknown
from sape2.config.recipes import get_detection_recipe, get_recipe

KNOWN = ["train", "evaluate", "explain", "explore", "list"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("trane", "train"), ("Train", "train"), ("eval", "evaluate"), ("lits", "list"), ("exp", "explain")],
)
def test_a_slip_or_a_beginning_is_understood(name, meant):
    assert nearest(name, KNOWN) == [meant]


@pytest.mark.parametrize("name", ["", "zzz", "paint", "x" * 100_000])
def test_what_looks_like_nothing_has_no_suggestion(name):
    assert nearest(name, KNOWN) == []
    assert did_you_mean(name, KNOWN) == ""


def test_the_best_come_first_and_no_more_than_asked_for():
    assert nearest("expl", KNOWN, 3) == ["explore", "explain"]
    assert nearest("expl", KNOWN) == ["explore"]


def test_the_error_says_what_was_meant_and_what_is_known():
    text = str(unknown("command", "lits", KNOWN[-2:], ", no more"))
    assert [part for part in ("command 'lits'", "did you mean list? ", "explore, list, no more") if part not in text] == []
    assert "did you mean" not in str(unknown("command", "zzz", ["list"]))


@pytest.mark.parametrize(
    ("find", "name", "meant", "other"),
    [
        (model_config, "vit_smal", "vit_small", ""),
        (get_recipe, "digit", "digits", ""),
        (get_recipe, "coc", "coco", "sape2 detect .*coco, coco_digits"),
        (get_detection_recipe, "coco_digit", "coco_digits", ""),
        (get_detection_recipe, "cifar", "cifar10", "sape2 train .*digits,.* cifar10"),
    ],
)
def test_models_and_recipes_say_what_was_meant_and_which_command_takes_it(find, name, meant, other):
    with pytest.raises(ValueError, match=re.escape(did_you_mean(name, [meant])) + f".*{other}"):
        find(name)
