"""Labels go by name: other orders are matched, and what cannot be matched is refused with both names."""

import io
import os
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from layout_cases import hub_splits
from PIL import Image

from sape2.config import DataConfig, model_config
from sape2.config.recipes import get_recipe
from sape2.data import folder, load_data, open_sources
from sape2.data.labels import as_numbers, check_names, match_model, renumber
from sape2.data.own import fit
from sape2.data.walk import walk


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_file(path, names, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": png(10 + 100 * (names[label] == "dog")), "path": None} for label in labels]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


def load(path):
    model = model_config("vit_nano", image_size=8, patch_size=4, num_classes=2)
    return load_data(DataConfig(name="imagenet", source=str(path), validation_fraction=0.25), model)


def named(split):
    return [split.classes[int(label)] for label in split.labels]


def seen(split):
    return ["dog" if image.float().mean() > 60 else "cat" for image in split.images]


def write_folder(where, files):
    for name in files:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(png(1))
    return where


def test_parquet_labels_of_another_order_are_matched_between_splits_and_files(tmp_path):
    write_file(tmp_path / "data" / "train-00000-of-00002.parquet", ["cat", "dog"], [0, 1] * 4)
    write_file(tmp_path / "data" / "train-00001-of-00002.parquet", ["dog", "cat"], [0, 1] * 4)
    write_file(tmp_path / "data" / "test-00000-of-00001.parquet", ["dog", "cat"], [0, 0, 1])
    splits = load(tmp_path)
    assert splits.test.classes == splits.train.classes == ("cat", "dog")
    for split in (splits.train, splits.validation, splits.test):
        assert named(split) == seen(split)
    assert splits.test.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ["Cat", "dog"], "^test .*'Cat', .*train .*'cat'"),
        ([2], ["dog", "cat", "cow"], "^test .*'cow', .*train"),
        ([5], ["dog", "cat"], "^test: label 5 .*0..1$"),
        ([0], ["dog", "dog "], "^test .*'dog' and 'dog '"),
    ],
)
def test_labels_without_a_match_are_refused_with_both_names(labels, names, message):
    with pytest.raises(ValueError, match=message):
        renumber(labels, names, ["cat", "dog"], "test", "train")


def test_labels_are_renumbered_by_name_and_missing_ones_stay():
    assert renumber([0, 1, -1, None], ["dog", "cat", "cow"], ["cat", "dog"], "test", "train") == [1, 0, -1, None]
    check_names(["cat", "dog"], "train")


@pytest.mark.parametrize(
    "names",
    [
        ("caf\u00e9", "cafe\u0301"),
        ("ab", "a\u200bb"),
        ("ab", "ab\ufe0f"),
        ("a b", "a\u00a0b"),
        ("a", "\u200e a"),
        ("x", "\u200b"),
        ("cat", "c\u0430t"),
        ("a", "a"),
    ],
)
def test_names_that_look_alike_are_refused_with_their_code_points(names):
    with pytest.raises(ValueError, match="train names") as error:
        check_names(["dog", *names], "train")
    assert ascii(names[1]) in str(error.value)


def test_numbers_without_names_are_the_names_of_classes_that_are_called_by_numbers():
    folders = ("0", "1", "10", "2")

    def unnamed(*labels):
        return SimpleNamespace(labels=list(labels), classes=(), where="others")

    match_model([others := unnamed(2, 10, 0)], folders)
    assert [others.classes[label] for label in others.labels] == ["2", "10", "0"]
    with pytest.raises(ValueError, match=r"^others has the label 3, which the run \(0, 1, 10, 2\) has not$"):
        match_model([unnamed(2, 3)], folders)
    for classes in (("2", "1", "cat"), ("1", "01", "2")):
        match_model([others := unnamed(2, 1, 0)], classes)
        assert (others.labels, others.classes) == ([2, 1, 0], ())


def test_capitals_make_two_classes():
    check_names(["A", "a", "b"], "train")
    assert renumber([0, 1], ["a", "A"], ["A", "a", "b"], "test", "train") == [1, 0]


def test_composed_and_decomposed_letters_are_one_class_across_splits(tmp_path):
    files = [f"{split}/{name}/{n}.png" for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")) for n in range(2)]
    write_folder(tmp_path, [*files, "train/tea/a.png", "train/tea/b.png", "test/tea/a.png"])
    splits = load(tmp_path)
    assert splits.test.classes == ("caf\u00e9", "tea")
    assert splits.test.labels.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"'tea' and 'te\\u200ba'"):
        folder.read(walk(write_folder(tmp_path, ["test/te\u200ba/a.png"])))


def test_names_of_other_bytes_than_utf8_are_text(tmp_path):
    files = [os.fsdecode(name) for name in (b"caf\xe9/a.png", b"caf\xe9/\xe9.png", b"two\nlines/a.png")]
    train = folder.read(walk(write_folder(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in files])))[
        "train"
    ]
    assert train.classes == (r"caf\xe9", "two\nlines")
    assert train.labels == [0, 1, 0]
    assert train.name(2) == rf"{tmp_path}/train/caf\xe9/\xe9.png"
    assert train.read(2)["bytes"]


PARQUET_LABELS = {
    "bool": (pyarrow.bool_(), [True, False]),
    "int8": (pyarrow.int8(), [1, 0]),
    "uint64": (pyarrow.uint64(), [1, 0]),
    "whole floats": (pyarrow.float32(), [1.0, 0.0]),
    "decimal": (pyarrow.decimal128(5, 1), [Decimal(1), Decimal(0)]),
    "categories": (pyarrow.dictionary(pyarrow.int8(), pyarrow.int64()), [1, 0]),
    "fractions": (pyarrow.float64(), [0.5, 0]),
    "no number": (pyarrow.float64(), [float("nan"), 0]),
    "text": (pyarrow.string(), ["a", "b"]),
    "large text": (pyarrow.large_string(), ["a", "b"]),
    "text views": (pyarrow.string_view(), ["1", "0"]),
    "named categories": (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", "b"]),
    "lists": (pyarrow.list_(pyarrow.int64()), [[1], [0]]),
    "missing": (pyarrow.int64(), [None, 0]),
    "bad": (pyarrow.uint64(), [2**63, 0]),
}


@pytest.mark.parametrize("kind", PARQUET_LABELS)
def test_labels_of_every_type_are_whole_numbers_or_refused_with_their_row(tmp_path, kind):
    stored, labels = PARQUET_LABELS[kind]
    for split in ("train", "test"):
        table = pyarrow.table({"image": [png(n) for n in range(8)], "label": pyarrow.array(labels * 4, stored)})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    if list(PARQUET_LABELS).index(kind) < 6:
        assert load(tmp_path).test.labels.dtype == torch.int64
        assert load(tmp_path).test.labels.tolist() == [1, 0] * 4
    else:
        with pytest.raises(ValueError, match=r"train row 0(:| has no) label"):
            load(tmp_path)
        with pytest.raises(ValueError, match=r"train( row 0(:| has no) label|: the class '1' has 0 images)"):
            fit(replace(get_recipe("images"), data=DataConfig(source=str(tmp_path))))


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string())], ids=str)
def test_text_in_parquet_is_numbered_by_the_names_of_its_file(tmp_path, kind):
    """A column that was written anew as text, with the names still in the metadata; the test file orders them otherwise."""
    for split, names in {"train": ["cat", "dog"], "test": ["dog", "cat"]}.items():
        path = tmp_path / f"{split}.parquet"
        write_file(path, names, [0, 1] * 4)
        table = pyarrow.parquet.read_table(path)
        text = pyarrow.array(["dog", "cat"] * 4).cast(kind)
        pyarrow.parquet.write_table(
            table.drop_columns("label").append_column("label", text).replace_schema_metadata(table.schema.metadata), path
        )
    assert load(tmp_path).test.labels.tolist() == [1, 0] * 4
    assert load(tmp_path).test.classes == ("cat", "dog")
    write_file(tmp_path / "test.parquet", ["cat", "dog"], [0, 1] * 4)  # numbers again
    assert load(tmp_path).test.labels.tolist() == [0, 1] * 4


def test_a_file_without_names_between_files_with_them_goes_by_number_and_is_told(tmp_path, caplog):
    write_file(tmp_path / "train-0.parquet", ["cat", "dog"], [0, 1] * 2)
    table = pyarrow.table({"image": [{"bytes": png(1), "path": "x"}] * 2, "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "train-1.parquet")
    write_file(tmp_path / "train-2.parquet", ["dog", "cat"], [0, 1] * 2)
    write_file(tmp_path / "test.parquet", ["dog", "cat"], [0, 1])
    source = open_sources(DataConfig("tiny", str(tmp_path)), model_config("vit_nano", num_classes=2))["train"]
    assert source.labels == [0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    assert "train train-1.parquet has no names of classes" in caplog.text


def test_hidden_folders_are_no_classes_and_give_no_images(tmp_path):
    kept = [f"{split}/{name}/a.png" for split in ("train", "test") for name in ("cat", "dog")]
    hidden = ["train/.ipynb_checkpoints/a.png", "train/__MACOSX/a.png", "train/@eaDir/a.png", "train/cat/@eaDir/b.png"]
    hidden += ["train/@Recycle/cat/a.png", "train/System Volume Information/x"]
    write_folder(tmp_path, [*kept, *hidden, "train/cat/.ipynb_checkpoints/a.png", "train/.DS_Store", "train/cat/Thumbs.db"])
    train = folder.read(walk(tmp_path))["train"]
    assert train.classes == ("cat", "dog")
    assert train.labels == [0, 1]


def test_a_training_class_without_images_is_refused(tmp_path):
    write_folder(tmp_path, ["train/cat/a.png", "train/cow/notes.txt", "test/cat/a.png"])
    with pytest.raises(ValueError, match=r"train: the class 'cow' has 0 images"):
        folder.read(walk(tmp_path))


def test_a_test_class_of_other_capitals_is_refused_with_both_names(tmp_path):
    write_folder(tmp_path, ["train/cat/a.png", "test/Cat/a.png"])
    with pytest.raises(ValueError, match=r"test .*'Cat', .*train .*'cat'"):
        folder.read(walk(tmp_path))


# --- hub ids ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Makes `datasets.load_dataset` give splits of (names or None, labels)."""
    return lambda **splits: monkeypatch.setattr(datasets, "load_dataset", lambda _: hub_splits(**splits))


def test_labels_of_a_hub_id_are_matched_by_name(hub):
    hub(train=(["cat", "dog"], [0, 1] * 4), test=(["dog", "cat"], [0, 0, 1]))
    splits = load("owner/name")
    assert splits.test.classes == splits.train.classes == ("cat", "dog")
    for split in (splits.train, splits.validation, splits.test):
        assert named(split) == seen(split)
    assert splits.test.labels.tolist() == [1, 1, 0]


def test_a_test_class_of_a_hub_id_that_training_has_not_is_refused_with_its_name(hub):
    hub(train=(["cat", "dog"], [0, 1] * 4), test=(["cat", "Dog"], [0, 1]))
    with pytest.raises(ValueError, match=r"owner/name test .*'Dog', .*owner/name train .*'dog'"):
        load("owner/name")


def test_a_hub_column_without_images_is_refused(monkeypatch):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda _: {"train": rows, "test": rows})
    with pytest.raises(ValueError, match=r"owner/name train column 'image' holds Value.*data.image_column=NAME"):
        load("owner/name")


@pytest.mark.parametrize("unnamed", ["train", "test"])
def test_labels_of_a_hub_id_go_by_number_where_one_split_has_no_names(hub, unnamed, caplog):
    splits = {"train": (["cat", "dog"], [0, 1] * 4), "test": (["cat", "dog"], [1, 0, 1])}
    hub(**splits | {unnamed: (None, splits[unnamed][1])})
    found = load("owner/name")
    assert found.test.labels.tolist() == [1, 0, 1]
    assert seen(found.test) == ["dog", "cat", "dog"]
    assert caplog.messages[0].startswith(f"owner/name {unnamed} has no names of classes")


def test_a_test_set_of_a_hub_id_without_labels_gives_way_to_the_validation_set(hub):
    hub(train=(["cat", "dog"], [0, 1] * 4), validation=(["dog", "cat"], [0, 1]), test=(["cat", "dog"], [-1, -1]))
    assert load("owner/name").test.labels.tolist() == [1, 0]


def test_a_test_class_of_which_there_is_nothing_to_train_on_is_told(hub, caplog):
    names = ["cat", "dog"]
    hub(train=(names, [0] * 8), test=(names, [0, 1]))
    load("owner/name")
    assert "owner/name test has images of classes of which none is there to train on: dog" in caplog.text


def test_a_test_set_without_a_column_of_labels_gives_way_to_the_validation_set(tmp_path, monkeypatch, caplog):
    splits = {}
    for split, count in {"train": 12, "validation": 4, "test": 2}.items():
        labels = {} if split == "test" else {"label": [0, 1] * (count // 2)}
        columns = {"image": [{"bytes": png(100 * len(splits) + n), "path": None} for n in range(count)]} | labels
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
        splits[split] = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda _: splits)
    for source in (tmp_path, "owner/unlabelled"):
        assert len(load(source).test) == 4
        assert f"{source}: the split test has no labels" in caplog.text


def test_a_hub_id_leaves_the_logging_and_bars_of_datasets_as_they_were(hub):
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    hub(train=(["cat", "dog"], [0, 1] * 4), test=(["cat", "dog"], [0, 1]))
    load("owner/name")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


@pytest.mark.parametrize("label", [2**63, 2**31, -(2**70), 1e30])
def test_a_number_too_large_for_a_class_is_refused_with_its_row(label):
    source = SimpleNamespace(labels=[0, label], classes=(), name=lambda row: f"row {row}")
    with pytest.raises(ValueError, match=r"row 1: label .* is far too large"):
        as_numbers(source)
