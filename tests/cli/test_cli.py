"""The command line as a user meets it: results, and one line for every mistake with nothing changed on disk."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sape2.cli import build_parser, catalogue, main
from sape2.cli.commands import COMMANDS
from sape2.cli.options import resolve
from sape2.config import MODELS, RunConfig, override
from sape2.config.recipes import DETECTION_RECIPES, RECIPES
from sape2.encodings import find_encoding, list_encodings, options_of, parse_encoding
from sape2.encodings.base import AttentionEncoding
from sape2.evaluation import MEASURES
from sape2.models.trained import build_model
from sape2.runs import run as run_module
from sape2.runs.checkpoint import Progress, save_checkpoint, save_weights
from sape2.runs.run import Run
from sape2.studies.probes import TASKS

QUICK = [
    "--epochs",
    "2",
    "--set",
    "model.depth=2",
    "--set",
    "train.precision=fp32",
]  # accelerate keeps one precision for the whole process
CONDITIONS = {"name", "value", "unit", "n", "protocol", "encoding", "model", "data", "split", "seed"}


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAPE2_DEBUG", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, as_users_run_it):
    """(folder, standard output, standard error) of `train digits --json`, two epochs."""
    folder, out, err = tmp_path_factory.mktemp("runs") / "run", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["train", "digits", *QUICK, "--out", str(folder), "--json"]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def tree(folder):
    """Everything below a folder: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def status_of(argv):
    try:
        return main(argv)
    except SystemExit as stop:  # argparse
        return stop.code


def config_of(*argv):
    return resolve(build_parser().parse_args(["train", *argv]))


@pytest.fixture
def mistake(capfd, tmp_path):
    """The line that a command prints: it must be the only one, with exit status 2 and the disk as it was."""

    def line_of(*argv):
        capfd.readouterr()
        before = tree(tmp_path)
        status = status_of(list(map(str, argv)))
        out, err = capfd.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("sape2")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert tree(tmp_path) == before
        return err

    return line_of


def missing(texts, line):
    return [text for text in texts if text not in line]


# --- mistakes in the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trane"], ["'trane'", "did you mean train?", "evaluate", "list"]),
        (["list", "encoding"], ["'encoding'", "encodings", "models", "recipes", "measures"]),
        (["list"], ["encodings", "models", "recipes", "measures"]),
        (["train"], ["RECIPE"]),
        (["train", "digits", "--learning-rate", "1"], ["--learning-rate", "sape2 train --help"]),
        (["train", "digits", "--encodings", "ape"], ["--encodings ape", "did you mean --encoding?", "sape2 train --help"]),
        (["--verson"], ["--verson", "sape2 --help"]),
        (["train", "digits", "--epochs", "many"], ["--epochs", "'many'"]),
        (["train", "digits", "--epochs", "0"], ["train.epochs", "at least 1", "0"]),
        (["train", "digits", "--seed", "-1"], ["seed", "-1"]),
        (["train", "mnist"], ["unknown recipe 'mnist'", *RECIPES]),
        (["train", "coco_digits"], ["sape2 detect coco_digits"]),
        (["train", "digits", "--model", "vit_tiny"], ["unknown model 'vit_tiny'", *MODELS]),
        (["train", "digits", "--encoding", "sape3"], ["unknown encoding 'sape3'", *list_encodings()]),
        (["train", "digits", "--encoding", "ape+"], ["unknown encoding ''"]),
        (["train", "digits", "--encoding", "sape2:cuont=cyclic"], ["no option 'cuont'", "count", "num_positions"]),
        (["train", "digits", "--encoding", "sape2:count=round"], ["sape2:count", "'round'", "cyclic"]),
        (["train", "digits", "--encoding", "rope", "--model", "vit_nano", "--set", "dim=18"], ["rope", "4", "6"]),
        (["train", "digits", "--set", "depht=3"], ["'depht'", "model.depth", "--dry-run"]),
        (["train", "digits", "--set", "lr"], ["key=value", "'lr'"]),
        (["train", "digits", "--set", "lr=fast"], ["train.lr", "'fast'"]),
        (["train", "digits", "--set", "name=x"], ["model.name", "data.name"]),
        (["train", "digits", "--set", "image_size=9"], ["9x9", "2x2", "multiples of 2"]),
        (["train", "digits", "--set", "num_heads=5"], ["dim=96", "num_heads=5"]),
        (["train", "digits", "--set", "num_classes=7"], ["10 classes", "7", "--set model.num_classes=10"]),
        (["train", "digits", "--set", "batch_size=2000"], ["2000", "1295"]),
        (["train", "digits", "--set", "batch_size=63"], ["train.batch_size", "63"]),
        (["train", "digits", "--set", "epochs=3"], ["train.warmup_epochs", "train.epochs", "5.0", "3"]),
        (["train", "digits", "--data", "somewhere"], ["no --data", "'somewhere'"]),
        (["train", "digits", "--dry-run", "--set", "num_heads=5"], ["dim=96", "num_heads=5"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["evaluate", "nowhere", "--split", "train"], ["'train'", "test", "validation"]),
    ],
)
def test_a_mistake_in_the_command_is_told_in_one_line(mistake, argv, named):
    assert missing(named, mistake(*argv)) == []


@pytest.mark.parametrize("argv", [["train", "mnist"], ["trane"], ["train", "digits", "--set", "lr=fast"]])
def test_a_mistake_is_the_same_in_a_process_of_its_own(tmp_path, argv):
    done = subprocess.run([sys.executable, "-m", "sape2", *argv], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SAPE2_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown recipe 'mnist'"):
        main(["train", "mnist"])


# --- mistakes in the data --------------------------------------------------------------------------------------------


def test_no_data_says_what_could_be_given(mistake):
    assert missing(["--data", "parquet", "uoft-cs/cifar10"], mistake("train", "cifar10_budget")) == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_data_that_is_not_there_is_named(mistake, tmp_path, dry):
    line = mistake("train", "cifar10_budget", "--data", tmp_path / "nowhere", *dry)
    assert missing([f"{tmp_path}/nowhere", "hub id"], line) == []


def test_an_empty_data_folder_says_what_should_be_in_it(mistake, tmp_path):
    (tmp_path / "data").mkdir()
    line = mistake("train", "cifar10_budget", "--data", tmp_path / "data", "--out", "run")
    assert missing([f"{tmp_path}/data", "parquet", "cifar-10-batches-py"], line) == []


def test_corrupt_parquet_is_refused(mistake, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"x" * 100)
    (tmp_path / "test.parquet").write_bytes(b"x" * 100)
    assert missing([str(tmp_path), "cannot be read"], mistake("train", "cifar10_budget", "--data", tmp_path)) == []


# --- run folders that cannot be used ---------------------------------------------------------------------------------


def test_evaluate_lists_the_measures(mistake, run):
    assert missing(["unknown measure 'speed'", *MEASURES], mistake("evaluate", run, "--measures", "accuracy,speed")) == []


def commands(folder):
    return {"train": ["train", "digits", *QUICK, "--out", folder], "evaluate": ["evaluate", folder]}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_with_other_files_is_no_run(mistake, tmp_path, command):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert missing([str(folder), "not a run folder", "config.json"], mistake(*commands(folder)[command])) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_study_is_no_run(mistake, tmp_path, command):
    (tmp_path / "study.json").write_text("{}")
    assert missing([str(tmp_path), "is a study", "rows.jsonl"], mistake(*commands(tmp_path)[command])) == []


def test_a_folder_that_cannot_be_made_is_named(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "run"
    assert missing([f"{tmp_path / 'file'} is a file", "--out"], mistake(*commands(folder)["train"])) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_file_is_no_run(mistake, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    assert missing([str(tmp_path / "file"), "is a file"], mistake(*commands(tmp_path / "file")[command])) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_folder_without_config_is_refused(mistake, run, command):
    (run / "config.json").unlink()
    assert missing([str(run), "config.json"], mistake(*commands(run)[command])) == []


@pytest.mark.parametrize(
    ("command", "text", "named"),
    [
        ("train", b"", ["damaged"]),
        ("evaluate", b"", ["damaged"]),
        ("evaluate", b'{"recipe": "digits", "mod', ["damaged"]),
        ("evaluate", b"\xff\xfe\x00", ["damaged"]),
        ("evaluate", b"[1, 2]", ["an object"]),
        ("evaluate", b'{"format": 1, "recipe": "digits"}', ["model"]),
        ("evaluate", b'{"format": 1, "recipe": "digits", "model": {"depht": 3}, "data": {}}', ["model.depht", "depth"]),
    ],
)
def test_a_damaged_config_is_refused(mistake, run, command, text, named):
    (run / "config.json").write_bytes(text)
    assert missing([str(run / "config.json"), *named], mistake(*commands(run)[command])) == []


@pytest.mark.parametrize("checkpoint", [True, False])
def test_evaluate_refuses_an_unfinished_run_and_says_how_to_go_on(mistake, run, checkpoint):
    (run / "model.safetensors").unlink()
    if not checkpoint:
        shutil.rmtree(run / "checkpoint")
    at = ["step 40 of 40", "epoch 2 of 2"] if checkpoint else ["no checkpoint", "2 epochs"]
    told = [str(run), "not finished", *at, "sape2 train digits --epochs 2", f"--out {run}"]
    assert missing(told, mistake("evaluate", run)) == []


def another_model():
    return build_model(override(config_of("digits"), ["model.dim=24", "model.depth=1"]))


def test_evaluate_refuses_the_weights_of_another_model(mistake, run):
    save_weights(run / "model.safetensors", another_model())
    line = mistake("evaluate", run)
    assert missing([str(run / "model.safetensors"), "patch_embed.proj.weight"], line) == []


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_evaluate_refuses_damaged_weights(mistake, run, size):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in mistake("evaluate", run)


def test_evaluate_names_weights_that_are_missing(mistake, run):
    (run / "best.safetensors").unlink()
    assert "best.safetensors" in mistake("evaluate", run, "--weights", "best")


def test_train_does_not_go_on_from_a_checkpoint_of_another_model(mistake, tmp_path):
    folder = tmp_path / "run"
    Run(folder, config_of("digits", *QUICK)).start()
    save_checkpoint(folder, Progress(step=20), another_model(), None, {})
    line = mistake("train", "digits", *QUICK, "--out", folder)
    assert missing([f"{folder}/checkpoint/step-00000020", "patch_embed.proj.weight"], line) == []


def test_train_does_not_go_on_from_a_damaged_checkpoint(mistake, run):
    (run / "model.safetensors").unlink()
    (run / "checkpoint" / "step-00000040" / "progress.json").write_text("{")
    line = mistake("train", "digits", *QUICK, "--out", run)
    assert missing(["step-00000040", "is damaged", "remove it"], line) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], ["seed", "0 there", "1 here"]),
        (["--encoding", "ape"], ["model.encoding", "'ape+sape2' there", "'ape' here"]),
        (["--set", "train.lr=0.5"], ["train.lr", "0.001 there", "0.5 here"]),
        (["--model", "vit_small"], ["model.name", "'vit_nano' there", "'vit_small' here"]),
    ],
)
def test_another_config_in_the_same_folder_is_refused(mistake, run, change, named):
    line = mistake("train", "digits", *QUICK, *change, "--out", run)
    assert missing([str(run), "another run", *named, "--out"], line) == []


@pytest.mark.parametrize("epochs", ["1", "40"])
def test_another_number_of_epochs_is_told_to_be_another_run(mistake, run, epochs):
    line = mistake("train", "digits", *QUICK, "--epochs", epochs, "--out", run)
    assert missing([str(run), "2 epochs", f"{epochs} epochs", "another --out"], line) == []


@pytest.mark.parametrize("text", ["{}{", "3"])
def test_damaged_results_are_named(mistake, run, text):
    (run / "results.jsonl").write_text(text)
    assert missing(["results.jsonl line 1", "JSON"], mistake("train", "digits", *QUICK, "--out", run)) == []


def test_an_encoding_that_cannot_learn_is_refused_before_anything_is_written(mistake):
    line = mistake("train", "digits", *QUICK, "--encoding", "sape2:readout=direct,table_std=0", "--out", "run")
    assert "table_std" in line


# --- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [("encodings", list_encodings()), ("models", [*MODELS]), ("recipes", [*RECIPES]), ("measures", [*MEASURES])],
)
def test_list_shows_everything_as_table_and_as_json(capfd, what, names):
    assert main(["list", what]) == 0
    table = capfd.readouterr()
    assert missing(names, table.out) == []
    assert main(["list", what, "--json"]) == 0
    rows = capfd.readouterr()
    assert missing(names, [json.loads(line).get("name") for line in rows.out.splitlines()]) == []
    assert (table.err, rows.err) == ("", "")


def described(name):
    """What the class of an encoding says of itself, once it is imported, as rows of `list encodings`."""
    encoding = find_encoding(name)
    about = {"slot": "attention" if issubclass(encoding, AttentionEncoding) else "tokens", "source": encoding.source}
    own = {"name": name, "summary": encoding.summary} | about | {"options": options_of(name)}
    return [own, *({"name": f"{name}:{text}", "summary": what} | about for text, what in encoding.variants.items())]


def test_encodings_measures_and_probes_are_listed_as_they_are():
    probes = [{"name": n, "summary": task.summary, "splits": "; ".join(task.splits)} for n, task in TASKS.items()]
    assert catalogue.probes() == probes
    assert catalogue.encodings() == [row for name in list_encodings() for row in described(name)]
    assert catalogue.measures() == [{"name": n, "summary": (m.__doc__ or "").split("\n")[0]} for n, m in MEASURES.items()]


@pytest.mark.parametrize("name", list_encodings())
def test_the_options_that_are_listed_are_those_that_an_error_names(name):
    (row,) = [row for row in catalogue.encodings() if row["name"] == name]
    with pytest.raises(ValueError, match=f": {', '.join(row['options'])}$"):
        parse_encoding(f"{name}:colour=red")


def test_every_recipe_is_listed_with_the_command_that_takes_it(capsys):
    assert main(["list", "recipes", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    commands = {row["name"]: row["command"] for row in rows}
    assert commands == dict.fromkeys(RECIPES, "train") | dict.fromkeys(DETECTION_RECIPES, "detect")


def test_train_prints_rows_on_standard_output_and_progress_on_standard_error(finished):
    folder, out, err = finished
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert missing([f"{folder}: starting", "epoch 1/2", "epoch 2/2", "loss", "images/s"], err) == []


def test_train_writes_the_run_folder(finished):
    folder = finished[0]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.json", "data.json", "model.safetensors", "best.safetensors", "metrics.jsonl", "results.jsonl"}
    wanted |= {f"checkpoint/step-00000040/{name}" for name in ("model.safetensors", "optimizer.pt", "progress.json")}
    wanted |= {f"figures/{name}.png" for name in ("curves", "confusion", "bias")}
    assert {file for file in files if not file.startswith("tensorboard/")} == wanted
    assert any(file.startswith("tensorboard/") for file in files)
    assert json.loads((folder / "config.json").read_text())["train"]["epochs"] == 2
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 20), (2, 40)]


def test_result_rows_say_what_was_measured_on_what(finished):
    rows = [json.loads(line) for line in finished[1].splitlines()]
    assert all(row.keys() >= CONDITIONS for row in rows)
    names = {row["name"] for row in rows}
    assert names == {"accuracy", "top5_accuracy", "loss", "calibration_error", "class_accuracy"}
    assert {row["weights"] for row in rows} == {"last", "best"}
    classes = [row for row in rows if row["name"] == "class_accuracy" and row["weights"] == "last"]
    assert [row["class"] for row in classes] == list("0123456789")
    overall = next(row for row in rows if row["name"] == "accuracy" and row["weights"] == "last")
    assert overall["n"] == sum(row["n"] for row in classes)
    assert overall["value"] == pytest.approx(sum(row["value"] * row["n"] for row in classes) / overall["n"])
    assert overall["value"] > 0.15  # chance is 0.1; two epochs give about 0.3
    assert {(row["encoding"], row["model"], row["data"], row["seed"]) for row in rows} == {
        ("ape+sape2", "vit_nano*", "digits", 0)
    }


@pytest.mark.parametrize("name", ["curves", "confusion", "bias"])
def test_figures_show_something(finished, name):
    with Image.open(finished[0] / "figures" / f"{name}.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 50
        assert np.asarray(image).std() > 10


def test_the_same_command_again_says_that_it_is_finished_and_changes_nothing(capfd, run):
    before = tree(run)
    assert main(["train", "digits", *QUICK, "--out", str(run)]) == 0
    out, err = capfd.readouterr()
    assert f"{run} is finished" in err
    assert missing(["accuracy", "calibration_error", "0.", str(run)], out) == []
    assert tree(run) == before


def test_the_same_command_goes_on_to_the_same_weights(capfd, run, monkeypatch):
    """From the checkpoint of the last epoch, with one look at whose folder it is and on which images.

    Resuming in the middle of a run is tested in test_train.py.
    """
    looks = []
    for name in ("read_config", "other_images"):
        call = getattr(run_module, name)
        monkeypatch.setattr(run_module, name, lambda *given, name=name, call=call: looks.append(name) or call(*given))
    weights, rows = load_file(run / "model.safetensors"), (run / "results.jsonl").read_text()
    for name in ("model.safetensors", "results.jsonl"):
        (run / name).unlink()
    assert main(["train", "digits", *QUICK, "--out", str(run)]) == 0
    assert "going on from step 40" in capfd.readouterr().err
    assert looks == ["read_config", "other_images"]
    again = load_file(run / "model.safetensors")
    assert all((again[name] == weights[name]).all() for name in weights)
    assert (run / "results.jsonl").read_text() == rows


def test_evaluate_again_gives_the_same_rows_and_keeps_one_copy(capfd, run):
    before = (run / "results.jsonl").read_text()
    assert main(["evaluate", str(run), "--json"]) == 0
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [json.loads(line) for line in out.splitlines()] == [row for row in rows if row["weights"] == "last"]
    assert sorted((run / "results.jsonl").read_text().splitlines()) == sorted(before.splitlines())
    assert re.match("accuracy: 14 rows", err)


def test_evaluate_measures_another_split_and_keeps_both(capfd, run):
    before = (run / "results.jsonl").read_text().splitlines()
    assert main(["evaluate", str(run), "--split", "validation", "--weights", "best"]) == 0
    assert "validation" in capfd.readouterr().out
    after = (run / "results.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    new = json.loads(after[len(before)])
    best = max(json.loads(line)["validation_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (new["split"], new["weights"], new["n"], new["value"]) == ("validation", "best", 143, best)


@pytest.mark.parametrize("as_json", [True, False])
def test_dry_run_tells_and_writes_nothing(capfd, tmp_path, as_json):
    assert main(["train", "digits", *QUICK, "--dry-run", "--encoding", "ape", *["--json"] * as_json]) == 0
    out, _ = capfd.readouterr()
    assert list(tmp_path.iterdir()) == []
    told = ["parameters", "macs_per_image", "steps", "seconds_per_step", "expected_minutes"]
    assert missing([*told, "augmentation", "in the training process"], out) == []
    if as_json:
        (line,) = out.splitlines()
        summary = json.loads(line)
        assert (summary["steps"], summary["training_images"], summary["test_images"]) == (40, 1295, 359)
        assert RunConfig.from_dict(summary["config"]) == config_of("digits", *QUICK, "--encoding", "ape")
        assert min(summary[name] for name in told) > 0


def test_dry_run_in_the_folder_of_a_run_leaves_it_alone(run):
    before = tree(run)
    assert main(["train", "digits", *QUICK, "--dry-run", "--out", str(run)]) == 0
    assert tree(run) == before


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [None, ["--help"], ["train", "--help"], ["--version"], ["trane"], []])
def test_the_command_line_answers_without_heavy_libraries(argv):
    code = (
        "import contextlib, io, sys, sape2, sape2.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    {argv!r} is None or sape2.cli.main({argv!r})\n"
        "print([name for name in ('torch', 'timm', 'rich', 'numpy', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("what", ["encodings", "measures", "models", "recipes", "probes"])
def test_lists_need_neither_torch_nor_timm(what):
    code = (
        "import sys, sape2.cli\n"
        f"sape2.cli.main(['list', {what!r}])\n"
        "print([name for name in ('torch', 'timm', 'numpy', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_a_command_the_commands_are_shown(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert missing(["usage: sape2", *COMMANDS], out) == []
    assert err == ""


def test_help_names_every_command_and_option(capsys):
    for argv, names in (
        (["--help"], ["train", "evaluate", "list"]),
        (["train", "--help"], ["--data", "--set", "--dry-run", "--json"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert missing(names, capsys.readouterr().out) == []
