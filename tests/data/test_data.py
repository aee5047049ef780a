"""Images: what is read and what is refused, and how they are split."""

import base64
import io
import pickle
import random
import re

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from image_cases import synthetic
from PIL import Image

from sape2.config import DataConfig, ModelConfig
from sape2.config.recipes import get_recipe
from sape2.data import decode, load_data, parquet
from sape2.data.images import class_split, draw_by_class

CLASSES = ["cat", "dog", "eel"]
MODEL = ModelConfig(image_size=(4, 6), patch_size=2, num_classes=3)


def picture(row=0, size=(6, 4), mode="RGB"):
    """A picture of `size` (width, height) whose pixels tell the row."""
    pixels = np.random.default_rng(row).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_split(folder, split, files, labels, image_name="img", label_name="label", label_type=None):
    """A parquet file in the layout of the hub."""
    features = datasets.Features(
        {
            image_name: datasets.Image(),
            label_name: label_type or datasets.ClassLabel(names=CLASSES),
            "extra": datasets.Value("int64"),
        }
    )
    entries = [None if file is None else {"bytes": file, "path": None} for file in files]
    columns = {image_name: entries, label_name: labels, "extra": list(range(len(files)))}
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def write_folder(folder, train=30, test=6, **names):
    for split, size, start in (("train", train, 0), ("test", test, 1000)):
        write_split(folder, split, [file_of(picture(start + i)) for i in range(size)], [i % 3 for i in range(size)], **names)
    return folder


def config_of(folder, **changes):
    return DataConfig(**{"name": "tiny", "source": str(folder)} | changes)


def refusal(*arguments):
    """The one-line message with which `load_data` refuses."""
    with pytest.raises((ValueError, OSError)) as error:
        load_data(*arguments)
    assert str(error.value).strip()
    return str(error.value)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_digits_are_complete_and_unchanged():
    config = get_recipe("digits")
    splits = load_data(config.data, config.model)
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 1797
    assert len(splits.test) == pytest.approx(1797 / 5, abs=5)
    from sklearn.datasets import load_digits

    original = load_digits()
    rows = sorted(
        (int(label), image.tobytes()) for part in parts for label, image in zip(part.labels, part.images.numpy(), strict=True)
    )
    scaled = np.round(original.images * 255 / 16).astype(np.uint8)
    assert rows == sorted((int(label), image.tobytes()) for label, image in zip(original.target, scaled, strict=True))
    assert splits.train.classes == tuple("0123456789")


def test_digits_refuse_a_folder():
    config = get_recipe("digits")
    assert "'/somewhere'" in refusal(DataConfig("digits", "/somewhere", mean=(0.3,), std=(0.3,)), config.model)


def test_digits_as_colour_images_of_another_size():
    model = ModelConfig(image_size=(16, 24), patch_size=8, num_classes=10)
    splits = load_data(DataConfig("digits"), model)
    assert splits.test.images.shape[1:] == (3, 16, 24)
    assert torch.equal(splits.test.images[:, 0], splits.test.images[:, 2])


@pytest.mark.parametrize(("image_name", "label_name"), [("img", "label"), ("image", "fine_label"), ("image", "labels")])
def test_parquet_in_hub_layout_gives_the_pixels_and_labels_that_were_written(tmp_path, image_name, label_name):
    folder = write_folder(tmp_path, image_name=image_name, label_name=label_name)
    splits = load_data(config_of(folder), MODEL)
    assert splits.test.classes == tuple(CLASSES)
    assert splits.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    expected = np.stack([np.asarray(picture(1000 + i)) for i in range(6)])
    assert torch.equal(splits.test.images, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert len(splits.train) + len(splits.validation) == 30


def test_columns_of_other_names_can_be_named(tmp_path):
    folder = write_folder(tmp_path, image_name="photo", label_name="animal")
    splits = load_data(config_of(folder, image_column="photo", label_column="animal"), MODEL)
    assert len(splits.test) == 6


def test_of_two_columns_that_would_do_the_taken_one_is_told(tmp_path, caplog):
    folder = write_folder(tmp_path)
    for path in folder.rglob("*.parquet"):
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.append_column("labels", table["label"]), path)
    load_data(config_of(folder), MODEL)
    assert "train has several label columns, label, labels; label is taken, or --set data.label_column=NAME" in caplog.text
    caplog.clear()
    load_data(config_of(folder, label_column="labels"), MODEL)
    assert "several" not in caplog.text


def test_two_columns_of_one_name_are_refused(tmp_path):
    folder = write_folder(tmp_path)
    for path in folder.rglob("*.parquet"):
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.append_column("label", table["label"]), path)
    with pytest.raises(ValueError, match="train has 2 columns called 'label'; leave one"):
        load_data(config_of(folder), MODEL)


def test_labels_without_names_are_named_by_number(tmp_path):
    folder = write_folder(tmp_path, label_type=datasets.Value("int64"))
    assert load_data(config_of(folder), MODEL).test.classes == ("0", "1", "2")


def test_reading_leaves_the_folder_as_it_was(tmp_path):
    folder = write_folder(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    load_data(config_of(folder), MODEL)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_files_without_the_published_hash_are_refused_unopened(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a file of unknown origin was unpickled",))

    folder = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir()
    for file in ("data_batch_1", "test_batch", "batches.meta", "train", "test", "meta"):
        (folder / file).write_bytes(pickle.dumps(Trap()))
    message = refusal(config_of(tmp_path, name=name), get_recipe(name).model)
    assert str(folder) in message
    assert "MD5" in message


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_is_brought_to_the_channels_of_the_model(mode, channels):
    model = ModelConfig(image_size=(4, 6), patch_size=2, in_channels=channels)
    image = picture(mode="L").convert(mode) if mode == "LA" else picture(mode=mode)
    array = decode({"bytes": file_of(image, "TIFF" if mode == "CMYK" else "PNG")}, model, "here")
    assert (array.shape, array.dtype) == ((4, 6, channels), np.uint8)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(4, 6, channels)
    assert np.array_equal(array, expected)


def test_a_palette_image_gets_the_colours_of_its_palette():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    assert decode({"bytes": file_of(image)}, MODEL, "here").reshape(-1, 3).tolist() == [[10, 20, 30]] * 24


def test_an_image_of_another_size_is_resized():
    assert decode({"bytes": file_of(picture(size=(13, 9)))}, MODEL, "here").shape == (4, 6, 3)
    flat = Image.new("RGB", (50, 20), (10, 20, 30))
    assert decode({"bytes": file_of(flat)}, MODEL, "here").reshape(-1, 3).tolist() == [[10, 20, 30]] * 24


def test_an_image_can_lie_in_a_file_of_its_own(tmp_path):
    (tmp_path / "x.png").write_bytes(file_of(picture(7)))
    assert np.array_equal(decode({"bytes": None, "path": str(tmp_path / "x.png")}, MODEL, "here"), np.asarray(picture(7)))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"bytes": b""}, "cannot be read"),
        ({"bytes": b"GIF89a, or is it"}, "cannot be read"),
        ({"bytes": file_of(picture())[:-30]}, "cannot be read"),
        ({"bytes": file_of(picture(size=(60, 40)), "JPEG")[:-300]}, "cannot be read"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "/nowhere/x.png"),
    ],
)
def test_what_is_not_an_image_is_refused_with_its_row(entry, reason):
    with pytest.raises(ValueError, match=f"train row 3.*{reason}"):
        decode(entry, MODEL, "train row 3")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_source_says_what_could_be_one():
    message = refusal(DataConfig("cifar10"), get_recipe("cifar10").model)
    assert [part for part in ("--data", "cifar-10-batches-py", "uoft-cs/cifar10") if part not in message] == []


def test_a_missing_folder_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'} " in refusal(config_of(tmp_path / "nowhere"), MODEL)


def test_a_home_that_is_none_is_a_missing_folder():
    assert "~nobody-of-this-name/x " in refusal(config_of("~nobody-of-this-name/x"), MODEL)


def test_a_hub_data_set_that_cannot_be_had_is_named():
    message = refusal(config_of("no-such-owner/no-such-images"), MODEL)
    assert "no-such-owner/no-such-images" in message
    assert "\n" not in message


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    path = write_split(tmp_path, "train", [file_of(picture())], [0])
    assert f"{path} is a file" in refusal(config_of(path), MODEL)


@pytest.mark.parametrize(("name", "wanted"), [("tiny", "images"), ("cifar10", "cifar-10-batches-py")])
def test_a_folder_without_images_says_what_it_holds(tmp_path, name, wanted):
    model = get_recipe("cifar10").model
    message = refusal(config_of(tmp_path, name=name), model)
    assert wanted in message
    assert "notes.txt" not in message
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refusal(config_of(tmp_path, name=name), model)


@pytest.mark.parametrize(
    ("names", "changes", "what"),
    [
        ({"image_name": "photo"}, {}, "photo, label, extra"),
        ({"label_name": "animal"}, {}, "img, animal, extra"),
        ({}, {"image_column": "photo"}, "img, label, extra"),
        ({}, {"label_column": "animal"}, "img, label, extra"),
    ],
)
def test_a_missing_column_lists_the_columns_there_are(tmp_path, names, changes, what):
    message = refusal(config_of(write_folder(tmp_path, **names), **changes), MODEL)
    assert what in message
    assert all(name in message for name in changes.values())
    assert "--set data." in message


@pytest.mark.parametrize("column", ["extra", "label"])
def test_a_column_that_holds_no_images_is_refused(tmp_path, column):
    message = refusal(config_of(write_folder(tmp_path), image_column=column, label_column="label"), MODEL)
    assert f"{tmp_path} train" in message


def test_images_as_text_are_refused_in_one_short_line(tmp_path):
    write_folder(tmp_path)
    text = base64.b64encode(file_of(picture(size=(40, 40)))).decode()
    table = pyarrow.table({"img": [text] * 3, "label": [0, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    message = refusal(config_of(tmp_path), MODEL)
    assert f"column 'img' holds texts of up to {len(text)} characters" in message
    assert len(message) < 400


@pytest.mark.parametrize(("label", "message"), [(3, "3 .* 0\\.\\.2"), (-1, "-1 .* 0\\.\\.2"), (None, "no label")])
def test_a_bad_label_is_refused_with_its_row(tmp_path, label, message):
    write_folder(tmp_path)
    files = [file_of(picture(i)) for i in range(5)]
    write_split(tmp_path, "train", files, [0, 1, label, 2, 0], label_type=datasets.Value("int64"))
    assert re.search(f"train row 2\\b.*{message}", refusal(config_of(tmp_path), MODEL))


def test_a_label_that_is_text_is_refused_with_its_row(tmp_path):
    write_folder(tmp_path)
    write_split(tmp_path, "train", [file_of(picture())] * 2, ["0", "dog"], label_type=datasets.Value("string"))
    assert refusal(config_of(tmp_path), MODEL).startswith(f"{tmp_path} train row 0: label '0'")


@pytest.mark.parametrize(
    "file", [b"", b"not an image", file_of(picture())[:-30], None], ids=["empty", "text", "truncated", "none"]
)
def test_a_bad_image_is_refused_with_its_row(tmp_path, file):
    write_folder(tmp_path)
    files = [file_of(picture(i)) for i in range(6)]
    write_split(tmp_path, "train", [*files[:4], file, *files[4:]], [0, 1, 2, 0, 1, 2, 1])
    assert f"{tmp_path} train row 4" in refusal(config_of(tmp_path), MODEL)


def test_another_number_of_classes_is_refused_with_the_way_out(tmp_path):
    message = refusal(config_of(write_folder(tmp_path)), ModelConfig(image_size=(4, 6), patch_size=2, num_classes=10))
    assert "--set model.num_classes=3" in message


@pytest.mark.parametrize(("only", "found"), [("train", "train"), ("test", "test")])
def test_a_missing_split_is_refused_with_what_was_found(tmp_path, only, found):
    write_split(tmp_path, only, [file_of(picture())] * 3, [0, 1, 2])
    assert f"found {found}" in refusal(config_of(tmp_path), MODEL)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused(tmp_path, split):
    write_folder(tmp_path)
    write_split(tmp_path, split, [], [])
    assert f"{tmp_path} {split} " in refusal(config_of(tmp_path), MODEL)


@pytest.mark.parametrize("damage", ["no parquet at all", "truncated", "overwritten"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_parquet_file_is_refused(tmp_path, split, damage):
    write_folder(tmp_path)
    path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
    whole = path.read_bytes()
    middle = slice(100, len(whole) // 2)
    overwritten = whole[: middle.start] + b"\xff" * (middle.stop - middle.start) + whole[middle.stop :]
    path.write_bytes({"no parquet at all": b"x" * 100, "truncated": whole[:-50], "overwritten": overwritten}[damage])
    assert f"{tmp_path} {split}" in refusal(config_of(tmp_path), MODEL)


def test_more_than_one_batch_of_rows_is_read_and_named_by_its_own_row(tmp_path):
    write_folder(tmp_path)
    good = file_of(picture())
    write_split(tmp_path, "train", [good] * 1002 + [b"bad"], [0] * 1003)
    assert "train row 1002 " in refusal(config_of(tmp_path, max_bad_samples=0), MODEL)


# --- splits ----------------------------------------------------------------------------------------------------------


def test_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    whole = load_data(config_of(folder), MODEL).train.images
    monkeypatch.setattr(parquet, "AT_ONCE", 4)
    assert torch.equal(load_data(config_of(folder), MODEL).train.images, whole)


def test_splits_share_no_image_and_lose_none():
    data = synthetic(60)
    kept = [image.numpy().tobytes() for half in class_split(data.labels, 0.25, seed=0) for image in data[half].images]
    assert sorted(kept) == sorted(image.numpy().tobytes() for image in data.images)
    assert len(set(kept)) == 60  # no two of these images are equal, so none is in both


def test_splits_hold_the_same_share_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)
    rest, part = class_split(labels, 0.1, seed=0)
    assert labels[part].bincount().tolist() == [4, 2, 1]  # at least one of each
    assert labels[rest].bincount().tolist() == [36, 18, 3]


def test_no_fraction_takes_all_images_of_a_class():
    labels = torch.tensor([0] * 40 + [1] * 3 + [2] * 2 + [3])
    rest, part = class_split(labels, 0.9, seed=0)
    assert labels[rest].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    assert labels[part].bincount().tolist() == [36, 2, 1, 1]


def test_splits_depend_on_the_split_seed_and_on_nothing_global(tmp_path):
    folder = write_folder(tmp_path)

    def validation(split_seed, global_seed):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 - the global state is the point
        random.seed(global_seed)
        return load_data(config_of(folder, split_seed=split_seed, validation_fraction=0.4), MODEL).validation.images

    assert torch.equal(validation(0, 1), validation(0, 2))
    assert not torch.equal(validation(0, 1), validation(1, 1))


def test_the_test_set_does_not_depend_on_the_split_seed(tmp_path):
    folder = write_folder(tmp_path)
    first, second = (load_data(config_of(folder, split_seed=seed, train_limit=5 + seed), MODEL).test for seed in (0, 1))
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize("limit", [1, 7, 20, 27])
def test_train_limit_keeps_that_many_training_images_by_class(tmp_path, limit):
    folder = write_folder(tmp_path)
    full, limited = load_data(config_of(folder), MODEL), load_data(config_of(folder, train_limit=limit), MODEL)
    assert len(limited.train) == limit
    counts = limited.train.labels.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1  # 9 training images of each class
    assert torch.equal(full.validation.images, limited.validation.images)
    known = {image.numpy().tobytes() for image in full.train.images}
    assert {image.numpy().tobytes() for image in limited.train.images} <= known


def test_a_train_limit_above_the_size_changes_nothing(tmp_path):
    folder = write_folder(tmp_path)
    full, limited = load_data(config_of(folder), MODEL), load_data(config_of(folder, train_limit=28), MODEL)
    assert torch.equal(full.train.images, limited.train.images)


def test_classes_of_which_a_train_limit_leaves_no_image_are_told(tmp_path, caplog):
    load_data(config_of(write_folder(tmp_path), train_limit=2), MODEL)
    assert "data.train_limit=2 leaves no image of 1 of 3 classes: " in caplog.text


def test_limits_keep_the_shares_of_unequal_classes():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    assert labels[draw_by_class(labels, 50, seed=0)].bincount().tolist() == [30, 15, 5]
