"""Each file is taken once and in one split: hard links, links in a split, second writings, cards of image folders, shards."""

import os
import re

import pyarrow
import pytest
from layout_cases import MODEL, file_of, picture, shard_of, write_parquet
from pyarrow import parquet

from sape2.config import DataConfig
from sape2.data import load_data, open_sources

PNG = file_of(picture(0, (8, 8)))
WRITE = {
    "parquet": lambda path, n: write_parquet(path, [PNG] * n, [0, 1, 2] * (n // 3), None),
    "tar": lambda path, n, **more: shard_of(path, n, **more),
}
each_ending = pytest.mark.parametrize("ending", WRITE)


def sizes(root):
    return {split: len(source.labels) for split, source in open_sources(DataConfig("tiny", str(root)), MODEL).items()}


def refusal(root):
    with pytest.raises(ValueError, match=str(root)) as error:
        sizes(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def images(root, *names):
    for number, name in enumerate(names):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(picture(number, (8, 8))))
    return root


# --- links -----------------------------------------------------------------------------------------------------------


@each_ending
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_second_link_in_a_split_is_left_out_and_told(tmp_path, ending, link, caplog):
    for name, size in (("train-0", 6), ("test", 3)):
        WRITE[ending](tmp_path / f"{name}.{ending}", size)
    link(tmp_path / f"train-0.{ending}", tmp_path / f"train-1.{ending}")
    assert sizes(tmp_path) == {"train": 6, "test": 3}
    assert f"left out, train-1.{ending}" in caplog.text


@each_ending
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_one_file_in_two_splits(tmp_path, ending, link):
    WRITE[ending](tmp_path / f"train.{ending}", 6)
    link(tmp_path / f"train.{ending}", tmp_path / f"test.{ending}")
    assert f"test.{ending} is train.{ending}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("to", "message"),
    [("test/cat/2.png", "test/cat/2.png is train/cat/1.png"), ("train/dog/2.png", "are one file")],
)
def test_a_hard_link_to_an_image_of_another_split_or_class_is_refused(tmp_path, to, message):
    images(tmp_path, "train/cat/1", "train/dog/1", "test/cat/1", "test/dog/1")
    os.link(tmp_path / "train/cat/1.png", tmp_path / to)
    assert message in refusal(tmp_path)


def test_an_image_that_two_rows_name_is_told_and_one_of_two_splits_refused(tmp_path, caplog):
    images(tmp_path, *(f"img/{number}" for number in range(6)))
    names = {"train": ["img/0.png", "img/1.png", "./img/1.png"], "test": ["img/3.png", "img/4.png", "img/5.png"]}
    for split, own in names.items():
        parquet.write_table(pyarrow.table({"image": own, "label": [0, 1, 2]}), tmp_path / f"{split}.parquet")
    assert sizes(tmp_path) == {"train": 3, "test": 3}
    assert "more than one row, img/1.png" in caplog.text
    (tmp_path / "img/5.png").unlink()
    os.link(tmp_path / "img/0.png", tmp_path / "img/5.png")
    assert "img/5.png is img/0.png" in refusal(tmp_path)


def test_the_same_bytes_in_two_splits_are_told_where_images_stay_in_their_files(tmp_path, caplog):
    images(tmp_path, *(f"train/{name}/{number}" for name in ("cat", "dog", "eel") for number in range(3)))
    images(tmp_path, "test/cat/x", "test/dog/y", "test/eel/z")
    (tmp_path / "test/cat/x.png").write_bytes(file_of(picture(100, (8, 8))))
    for split, number in (("train/cat", 2), ("test/dog", 2)):  # what cannot be read is like no other
        (tmp_path / split / f"lost{number}.png").symlink_to("nowhere")
    config = DataConfig("tiny", str(tmp_path), in_memory=False, validation_fraction=0.3, max_bad_samples=2)
    load_data(config, MODEL)
    assert "test: 2 of 4 images have the bytes of an image" in caplog.text


# --- what is told ----------------------------------------------------------------------------------------------------


def test_a_set_that_was_written_twice_is_told(tmp_path, caplog):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "train-00000-of-00001", "test"):
        WRITE["parquet"](tmp_path / f"{name}.parquet", 3)
    assert sizes(tmp_path) == {"train": 9, "test": 3}
    assert "numbered of 00001 and of 00002" in caplog.text


@each_ending
def test_a_split_in_several_folders_is_told(tmp_path, ending, caplog):
    for name in ("new/train", "old/train", "new/test"):
        WRITE[ending](tmp_path / f"{name}.{ending}", 3)
    assert sizes(tmp_path) == {"train": 6, "test": 3}
    assert re.search("the split train .*2 folders, new, old", caplog.text)
    assert "the split test" not in caplog.text


@each_ending
def test_a_file_without_rows_or_samples_is_told(tmp_path, ending, caplog):
    for name, size in (("train-0", 6), ("train-1", 0), ("test", 3)):
        WRITE[ending](tmp_path / f"{name}.{ending}", size)
    assert sizes(tmp_path) == {"train": 6, "test": 3}
    assert f"train-1.{ending} holds no " in caplog.text


def test_lists_in_text_files_are_told_and_notes_are_not(tmp_path, caplog):
    images(tmp_path, "train/cat/1", "test/cat/2")
    for name in ("train.txt", "README.txt", "notes.txt", "LICENSE"):
        (tmp_path / name).write_text("x")
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    assert "1 file is left out, train.txt" in caplog.text


def test_every_ending_of_many_files_is_told(tmp_path, caplog):
    images(tmp_path, "train/cat/1", "test/cat/2")
    for name in ("a.gif", "b.gif", "c.gif", "d.HEIC", "e"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    sizes(tmp_path)
    assert "(.gif 3, .heic 1, no ending 1)" in caplog.text


# --- folders in shards -----------------------------------------------------------------------------------------------


def test_a_shard_whose_folders_name_another_split_is_refused(tmp_path):
    WRITE["tar"](tmp_path / "train.tar", 6, prefix="test/s")
    WRITE["tar"](tmp_path / "test.tar", 3, prefix="val/s")
    assert " in test/" in refusal(tmp_path)
    WRITE["tar"](tmp_path / "train.tar", 6, prefix="./train/s")
    assert sizes(tmp_path) == {"train": 6, "test": 3}


def test_a_folder_called_as_a_split_among_others_is_a_class(tmp_path):
    WRITE["tar"](tmp_path / "train-0.tar", 6, prefix="test/s")
    WRITE["tar"](tmp_path / "train-1.tar", 6, prefix="car/s")
    WRITE["tar"](tmp_path / "test.tar", 3, prefix="s")
    assert sizes(tmp_path) == {"train": 12, "test": 3}


# --- cards -----------------------------------------------------------------------------------------------------------


def card(root, **paths):
    files = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in paths.items())
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")


def test_a_card_that_disagrees_with_the_folders_of_images_is_refused(tmp_path):
    images(tmp_path, "train/cat/1", "test/cat/2")
    card(tmp_path, train="train/**", test="test/**")
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    card(tmp_path, train="data/train-*", test="data/test-*")  # of the parquet files that these were written from
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    card(tmp_path, train="test/**", test="train/**")
    assert "README.md has test/cat/2.png in the split train" in refusal(tmp_path)


@pytest.mark.parametrize("files", ["5", "[train.parquet, {split: test, path: test.parquet}]", "{train: [1]}", "[{path: x}]"])
def test_a_card_of_another_form_is_refused(tmp_path, files):
    for name in ("train", "test"):
        WRITE["parquet"](tmp_path / f"{name}.parquet", 3)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    assert "data_files" in refusal(tmp_path)
