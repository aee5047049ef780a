"""What a run says of itself: state, progress, the command that made it, and whose folder it is."""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from sape2.cli import build_parser
from sape2.cli.options import resolve
from sape2.config import override
from sape2.config.command import command
from sape2.config.recipes import RECIPES, get_detection_recipe, get_recipe
from sape2.runs.checkpoint import Progress, last_checkpoint, load_checkpoint, save_checkpoint
from sape2.runs.images import other_images
from sape2.runs.rows import write_rows
from sape2.runs.run import Run, trained_in
from sape2.runs.settings import check_no_run
from sape2.training.record import Record, open_board


@pytest.fixture
def begun(tmp_path):
    """A run of twelve epochs of five steps, without checkpoints."""
    run = Run(tmp_path, override(get_recipe("digits"), ["epochs=12"]))
    run.start()
    return run


def stands(folder, step, epochs):
    (folder / "checkpoint" / f"step-{step:08d}").mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", [{"epoch": epoch, "step": 5 * epoch} for epoch in range(1, epochs + 1)])


@pytest.mark.parametrize(
    ("step", "epochs", "told"),
    [
        (3, 0, "at step 3, in epoch 1 of 12"),
        (5, 1, "at step 5 of 60, in epoch 2 of 12"),
        (13, 2, "at step 13 of 60, in epoch 3 of 12"),
        (60, 12, "at step 60 of 60, in epoch 12 of 12"),
    ],
)
def test_steps_are_told_of_steps_and_epochs_of_epochs(begun, step, epochs, told):
    stands(begun.folder, step, epochs)
    assert begun.progress == told
    assert begun.state == "interrupted"
    with pytest.raises(ValueError, match=f"is not finished: {told}; go on with: sape2 train digits"):
        Run.open_finished(begun.folder)


def test_a_run_without_a_checkpoint_says_so(begun):
    assert begun.progress == "no checkpoint yet of its 12 epochs"
    assert begun.reached == "no checkpoint yet"


def test_a_run_is_new_then_interrupted_then_finished(tmp_path):
    run = Run(tmp_path / "run", get_recipe("digits"))
    assert run.state == "new"
    run.start()
    assert run.state == "interrupted"
    run.weights("last").touch()
    assert Run.open_finished(run.folder).state == "finished"


def test_classes_are_named_by_the_images_of_the_run_else_by_number(tmp_path, begun):
    assert begun.class_names is None
    assert begun.classes == list("0123456789")
    named = Run(tmp_path / "named", begun.config)
    split = {"images": 4}
    named.start({"layout": "arrays", "classes": list("abcdefghij"), "train": split, "test": split})
    named.add_results([{"measure": "accuracy", "name": "class_accuracy", "class": "cat", "other_data": "garden"}])
    assert named.classes == list("abcdefghij")


def test_images_are_compared_once_and_others_are_refused(begun, monkeypatch):
    """Once for each fingerprint, whoever asks."""
    split = {"images": 4}
    seen = {"layout": "arrays", "classes": [], "train": split, "test": split}
    begun.check_images(seen)  # nothing is known yet
    begun.start(seen)
    compared = []
    monkeypatch.setattr("sape2.runs.run.other_images", lambda *both: compared.append(both) or other_images(*both))
    for _ in range(3):
        begun.check_images(seen)
    assert len(compared) == 1
    with pytest.raises(ValueError, match=r"saw other images: the number of its test images \(4 there, 5 here\)"):
        begun.check_images(seen | {"test": {"images": 5}})


def test_a_recipe_that_is_not_known_here_is_not_made_up(begun):
    path = begun.folder / "config.json"
    path.write_text(path.read_text().replace('"recipe": "digits"', '"recipe": "mine"'))
    with pytest.raises(ValueError, match="give its sape2 train command again to go on"):
        Run.open_finished(begun.folder)


def test_a_run_that_was_begun_meanwhile_is_seen(tmp_path):
    """Another process makes the folder after this one has looked, before it holds it."""
    run, other = (Run(tmp_path / "run", replace(get_recipe("digits"), seed=seed)) for seed in (0, 1))
    run.check_settings()
    other.start()
    with pytest.raises(ValueError, match=r"holds another run, which differs in seed \(1 there, 0 here\)"):
        run.check_settings()


CHANGES = [
    "--model vit_micro",
    "--encoding ape",
    "--seed 3",
    "--epochs 7",
    "--set model.dim=48 --set image_size=16",
    "--set augment.policy=none",
]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "images"])  # which asks for a folder of images
@pytest.mark.parametrize("changes", ["", *CHANGES, " ".join(CHANGES[1:5])])
def test_the_command_gives_the_config_that_it_was_written_from(recipe, changes):
    parser = build_parser()
    config = resolve(parser.parse_args(["train", recipe, *changes.split()]))
    words = shlex.split(command(config))
    assert words[:2] == ["sape2", "train"]
    assert resolve(parser.parse_args(words[1:])) == config


def test_commands_that_measure_at_once_lose_no_row(tmp_path):
    run = Run(tmp_path, get_recipe("digits"))
    about = {"split": "test", "weights": "last", "name": "n", "value": 1.0}
    with ThreadPoolExecutor(8) as several:
        list(several.map(lambda number: run.add_results([about | {"measure": f"m{number}"}]), range(40)))
    assert {row["measure"] for row in run.results()} == {f"m{number}" for number in range(40)}
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_run_that_went_on_in_another_precision_says_both():
    epochs = [{"precision": "bf16"}, {"precision": "bf16"}, {"precision": "fp32"}, {}]
    assert trained_in(epochs) == "bf16, then fp32"
    assert trained_in(epochs[:2]) == "bf16"
    assert trained_in([{}]) is None


def test_going_on_elsewhere_is_told(begun, capfd):
    write_rows(begun.folder / "metrics.jsonl", [{"epoch": 1, "step": 5, "precision": "bf16", "device": "cuda"}])
    record = Record(begun, is_main=True, quiet=False)
    record.tell_change({"precision": "bf16", "device": "cuda"})
    assert capfd.readouterr().err == ""
    record.tell_change({"precision": "fp32", "device": "cuda"})
    assert "precision bf16 so far, fp32 from here on" in capfd.readouterr().err


def test_repeated_epochs_count_once_in_tensorboard(begun):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, value in ((0, 1.0), (1, 2.0)):  # interrupted in epoch 3, and begun again with epoch 2
        board = open_board(begun.folder, done)
        for epoch in range(done + 1, 4 if done else 3):
            board.add_scalar("loss", value, epoch)
        board.close()
    events = accumulator.EventAccumulator(str(begun.folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"library_name": "sape2", "format": 1, "model": {}}, "exported model"),
        ({"model_type": "vit"}, "another program"),
        (get_detection_recipe("coco_digits").to_dict() | {"format": 1}, "sape2 detect"),
    ],
)
def test_a_folder_of_another_kind_is_named_as_what_it_is(tmp_path, values, said):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        Run.open(tmp_path)
    with pytest.raises(ValueError, match="folder of a run or a model"):
        check_no_run(tmp_path)


@pytest.mark.parametrize("written", ['{"step": 2}', '{"step": "1"}', '{"step": 1, "sums": null}'])
def test_progress_of_another_step_is_damage(tmp_path, written):
    model = torch.nn.Linear(1, 1)
    save_checkpoint(tmp_path, Progress(1), model, None, {"optimizer": {}})
    checkpoint = last_checkpoint(tmp_path)
    assert load_checkpoint(checkpoint, model, None)[0] == Progress(1)
    (checkpoint / "progress.json").write_text(written)
    with pytest.raises(ValueError, match=r"step-00000001 is damaged.*remove it to start again"):
        load_checkpoint(checkpoint, model, None)
