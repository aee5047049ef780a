"""What a name that is not known is answered."""

import pytest

from sape2.config import model_config
from sape2.config.names import did_you_mean, nearest, unknown
from sape2.config.recipes import get_detection_recipe, get_recipe

KNOWN = ["train", "evaluate", "explain", "explore", "list"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("trane", "train"), ("Train", "train"), ("eval", "evaluate"), ("lits", "list"), ("exp", "explain"), ("paint", "")],
)
def test_a_slip_or_a_beginning_is_understood(name, meant):
    assert did_you_mean(name, KNOWN) == (f"did you mean {meant}? " if meant else "")


@pytest.mark.parametrize("name", ["", "zzz", "x" * 100_000])
def test_what_looks_like_nothing_has_no_suggestion(name):
    assert nearest(name, KNOWN) == []


def test_the_best_come_first_and_no_more_than_asked_for():
    assert nearest("expl", KNOWN, 3) == ["explore", "explain"]
    assert nearest("expl", KNOWN) == ["explore"]


def test_the_error_says_what_was_meant_and_what_is_known():
    assert str(unknown("command", "lits", KNOWN[-2:], ", no more")) == (
        "unknown command 'lits'; did you mean list? known commands: explore, list, no more"
    )
    assert str(unknown("command", "zzz", ["list"])) == "unknown command 'zzz'; known commands: list"


@pytest.mark.parametrize(
    ("find", "name", "told"),
    [
        (model_config, "vit_smal", "did you mean vit_small?"),
        (get_recipe, "digit", "did you mean digits?"),
        (get_recipe, "coc", "did you mean coco? .* sape2 detect knows coco, coco_digits"),
        (get_detection_recipe, "coco_digit", "did you mean coco_digits?"),
        (get_detection_recipe, "cifar", "did you mean cifar10? .* sape2 train knows digits,.* cifar10"),
    ],
)
def test_models_and_recipes_say_what_was_meant(find, name, told):
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        find(name)
