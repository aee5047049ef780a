"""Where an unfinished run stands, and the command that goes on."""

import json
import re
import shlex

import pytest

from sape2.cli import build_parser
from sape2.cli.options import resolve
from sape2.config import override
from sape2.config.command import train_command
from sape2.config.recipes import RECIPES, get_recipe
from sape2.training.standing import check_finished, where


@pytest.fixture
def begun(tmp_path):
    """A run folder of twelve epochs of five steps, without checkpoints, as `(folder, config)`."""
    config = override(get_recipe("digits"), ["epochs=12"])
    (tmp_path / "config.json").write_text(config.to_json())
    return tmp_path, config


def stands(folder, step, epochs):
    (folder / "checkpoint" / f"step-{step:08d}").mkdir(parents=True)
    rows = [{"epoch": epoch, "step": 5 * epoch} for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("step", "epochs", "told"),
    [
        (3, 0, "step 3,.* epoch 1 of 12"),
        (5, 1, "step 5 of 60,.* epoch 2 of 12"),
        (13, 2, "step 13 of 60,.* epoch 3 of 12"),
        (60, 12, "step 60 of 60,.* epoch 12 of 12"),
    ],
)
def test_steps_are_told_of_steps_and_epochs_of_epochs(begun, step, epochs, told):
    folder, config = begun
    stands(folder, step, epochs)
    assert re.search(told, where(folder, config))
    with pytest.raises(ValueError, match=f"not finished.*{told}.*sape2 train digits"):
        check_finished(folder)


def test_a_run_without_a_checkpoint_says_so(begun):
    assert "12 epochs" in where(*begun)


def test_a_finished_run_passes(begun):
    (begun[0] / "model.safetensors").touch()
    check_finished(begun[0])


def test_a_recipe_that_is_not_known_here_is_not_made_up(begun):
    folder, config = begun
    (folder / "config.json").write_text(config.to_json().replace('"recipe": "digits"', '"recipe": "mine"'))
    with pytest.raises(ValueError, match="sape2 train"):
        check_finished(folder)


CHANGES = [
    "--model vit_micro",
    "--encoding ape",
    "--seed 3",
    "--epochs 7",
    "--set model.dim=48 --set image_size=16",
    "--set augment.policy=none",
]


TOGETHER = " ".join(CHANGES[1:5])
EVERY = [(name, changes) for name in RECIPES if name != "images" for changes in ("", TOGETHER)]  # images asks for a folder


@pytest.mark.parametrize(("recipe", "changes"), [*EVERY, *(("cifar10_budget", change) for change in CHANGES)])
def test_the_command_gives_the_config_that_it_was_written_from(recipe, changes):
    parser = build_parser()
    config = resolve(parser.parse_args(["train", recipe, *changes.split()]))
    command = shlex.split(train_command(config))
    assert command[:2] == ["sape2", "train"]
    assert resolve(parser.parse_args(command[1:])) == config
