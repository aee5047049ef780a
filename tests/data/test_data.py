"""Images: what is read and what is refused, splits, the order of batches, augmentation."""

import io
import pickle
import random
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sape2.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from sape2.config.recipes import get_recipe
from sape2.data import ImageData, decode, limit_by_class, load_data, normalize, split_by_class
from sape2.data.augment import TrainStream, augment_images, epoch_order, share_of
from sape2.data.mixing import BatchMixer

CLASSES = ["cat", "dog", "eel"]
MODEL = ModelConfig(image_size=(4, 6), patch_size=2, num_classes=3)
POLICIES = ["randaugment", "autoaugment"]


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


def synthetic(size=23, classes=3, shape=(3, 4, 6)):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    return ImageData(images, torch.arange(size) % classes, tuple(CLASSES[:classes]), (0.5,) * shape[0], (0.2,) * shape[0])


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "DDS"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_value_error_only(kind):
    draw, whole = random.Random(0), file_of(picture(), kind)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
        for _ in range(draw.randrange(4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            assert decode({"bytes": bytes(damaged)}, MODEL, "here").shape == (4, 6, 3)
        except ValueError:
            refused += 1
    assert refused > 50


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_source_says_what_could_be_one():
    message = refusal(DataConfig("cifar10"), get_recipe("cifar10").model)
    assert [part for part in ("--data", "cifar-10-batches-py", "uoft-cs/cifar10") if part not in message] == []


def test_a_missing_folder_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'} " in refusal(config_of(tmp_path / "nowhere"), MODEL)


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


def test_splits_share_no_image_and_lose_none():
    data = synthetic(60)
    rest, part = split_by_class(data, 0.25, seed=0)
    kept = [image.numpy().tobytes() for half in (rest, part) for image in half.images]
    assert sorted(kept) == sorted(image.numpy().tobytes() for image in data.images)
    assert len(set(kept)) == 60  # no two of these images are equal, so none is in both


def test_splits_hold_the_same_share_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)
    data = ImageData(torch.zeros(64, 1, 2, 2, dtype=torch.uint8), labels, tuple(CLASSES), (0.5,), (0.5,))
    rest, part = split_by_class(data, 0.1, seed=0)
    assert part.labels.bincount().tolist() == [4, 2, 1]  # at least one of each
    assert rest.labels.bincount().tolist() == [36, 18, 3]


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


def test_limits_keep_the_shares_of_unequal_classes():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    data = ImageData(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), labels, tuple(CLASSES), (0.5,), (0.5,))
    assert limit_by_class(data, 50, seed=0).labels.bincount().tolist() == [30, 15, 5]


# --- the order of a run ----------------------------------------------------------------------------------------------


def stream_of(data=None, augment=None, seed=0, rank=0, world=1, **train):
    train = TrainConfig(**{"epochs": 3, "warmup_epochs": 0, "batch_size": 4, "workers": 0} | train)
    return TrainStream(data or synthetic(), augment or AugmentConfig(), train, seed, rank, world)


HEAVY = AugmentConfig(crop_padding=1, flip=True, policy="randaugment", policy_group=2)


def test_a_step_gives_the_same_batch_however_it_is_reached():
    in_order = list(stream_of(augment=HEAVY).batches(0))
    assert len(in_order) == 15
    assert all(same(stream_of(augment=HEAVY)[step], batch) for step, batch in enumerate(in_order))
    assert all(same(got, batch) for got, batch in zip(stream_of(augment=HEAVY).batches(7), in_order[7:], strict=True))
    backwards = stream_of(augment=HEAVY)
    assert all(same(backwards[step], in_order[step]) for step in reversed(range(15)))


def test_workers_do_not_change_the_batches():
    alone = list(stream_of(augment=HEAVY, workers=0).batches(2))
    one = list(stream_of(augment=HEAVY, workers=1).batches(2))
    assert len(one) == 13
    assert all(same(a, b) for a, b in zip(alone, one, strict=True))


def test_the_run_seed_changes_the_order_and_the_augmentation():
    crops = AugmentConfig(crop_padding=2)
    assert not torch.equal(epoch_order(50, seed=0, epoch=0), epoch_order(50, seed=1, epoch=0))
    one_image = synthetic(1).images.repeat(8, 1, 1, 1)
    first, second = (augment_images(one_image, crops, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_step_is_augmented_anew():
    one_image = ImageData(
        synthetic(1).images.repeat(8, 1, 1, 1), torch.zeros(8, dtype=torch.long), ("cat",), (0.5,) * 3, (0.2,) * 3
    )
    stream = stream_of(one_image, AugmentConfig(crop_padding=2))
    assert len({stream[step][0].numpy().tobytes() for step in range(6)}) == 6  # two batches in each of three epochs


def test_epochs_have_different_orders_and_each_image_once():
    orders = [epoch_order(50, seed=0, epoch=epoch) for epoch in range(3)]
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_last_incomplete_batch_is_dropped():
    stream = stream_of(synthetic(23))
    assert (stream.steps_per_epoch, stream.total_steps, len(stream)) == (5, 15, 15)
    for epoch in range(3):
        seen = [image.numpy().tobytes() for step in range(5) for image in stream[5 * epoch + step][0]]
        assert len(set(seen)) == 20


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_batch_between_them(world):
    whole = stream_of(augment=HEAVY)
    for step in (0, 6):
        images, labels = whole[step]
        parts = [stream_of(augment=HEAVY, rank=rank, world=world)[step] for rank in range(world)]
        places = torch.cat([share_of(4, rank, world) for rank in range(world)])
        assert [len(part[1]) for part in parts] == [4 // world] * world
        assert torch.equal(torch.cat([part[0] for part in parts])[places.argsort()], images)
        assert torch.equal(torch.cat([part[1] for part in parts])[places.argsort()], labels)


def test_repeats_show_fewer_images_more_often_in_an_epoch_of_unchanged_length():
    order = epoch_order(23, seed=0, epoch=0, repeats=3)
    assert len(order) == 23
    assert order.unique(return_counts=True)[1].tolist().count(3) == 7  # 23 = 7 x 3 + 2
    assert len(order.unique()) == 8
    assert stream_of(augment=AugmentConfig(repeats=3)).steps_per_epoch == 5


def test_labels_stay_with_their_images():
    data = synthetic()
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    for images, labels in stream_of(data).batches(0):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match=r"24 .*23"):
        stream_of(synthetic(23), batch_size=24)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="4, 3 and 1"):
        stream_of(world=3)
    with pytest.raises(ValueError, match="4 / 4"):
        stream_of(augment=AugmentConfig(mixup=0.5), world=4)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_normalize_is_the_formula():
    images = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    mean, std = (0.5, 0.1), (0.25, 0.3)
    expected = (images.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    got = normalize(images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-7)  # values up to 4: two roundings in float32


def test_batches_of_image_data_are_normalised_and_in_order():
    data = synthetic()
    batches = list(data.batches(10))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), normalize(data.images, data.mean, data.std))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


def shifted(image, down, right):
    """out[y, x] = image[y + down, x + right], zeros outside, as a literal loop."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                result[:, y, x] = image[:, y + down, x + right]
    return result


def test_random_crop_shifts_every_image_by_a_shift_of_its_own():
    images, padding = synthetic(120, shape=(2, 4, 5)).images, 1
    cropped = augment_images(images, AugmentConfig(crop_padding=padding), seed=0)
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    found = [[move for move in moves if torch.equal(shifted(a, *move), b)] for a, b in zip(images, cropped, strict=True)]
    assert all(len(fits) == 1 for fits in found)  # each is one of the nine shifts, and one only
    counts = [sum(fits == [move] for fits in found) for move in moves]
    assert min(counts) >= 3  # expected 13 of 120 each, standard deviation 3.4


def test_half_of_the_images_are_flipped():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(2000, 1, 1, 2).contiguous()
    got = augment_images(images, AugmentConfig(flip=True), seed=0)
    flipped = got[:, 0, 0, 0] == 255
    assert torch.equal(got[flipped], images[flipped].flip(-1))
    assert torch.equal(got[~flipped], images[~flipped])
    assert abs(int(flipped.sum()) - 1000) < 4 * 22.4  # four standard deviations


def test_no_augmentation_is_the_image_itself():
    images = synthetic().images
    assert torch.equal(augment_images(images, AugmentConfig(), seed=0), images)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_policies_keep_shape_and_type_and_follow_from_the_seed(policy, shape):
    images = synthetic(16, shape=shape).images
    config = AugmentConfig(policy=policy, policy_group=4)
    first, again, other = (augment_images(images, config, seed) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_neither_reads_nor_moves_the_global_generators(policy):
    images = synthetic(8, shape=(3, 8, 8)).images
    config = AugmentConfig(crop_padding=1, flip=True, policy=policy)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002 - as above
    first = augment_images(images, config, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    torch.manual_seed(123)
    assert torch.equal(augment_images(images, config, seed=0), first)


def test_a_group_shares_one_draw_of_the_policy():
    one = synthetic(1, shape=(3, 8, 8)).images.repeat(32, 1, 1, 1)
    kinds = {}
    for group in (1, 8, 32):
        got = augment_images(one, AugmentConfig(policy="autoaugment", policy_group=group), seed=0).split(group)
        assert all(torch.equal(part, part[:1].expand_as(part)) for part in got)
        kinds[group] = len({part.numpy().tobytes() for part in got})
    assert kinds[32] == 1
    assert kinds[8] > 1
    assert kinds[1] > kinds[8]


# --- mixing ----------------------------------------------------------------------------------------------------------


def batch(size=8, classes=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % classes


def seeded_mix(config, smoothing, images, labels, seed=0, classes=10):
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generators
    random.seed(seed)
    torch.manual_seed(seed)
    return BatchMixer(config, smoothing, classes)(images.clone(), labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_targets_are_smoothed_exactly(smoothing):
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(), smoothing, images, labels)
    expected = torch.full((8, 10), smoothing / 10)
    expected[torch.arange(8), labels] += 1 - smoothing
    assert torch.equal(got, images)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(mix, smoothing):
    images, labels = batch()
    mixed = 0
    for seed in range(10):
        got, targets = seeded_mix(AugmentConfig(**mix), smoothing, images, labels, seed)
        assert got.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
        assert targets.min() >= smoothing / 10 - 1e-7
        mixed += targets.max() < 1 - smoothing
    assert mixed >= 1


def test_mixup_mixes_images_as_it_mixes_targets():
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(mixup=0.8), 0.1, images, labels)
    share = (targets[0, labels[0]] - 0.01) / 0.9  # of an image; the rest is its mirror image in the batch
    assert 0 < share < 1
    torch.testing.assert_close(got, share * images + (1 - share) * images.flip(0), rtol=0, atol=1e-5)


def test_cutmix_takes_every_pixel_from_one_of_two_images():
    images, labels = batch()
    got, targets = seeded_mix(AugmentConfig(cutmix=1.0), 0.0, images, labels)
    own = (got == images).all(1)
    assert torch.equal(own | (got == images.flip(0)).all(1), torch.ones_like(own))
    torch.testing.assert_close(targets[torch.arange(8), labels], own.float().mean((1, 2)))


def test_erasing_changes_that_share_of_the_images_and_no_target():
    images, labels = batch(400)
    got, targets = seeded_mix(AugmentConfig(erase=0.25), 0.0, images, labels)
    changed = (got != images).flatten(1).any(1).sum()
    assert abs(int(changed) - 100) < 4 * 8.7  # four standard deviations
    assert torch.equal(targets.argmax(1), labels)
