"""Which file belongs to which split, in every layout: each file in one, what is neither taken nor told is refused."""

import os
import re
import shutil
from pathlib import Path

import pytest
from layout_cases import MODEL, file_of, picture, shard_of, write_parquet

from sape2.config import DataConfig
from sape2.data import load_data, open_sources
from sape2.data.own import find_data
from sape2.data.splits import split_of, words_of
from sape2.data.walk import image_files, walk

PNG = file_of(picture(0, (8, 8)))
FILES = {
    "parquet": lambda path, n: write_parquet(path, [PNG] * n, [0, 1, 2] * (n // 3), None),
    "tar": lambda path, n: shard_of(path, n),
}


def fill(root, *names):
    """Empty images, and empty folders where a name ends in "/". Names are written with classes: "train/{cat,dog}/a.png"."""
    for name in names:
        first, _, rest = name.partition("{")
        inner, _, last = rest.partition("}")
        for each in inner.split(","):
            path = root / (first + each + last)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_bytes(PNG)
    return root


def write(root, ending, **sizes):
    """Files of so many rows; "__" in a name is "/"."""
    for name, size in sizes.items():
        FILES[ending](root / f"{name.replace('__', '/')}.{ending}", size)
    return root


def opened(root, **changes):
    return open_sources(DataConfig("tiny", str(root), **changes), MODEL)


def sizes(root, **changes):
    return {split: len(source.labels) for split, source in opened(root, **changes).items()}


def refusal(root, **changes):
    with pytest.raises((ValueError, OSError)) as error:
        opened(root, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            ["train", "Training", "TRAIN-00001-of-00002", "my_train.v2", "train2017", "trainData", "trainset", "a/train/b"],
        ),
        ("test", ["test", "testing", "EVAL", "evaluation_1", "test images", "testset", "x.test"]),
        ("validation", ["validation", "valid", "val2017", "dev", "Val-Images", "data/dev/0"]),
        (
            None,
            [
                "contrast",
                "latest",
                "trainstation",
                "protest",
                "devices",
                "evaluate",
                "trainval",
                "attest",
                "préTest".lower(),
                "",
            ],
        ),
        (None, ["train_test_split", "train/val-0", "test-of-train"]),
    ],
)
def test_a_split_is_named_by_a_word_not_by_letters(split, names):
    assert {name: split_of(f"{name}.tar") for name in names} == dict.fromkeys(names, split)


def test_words_are_the_same_composed_and_decomposed():
    assert words_of("pré-Test_2b") == words_of("pre\u0301-Test_2b") == ["pré", "test", "b"]


# --- shards and parquet ----------------------------------------------------------------------------------------------


each_ending = pytest.mark.parametrize("ending", FILES)


@each_ending
def test_synonyms_and_capitals_are_one_split(tmp_path, ending):
    write(tmp_path, ending, **{"train-0": 6, "sub__training-1": 6, "TEST": 3})
    assert sizes(tmp_path) == {"train": 12, "test": 3}


@each_ending
def test_a_folder_above_says_nothing(tmp_path, ending):
    assert sizes(write(tmp_path / "test data" / "dev", ending, train=6, test=3)) == {"train": 6, "test": 3}


@each_ending
def test_files_of_no_split_are_told(tmp_path, ending, caplog):
    write(tmp_path, ending, train=6, test=3, extra=3)
    (tmp_path / "more.csv").write_text("x")
    assert sizes(tmp_path) == {"train": 6, "test": 3}
    assert f"left out, extra.{ending}; no word of a split" in caplog.text
    assert "left out, more.csv" in caplog.text


@each_ending
def test_a_name_with_more_words_is_another_set_and_is_told(tmp_path, ending, caplog):
    write(tmp_path, ending, train=6, train_small=3, test=3, test_adversarial=3, val=3)
    assert sizes(tmp_path) == {"train": 6, "test": 3}
    for told in (f"left out, train_small.{ending}", f"left out, test_adversarial.{ending}", "split validation is not read"):
        assert told in caplog.text


@each_ending
def test_more_words_are_right_where_none_has_less(tmp_path, ending, caplog):
    assert sizes(write(tmp_path, ending, cats_train=6, dogs_train=6, contest_test=3)) == {"train": 12, "test": 3}
    assert caplog.messages == []


@each_ending
@pytest.mark.parametrize("names", [("train_test_split-train", "train_test_split-test"), ("train__val-0", "test")])
def test_a_path_of_two_splits_is_refused(tmp_path, ending, names):
    assert "two splits, train and " in refusal(write(tmp_path, ending, **dict.fromkeys(names, 3)))


@each_ending
def test_without_a_training_or_test_set_the_other_files_are_named(tmp_path, ending):
    message = refusal(write(tmp_path, ending, trainval=6, test=3))
    assert "found test" in message
    assert f"trainval.{ending}" in message


@each_ending
@pytest.mark.parametrize("name", ["rows [v2]", "a*?{b,c}", "50%25#x", "a::b", "café", "e\u0301", "two\nlines", "x "])
def test_a_path_is_no_pattern_and_no_address(tmp_path, ending, name):
    write(tmp_path / "made", ending, train=6, test=3)
    shutil.move(tmp_path / "made", tmp_path / name)
    assert sizes(tmp_path / name) == {"train": 6, "test": 3}


@each_ending
def test_a_path_of_other_bytes_than_utf8_is_read(tmp_path, ending):
    write(tmp_path / "made", ending, train=6, test=3)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.move(tmp_path / "made", latin)
    found = opened(latin)["train"]
    assert len(found.labels) == 6
    assert r"caf\xe9" in found.where
    assert found.name(0).encode()


@each_ending
@pytest.mark.parametrize("name", ["parquet", "json", "csv", "imagefolder", "./parquet", "parquet/"])
def test_a_bare_name_is_that_folder(tmp_path, ending, name, monkeypatch):
    write(tmp_path / name, ending, train=6, test=3)
    write(tmp_path / "another", ending, train=9, test=9)
    monkeypatch.chdir(tmp_path)
    assert sizes(name) == {"train": 6, "test": 3}


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("parquet", "./rows", "../rows", "/rows"):
        assert "hub id" in refusal(name)
    assert "--data" in refusal("")


# --- README.md with configs ------------------------------------------------------------------------------------------

ONE_AND_TWO = "- split: train\n    path: {}\n  - split: test\n    path: x/two.parquet\n"


def card(root, text):
    write(root, "parquet", x__one=6, x__two=3, y__three=3)
    (root / "README.md").write_text(f"---\n{text}\n---\n")
    return root


def config(train):
    return f"configs:\n- config_name: default\n  data_files:\n  {ONE_AND_TWO.format(train)}"


@pytest.mark.parametrize("train", ["x/one.parquet", "x/one*", "'**/one.parquet'", "./x/[o]ne.parquet"])
def test_a_card_names_the_files_of_a_split(tmp_path, train, caplog):
    assert sizes(card(tmp_path, config(train))) == {"train": 6, "test": 3}
    assert "left out, y/three.parquet; README.md" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (config("x/*"), "x/two.parquet in two splits"),
        (config("x/none*"), "x/none*"),
        (config("../other/*"), "../other/*"),
        (config("README.md"), ".parquet"),
        (
            "configs:\n- config_name: p\n  data_files: x/*\n- config_name: q\n  data_files: y/*",
            "configs p, q",
        ),
        ("configs: [: bad", "README.md"),
        ("license: mit", "no word of a split"),
    ],
)
def test_a_card_that_leaves_a_doubt_is_refused(tmp_path, text, message):
    assert message in refusal(card(tmp_path, text))


def test_the_default_of_several_configs_is_read(tmp_path):
    one = config("x/one.parquet").replace("default", "p\n  default: true")
    assert sizes(card(tmp_path, f"{one}\n- config_name: q\n  data_files: y/*")) == {"train": 6, "test": 3}


# --- image folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Test", "eval", "EVALUATION", "testing", "Validation", "dev", "val2017", "test_images", "testset"]
)
def test_a_test_folder_has_any_word_for_it(tmp_path, name):
    fill(tmp_path, "train/{cat,dog}/a.png", f"{name}/{{cat,dog}}/b.png", f"{name}/{{cat}}/c.png")
    assert sizes(tmp_path) == {"train": 2, "test": 3}
    assert find_data(DataConfig(source=str(tmp_path))).test_fraction is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/{a,b}/1.png", "holdout/{a,b}/1.png"], "holdout holds images"),
        (["steam_train/{2019,2020}/1.png", "car/{2019}/1.png"], "car holds images"),
        (["{Train,train,test}/a/1.png"], "split train, Train, train"),
        (["{train,test,eval}/a/1.png"], "split test, eval, test"),
        (["{train,test}/1.png"], "test, train hold images"),
        (["{train_images,val_images}/1.png", "{other}/1.png"], "hold images"),
        (["{bottle,cable}/train/1.png", "{bottle,cable}/test/1.png"], "folder bottle .*test and train"),
        (["archive/{train,test}/a/1.png", "{b}/1.png"], "folder archive .*test and train"),
        (["train/{train,test}/a/1.png", "test/{a}/1.png"], "images of test and train"),
        (["{cat}/train_1.png", "{dog}/test_1.png"], "images of test and train"),
        (["train/{a,b}/1.png", "{test}/"], "test .*no rows"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        load_data(find_data(DataConfig(source=str(fill(tmp_path, *names)))), MODEL)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["{car,plane,train}/1.png"], ("car", "plane", "train")),
        (["{test,blood}/1.png"], ("blood", "test")),
        (["{contrast,latest}/2019/1.png"], ("contrast", "latest")),
        (["train/{car,train,test}/1.png"], ("car", "test", "train")),
    ],
)
def test_a_class_may_be_called_as_a_split(tmp_path, names, classes):
    sources = open_sources(find_data(DataConfig(source=str(fill(tmp_path, *names)))), MODEL)
    assert sources["train"].classes == classes


def test_what_lies_beside_folders_of_splits_and_classes_is_told(tmp_path, caplog):
    fill(tmp_path, "{train,test}/cat/a.png", "{unlabeled}/a.png", "{train/loose,loose}.png", "{train_small}/cat/a.png")
    (tmp_path / "labels.csv").write_text("x")
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    assert "4 files are left out, labels.csv, loose.png, train_small/cat/a.png" in caplog.text
    assert "train: 1 file is left out, loose.png" in caplog.text


def test_a_test_folder_without_classes_has_no_labels(tmp_path, caplog):
    fill(tmp_path, "{train,val}/cat/a.png", "{test}/a.png")
    assert opened(tmp_path)["test"].where.endswith(" val")
    assert "split test has no labels" in caplog.text
    shutil.rmtree(tmp_path / "val")
    assert "labels in test" in refusal(tmp_path)


def test_shards_beside_folders_are_told_and_beside_classes_chosen(tmp_path, caplog):
    fill(tmp_path, "{train,test}/cat/a.png")
    write(tmp_path, "tar", train=3)
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    assert "left out, train.tar" in caplog.text
    fill(tmp_path / "b", "{cat,dog}/a.png")
    write(tmp_path / "b", "tar", backup=3)
    assert "--set data.layout=folder" in refusal(tmp_path / "b")


# --- one image, one split --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "to", "message"),
    [
        ("test", "train", "2 files, the first: test/cat/1.png is train/cat/1.png"),
        ("test/cat/2.png", "../../train/cat/1.png", "test/cat/2.png is train/cat/1.png"),
        ("train/dog/2.png", "../cat/1.png", "cat/1.png and dog/2.png"),
        ("train/cat/more", "../dog", "cat/more/1.png and dog/1.png"),
    ],
)
def test_a_link_to_an_image_of_another_split_or_class_is_refused(tmp_path, link, to, message):
    fill(tmp_path, "train/{cat,dog}/1.png")
    if link != "test":
        fill(tmp_path, "test/{cat,dog}/1.png")
    (tmp_path / link).symlink_to(to)
    assert message in refusal(tmp_path)


def test_links_that_lead_back_end_and_are_told(tmp_path, caplog):
    fill(tmp_path, "{train,test}/cat/1.png", "{train}/dog/1.png")
    for link, to in (
        ("train/cat/up", ".."),
        ("train/cat/root", "/"),
        ("train/dog/self", "self"),
        ("train/dog/again.png", "1.png"),
    ):
        (tmp_path / link).symlink_to(to)
    os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")
    assert sizes(tmp_path) == {"train": 2, "test": 1}
    assert "train/cat/root, train/cat/up, train/dog/pipe.png" in caplog.text
    assert "dog/again.png" in caplog.text


def test_folders_that_link_to_each_other_are_walked_in_finite_time(tmp_path):
    for one in range(9):
        fill(tmp_path, f"{{{one}}}/x/1.png")
        for other in {*range(9)} - {one}:
            (tmp_path / str(one) / f"to{other}").symlink_to(f"../{other}")
    assert len(walk(tmp_path).real) < 2000


def test_linked_splits_are_read(tmp_path):
    fill(tmp_path / "store", "{a,b}/cat/1.png")
    (tmp_path / "data").mkdir()
    for split, store in (("train", "a"), ("test", "b")):
        (tmp_path / "data" / split).symlink_to(tmp_path / "store" / store)
    assert sizes(tmp_path / "data") == {"train": 1, "test": 1}


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_the_same_pixels_in_two_splits_are_told(tmp_path, layout, caplog):
    kinds = {"train": [0, 1, 2, 3, 4, 5], "test": [6, 7, 3]}
    for split, rows in kinds.items():
        files = [file_of(picture(row, (8, 8)), "BMP" if row + len(rows) == 6 else "PNG") for row in rows]
        if layout == "parquet":
            write_parquet(tmp_path / f"{split}.parquet", files, [row % 3 for row in rows], None)
        for row, file in zip(rows, files, strict=True):
            if layout == "folder":
                path = tmp_path / split / str(row % 3) / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file)
    load_data(DataConfig("tiny", str(tmp_path), validation_fraction=0.5), MODEL)
    assert ["test: 1 of 3 images have the pixels of an image" in line for line in caplog.messages] == [True]
    assert ("test/0/3.png is " if layout == "folder" else "test row 2 is ") in caplog.text


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_image_in_two_classes_is_told(tmp_path, in_memory, caplog):
    for split, rows in {"train": range(6), "test": range(6, 9)}.items():
        for row in rows:
            path = tmp_path / split / "abc"[row % 3] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file_of(picture(row, (8, 8))))
    (tmp_path / "train" / "c" / "5.png").write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes())
    load_data(DataConfig("tiny", str(tmp_path), validation_fraction=0.5, in_memory=in_memory), MODEL)
    assert re.search(r"1 images have the (pixels|bytes) of an image of another class: .*\d\.png \([ac]\) is ", caplog.text)


def test_a_class_with_one_image_is_named(tmp_path):
    fill(
        tmp_path,
        "{train,test}/cat/a.png",
        "{train,test}/eel/a.png",
        "{train,test}/dog/a.png",
        "{train}/cat/b.png",
        "{train}/eel/b.png",
    )
    with pytest.raises(ValueError, match="train: the class 'dog' has 1 image"):
        load_data(DataConfig("tiny", str(tmp_path)), MODEL)


# --- files to predict ------------------------------------------------------------------------------------------------


def test_every_kind_of_image_is_found_and_other_files_are_told(tmp_path, caplog):
    fill(tmp_path, "{a.png,b.gif,c.jfif,D.JPG,e,.hidden.png,notes.txt}")
    (tmp_path / "up").symlink_to(".")
    assert [path.name for path in image_files(tmp_path)] == ["D.JPG", "a.png", "b.gif", "c.jfif"]
    assert "left out, e; " in caplog.text


def test_folders_of_one_name_in_every_class_are_told(tmp_path, caplog):
    opened(fill(tmp_path / "a", "{one,two,three}/left/a.png", "{one,two,three}/right/b.png"), test_fraction=0.2)
    assert "the classes are the first folders, one, three, two; each of them holds the folders left, right" in caplog.text
    caplog.clear()
    opened(fill(tmp_path / "b", "{one,two,three}/left/a.png", "{one,two,three}/b.png"), test_fraction=0.2)
    assert caplog.text == ""
