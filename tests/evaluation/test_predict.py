"""`sape2 predict`: the answers of evaluation for files without labels, a row for each, whatever else lies beside them."""

import csv
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from image_cases import ORIENTATION, colours, png_of_16_bits
from own_cases import fill, finished_run
from PIL import Image

from sape2.cli import main
from sape2.cli.commands import predict as command
from sape2.data import load_data
from sape2.evaluation import accuracy, predictions
from sape2.evaluation.predictions import find_images, predict_files
from sape2.models.trained import load_run_model
from sape2.runs.run import Run

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Images of the sizes and kinds that folders hold, beside what is no image."""
    folder = tmp_path_factory.mktemp("images") / "mine"
    fill(folder / "train", {"cat": 4, "dog": 4, "eel": 4}, (40, 30))
    fill(folder / "test", {"cat": 3, "dog": 2, "eel": 2}, (50, 30))
    Image.fromarray(colours(33, 47)).save(folder / "test" / "cat" / "photo.JPG")
    turned = Image.fromarray(colours(40, 32))
    turned.getexif()[ORIENTATION] = 6
    turned.save(folder / "test" / "dog" / "turned.jpg", exif=turned.getexif())
    deep = np.random.default_rng(1).integers(65536, size=(24, 24), dtype=np.uint16)
    (folder / "test" / "eel" / "deep.png").write_bytes(png_of_16_bits(deep))
    (folder / "test" / "eel" / "notes.txt").write_text("no image")
    (folder / "test" / "eel" / ".hidden.png").write_bytes(b"no image")
    (folder / "test" / ".cache").mkdir()
    (folder / "test" / ".cache" / "a.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def run(mine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finished_run(folder, mine, "data.center_crop=0.8")
    return folder


@pytest.fixture
def predicted(run, capfd):
    """(status, rows on standard output, standard error) of the command with --json."""

    def answer(*words):
        capfd.readouterr()
        status = main(["predict", str(run), *map(str, words), "--json"])
        out, err = capfd.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return answer


# --- the answers -----------------------------------------------------------------------------------------------------


def test_a_folder_gets_the_answers_that_evaluate_counts(run, mine):
    held, files = Run.open_finished(run), find_images([mine / "test"])
    config = held.config
    assert config.data.center_crop == 0.8
    test = load_data(config.data, config.model).test
    order = sorted(range(len(files)), key=lambda i: (files[i].name, str(files[i])))  # as the folder layout numbers them
    expected = accuracy.predict(load_run_model(held), test, 500).double().softmax(1)
    rows = predict_files(held, [files[i] for i in order], top=3).rows
    found = torch.zeros(len(order), 3, dtype=torch.float64)
    for number, row in enumerate(rows):
        found[number // 3, test.classes.index(row["class"])] = row["probability"]
    assert len(files) == len(test) == 10
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert [row["rank"] for row in rows[:3]] == [1, 2, 3]
    assert [row["class"] for row in rows[::3]] == [test.classes[label] for label in expected.argmax(1).tolist()]


def test_files_are_tried_whatever_their_ending_and_each_once(run, mine, predicted, tmp_path):
    odd = tmp_path / "photo.dat"
    shutil.copy(mine / "test" / "cat" / "0.png", odd)
    files = [mine / "test" / "cat" / "0.png", odd, mine / "test" / "cat", mine / "test" / "dog" / ".." / "cat"]
    status, rows, err = predicted(*files)
    assert status == 0
    assert [row["file"] for row in rows] == [
        str(path) for path in (*files[:2], *(mine / "test" / "cat" / name for name in ("1.png", "2.png", "photo.JPG")))
    ]
    assert rows[0]["probability"] == pytest.approx(rows[1]["probability"], abs=1e-6)
    assert rows[0].keys() == {"file", "class", "probability"}
    assert err == ""


def test_folders_are_looked_through_in_order_without_what_is_hidden(mine, tmp_path):
    (tmp_path / "again").symlink_to(mine / "test")
    (tmp_path / "circle").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path / "again")) for path in find_images([tmp_path])]
    assert found == [
        "cat/0.png", "cat/1.png", "cat/2.png", "cat/photo.JPG", "dog/0.png", "dog/1.png", "dog/turned.jpg",
        "eel/0.png", "eel/1.png", "eel/deep.png",
    ]  # fmt: skip


def test_more_classes_than_there_are_give_all(predicted, mine):
    _, rows, _ = predicted(mine / "test" / "cat" / "0.png", "--top", 9)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert sum(row["probability"] for row in rows) == pytest.approx(1)


def test_batches_are_halved_until_they_fit(run, mine, monkeypatch):
    held, files = Run.open_finished(run), find_images([mine / "test"])
    expected, tried = predict_files(held, files).rows, []

    def model(images):
        tried.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError
        return load(images)

    load = load_run_model(held)
    model.parameters, model.buffers, model.modules, model.eval = load.parameters, load.buffers, load.modules, load.eval
    monkeypatch.setattr(predictions, "load_run_model", lambda *_: model)
    monkeypatch.setattr(predictions, "predict", partial(accuracy.predict, batch_size=8))
    found = predict_files(held, files).rows
    assert tried == [8, 4, 4, 2]
    assert [row["class"] for row in found] == [row["class"] for row in expected]
    assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in expected], abs=1e-6)


# --- files and tables ------------------------------------------------------------------------------------------------


def test_a_csv_file_holds_any_name(run, mine, tmp_path, capfd):
    for name in ('a "b", c.png', "new\nline.png", "[red]x.png", os.fsdecode(b"caf\xe9.png")):
        shutil.copy(mine / "test" / "cat" / "0.png", tmp_path / name)
    assert main(["predict", str(run), str(tmp_path), "--out", str(tmp_path / "out" / "all.csv"), "--top", "2"]) == 0
    with (tmp_path / "out" / "all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"].removeprefix(f"{tmp_path}/") for row in rows} == {
        'a "b", c.png', "new\nline.png", "[red]x.png", "caf\\xe9.png"
    }  # fmt: skip
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    assert len(rows) == 8
    out = capfd.readouterr().out
    assert "[red]x.png" in out
    assert f"written: {tmp_path}/out/all.csv" in out


def test_a_json_file_holds_the_rows_that_are_printed(predicted, mine, tmp_path):
    _, rows, _ = predicted(mine / "test", "--out", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == rows
    assert len(rows) == 10


def test_of_many_images_the_table_counts_classes(run, mine, monkeypatch, capfd):
    monkeypatch.setattr(command, "MANY", 9)
    assert main(["predict", str(run), str(mine / "test")]) == 0
    out, err = capfd.readouterr()
    assert "mean probability" in out
    assert "every row: --out FILE.csv" in out
    assert "photo.JPG" not in out
    assert err == ""


def test_images_unlike_the_training_images_are_counted(run, mine, tmp_path, predicted):
    Image.new("RGB", (200, 30), "grey").save(tmp_path / "flat.png")
    Image.fromarray(colours(30, 200)).save(tmp_path / "wide.png")
    shutil.copy(mine / "test" / "cat" / "0.png", tmp_path)
    status, rows, err = predicted(tmp_path)
    assert (status, len(rows)) == (0, 3)
    told = (
        "2 of 3 images are unlike the training images: 2 of other proportions, 1 nearly flat; sape2 explain has the numbers\n"
    )
    assert err == told


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named_and_the_others_have_rows(predicted, mine, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(mine / "test" / "cat", mixed)
    (mixed / "0.png").write_bytes(b"not an image")
    (mixed / "gone.png").symlink_to(tmp_path / "nowhere.png")
    status, rows, err = predicted(mixed, "--out", tmp_path / "rows.csv")
    assert status == 2
    assert [row["file"].rpartition("/")[2] for row in rows] == ["1.png", "2.png", "photo.JPG"]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 4
    wanted = (f"{mixed}/0.png", f"{mixed}/gone.png", "2 of 5 files")
    assert [part in line for part, line in zip(wanted, err.splitlines(), strict=True)] == [True] * 3


def test_of_many_files_that_cannot_be_read_ten_are_named(predicted, mine, tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    status, rows, err = predicted(tmp_path, mine / "test" / "cat" / "0.png")
    assert (status, len(rows)) == (2, 1)
    assert len(err.splitlines()) == 11
    assert "12 of 13 files" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty"], "no image in empty"),
        (["nowhere.png"], "nowhere.png"),
        (["bad.png"], "bad.png"),
        (["good.png", "--out", "rows.txt"], "rows.txt"),
        (["good.png", "--out", "folder.csv"], "folder.csv"),
        (["good.png", "--out", "{run}/config.json"], "config.json belongs to the run"),
        (["good.csv", "--out", "good.csv"], "good.csv is read by this command"),
        (["good.png", "--top", "0"], "--top"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, tmp_path, monkeypatch, capfd, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad.png").write_bytes(b"")
    for name in ("good.png", "good.csv"):
        Image.fromarray(colours()).save(tmp_path / name, "PNG")
    assert main(["predict", str(run), *(word.format(run=run) for word in words)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_run_that_is_not_finished_or_not_there_is_told_in_one_line(run, mine, tmp_path, capfd):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("model.safetensors"))
    for folder, message in ((begun, "not finished"), (tmp_path / "nowhere", f"{tmp_path}/nowhere")):
        assert main(["predict", str(folder), str(mine)]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err


def test_a_run_of_another_reading_rule_is_noted(run, mine, tmp_path, capfd):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    seen = json.loads((old / "data.json").read_text())
    (old / "data.json").write_text(json.dumps(seen | {"reading_rule": 1}))
    assert main(["predict", str(old), str(mine / "test" / "cat" / "0.png"), "--weights", "best"]) == 0
    assert "rule 1" in capfd.readouterr().err


def test_a_folder_of_runs_is_told_which_runs_it_holds(run, mine, capfd):
    assert main(["predict", str(run.parent), str(mine)]) == 2
    assert capfd.readouterr().err.endswith(f" {run}?\n")
