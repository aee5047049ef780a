"""The recipe `images`: what a folder of one's own says about a run, the same each time, and one line where it cannot."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_cases import file_of, picture, shard_of, write_parquet
from own_cases import fill

from sape2.cli import build_parser, main
from sape2.cli.options import default_name, resolve
from sape2.config import DataConfig, ModelConfig
from sape2.data import load_data, open_sources
from sape2.data.images import class_split
from sape2.runs.run import Run
from sape2.studies.compare.plan import Study


@pytest.fixture(autouse=True)
def _as_users_run_it(as_users_call_it):
    """The commands get what a user types."""


def config_of(folder, *options):
    return resolve(build_parser().parse_args(["train", "images", "--data", str(folder), *options]))


def test_class_folders_alone_are_enough(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 20, "dog": 20, ".hidden": 3})
    (folder / "cat" / ".00.png").write_bytes(b"no image")
    (folder / "dog" / "notes.txt").write_text("no image")
    config = config_of(folder)
    model, data = config.model, config.data
    assert (model.image_size, model.patch_size, model.in_channels, model.num_classes) == ((32, 32), 4, 3, 2)
    assert (data.name, data.layout, data.test_fraction, len(data.mean)) == ("mine", "folder", 0.2, 3)
    assert list(data.mean) == pytest.approx([0.5] * 3, abs=0.02)
    splits = load_data(config.data, config.model)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [28, 4, 8]
    assert splits.test.labels.bincount().tolist() == [4, 4]
    assert len(splits.train) // config.train.batch_size >= 5
    err = capfd.readouterr().err
    for words in (
        "mine: 2 classes (cat, dog), colour, median image 30x34",
        "28 images to train",
        "8 to test",
        "32x32 in patches",
    ):
        assert words in err
    assert default_name(config) == "images-mine-vit_nano-ape+sape2-s0"


def test_the_same_folder_says_the_same_and_settings_win(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 9, "dog": 9})
    assert config_of(folder) == config_of(folder)
    changed = config_of(folder, "--set", "image_size=64", "--set", "patch_size=8", "--set", "data.mean=[0.5,0.5,0.5]")
    assert (changed.model.image_size, changed.data.mean) == ((64, 64), (0.5, 0.5, 0.5))
    assert capfd.readouterr().err.splitlines()[-1].startswith("resized to 64x64 in patches of 8; ")


@pytest.mark.parametrize(
    ("size", "patch", "side"), [((8, 9), 4, 32), ((50, 60), 8, 64), ((100, 300), 8, 96), ((300, 200), 16, 224)]
)
def test_the_model_has_the_size_of_the_median_image(tmp_path, size, patch, side):
    model = config_of(fill(tmp_path / "mine", {"cat": 3, "dog": 3}, size)).model
    assert (model.image_size, model.patch_size) == ((side, side), patch)


def test_what_says_how_a_folder_is_read_holds_before_it_is_looked_at(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 9, "dog": 9})
    shard_of(folder / "backup.tar", 3)
    with pytest.raises(ValueError, match=r"--set data\.layout=folder"):
        config_of(folder)
    assert config_of(folder, "--set", "data.layout=folder").data.layout == "folder"
    assert capfd.readouterr().err.count("1 file is left out, backup.tar") <= 1


def test_grey_images_get_one_channel(tmp_path):
    config = config_of(fill(tmp_path / "mine", {"cat": 3, "dog": 3}, mode="L"))
    assert (config.model.in_channels, len(config.data.std)) == (1, 1)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_set_that_is_there_is_taken_as_it_is(tmp_path, name):
    folder = tmp_path / "digits"  # a name that is also a data set's
    fill(folder / "train", {"cat": 8, "dog": 8})
    fill(folder / name, {"cat": 3, "dog": 2})
    config = config_of(folder)
    assert config.data.test_fraction is None
    assert len(load_data(config.data, config.model).test) == 5


def test_a_training_set_without_a_test_set_is_split(tmp_path):
    fill(tmp_path / "mine" / "train", {"cat": 10, "dog": 10})
    config = config_of(tmp_path / "mine")
    splits = load_data(config.data, config.model)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
    test = {image.numpy().tobytes() for image in splits.test.images}
    assert not test & {image.numpy().tobytes() for image in splits.train.images}


def test_a_training_set_alone_is_split_in_every_layout(tmp_path):
    write_parquet(tmp_path / "rows" / "train.parquet", [file_of(picture(row)) for row in range(30)], [0, 1, 2] * 10)
    shard_of(tmp_path / "shards" / "train.tar", 30)
    for name in ("rows", "shards"):
        config = config_of(tmp_path / name)
        splits = load_data(config.data, config.model)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (21, 3, 6)
        with pytest.raises(ValueError, match=r"found train; data.test_fraction=0.2 draws a test set"):
            load_data(replace(config.data, test_fraction=None), config.model)


def test_a_test_set_whose_answers_are_kept_back_can_be_replaced(tmp_path):
    shard_of(tmp_path / "shards" / "train.tar", 30)
    shard_of(tmp_path / "shards" / "test.tar", 30, label=lambda number: -1)
    fill(tmp_path / "folders" / "train", {"cat": 10, "dog": 10})
    fill(tmp_path / "folders" / "test", {"": 10})
    for name, fraction, sizes in (("shards", 0.2, (21, 3, 6)), ("folders", 0.5, (8, 2, 10))):
        with pytest.raises(ValueError, match=r"no labels in test.*data\.test_fraction=0\.2 draws a test set"):
            config_of(tmp_path / name)
        config = config_of(tmp_path / name, "--set", f"data.test_fraction={fraction}")
        splits = load_data(config.data, config.model)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes


def test_the_words_speak_of_the_fractions_that_are_set(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 20, "dog": 20})
    config_of(folder, "--set", "data.test_fraction=0.5", "--set", "data.validation_fraction=0.3")
    told = capfd.readouterr().err
    assert "14 images to train, 6 to validate (30% of each class, seed 0) and 20 to test (50% of each class" in told


def test_a_class_that_a_drawn_test_set_takes_whole_is_named(tmp_path):
    shard_of(tmp_path / "mine" / "train.tar", 10, label=lambda number: number // 9)
    with pytest.raises(ValueError, match=r"the class '1' has 1 image; training, validation and test need one each"):
        config_of(tmp_path / "mine")
    data = DataConfig("mine", str(tmp_path / "mine"), test_fraction=0.2)
    with pytest.raises(ValueError, match=r"none is there to train on: 1; training, validation and test need"):
        load_data(data, ModelConfig(num_classes=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no images"),
        (lambda folder: fill(folder, {"": 5}), "DIR/CLASS/*.jpg"),
        (lambda folder: fill(folder, {"cat": 5}), "the one class 'cat'"),
        (lambda folder: fill(folder, {"cat": 5, "dog": 2}), "the class 'dog' has 2 images"),
        (lambda folder: fill(folder, {"cat": 1, "dog": 1}), "the class 'cat' has 1 image"),
        (lambda folder: fill(folder, {"cat": 5, "dog": 0}), "the class 'dog' has 0 images"),
        (lambda folder: folder.write_text(""), "is a file"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_told_in_one_line(tmp_path, capfd, make, message):
    make(tmp_path / "mine")
    assert main(["train", "images", "--data", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_images_without_data_say_what_they_need(capfd):
    assert main(["train", "images"]) == 2
    assert "images needs --data" in capfd.readouterr().err


def test_other_recipes_say_how_class_folders_are_split(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 3, "dog": 3})
    assert main(["train", "cifar10", "--data", str(folder), "--dry-run", "--set", "num_classes=2"]) == 2
    assert "--set data.test_fraction=0.2" in capfd.readouterr().err


def test_a_test_fraction_beside_a_test_set_is_refused(tmp_path, capfd):
    for split in ("train", "test"):
        fill(tmp_path / "mine" / split, {"cat": 4, "dog": 4})
    command = ["train", "images", "--data", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]
    assert main([*command, "--set", "data.test_fraction=0.3"]) == 2
    assert "data.test_fraction" in capfd.readouterr().err


def test_a_damaged_image_is_named_once_and_does_not_end_the_run(tmp_path, caplog):
    folder = fill(tmp_path / "mine", {"cat": 20, "dog": 20}, (8, 8))
    damaged = folder / "cat" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    config = config_of(folder)
    load_data(config.data, config.model)
    assert [line.split(":")[0] for line in caplog.messages] == ["skipped in test (1 of at most 1)"]
    assert str(damaged) in caplog.text


def test_a_class_whose_only_validation_image_is_damaged_is_told_in_one_line(tmp_path, capfd):
    folder = fill(tmp_path / "mine", {"cat": 6, "dog": 6}, (8, 8))
    data = config_of(folder).data
    train = open_sources(data, ModelConfig())["train"]
    row = class_split(torch.tensor(train.labels), data.validation_fraction, data.split_seed)[1][0]
    damaged = Path(train.name(int(row)))
    damaged.write_bytes(b"no image")
    assert main(["train", "images", "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("sape2:")]) == 1
    assert f"no image of the class {damaged.parent.name!r}" in told[-1]
    assert str(damaged) in told[-1]


def test_the_same_folder_goes_on_with_a_run_and_a_changed_one_does_not(tmp_path):
    folder = fill(tmp_path / "mine", {"cat": 6, "dog": 6}, (8, 8))

    def start(*settings):
        config = config_of(folder, *settings)
        run = Run(tmp_path / "run", config)
        run.check_settings()
        seen = load_data(config.data, config.model).train.fingerprint
        run.check_images(seen)
        run.start(seen)
        return config

    config = start()
    Study(config, ("ape",), 1, tmp_path / "study").start()
    assert Run.open(tmp_path / "run").config == config == start()
    shutil.copy(folder / "cat" / "0.png", folder / "dog" / "new.png")
    with pytest.raises(ValueError, match=r"the folder 'mine' have changed.* data\.mean "):
        start()
    with pytest.raises(ValueError, match=r"another study.*the folder 'mine'"):
        Study(config_of(folder), ("ape",), 1, tmp_path / "study").start()
    with pytest.raises(ValueError, match="number of its train images"):
        start("--set", f"data.mean={list(config.data.mean)}", "--set", f"data.std={list(config.data.std)}")


def test_what_sape2_wrote_below_the_images_is_no_class(tmp_path, caplog):
    data = fill(tmp_path / "data", {"cat": 12, "dog": 12})
    words, model = ["train", "images", "--data", str(data)], ModelConfig(num_classes=2)
    before = load_data(resolve(build_parser().parse_args(words)).data, model)
    for name in ("runs/one", "runs/report", "cat/runs/two"):
        fill(data / name, {"figures": 4})
    for name in ("runs/one/metrics.jsonl", "runs/report/report.csv", "cat/runs/two/results.jsonl"):
        (data / name).write_text("")
    config = resolve(build_parser().parse_args(words))
    assert config.model.num_classes == 2
    assert load_data(config.data, model).train.fingerprint == before.train.fingerprint
    assert "written by sape2: cat/runs/two, runs/one, runs/report" in caplog.text
