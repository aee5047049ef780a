"""Image folders, parquet and webdataset shards: the same images in the same order, damaged files, lost files, other images."""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from layout_cases import CLASSES, LAYOUTS, MODEL, file_of, load, picture, write_layouts_of, write_parquet
from PIL import Image
from torchvision.transforms import CenterCrop as TorchvisionCenterCrop
from torchvision.transforms import InterpolationMode, RandomResizedCrop, Resize

from sape2 import data
from sape2.cli import main
from sape2.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig, override
from sape2.config.recipes import get_recipe
from sape2.data import ImageData, ImageFiles, base, decode, files, open_sources
from sape2.data.augment import TrainStream, epoch_order, share_of
from sape2.data.decoding import center_crop, random_box
from sape2.data.parquet import HubImages
from sape2.data.pixels import MAX_PIXELS
from sape2.data.webdataset import index_shard
from sape2.evaluation.accuracy import quick_accuracy
from sape2.models.trained import build_model
from sape2.runs.run import Run
from sape2.training.loop import train

AUGMENT = AugmentConfig(crop_padding=1, flip=True, policy="randaugment", policy_group=3)
BOXES = AugmentConfig(crop_area=0.3, flip=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_layouts_of(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Images 4 and 31 of the training set end too early."""
    return write_layouts_of(tmp_path_factory.mktemp("damaged"), bad=(4, 31))


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(base, "RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr(files, "MAX_THREADS", 1)  # each thread waits for itself


def stream_of(data, augment=AUGMENT, rank=0, world=1, **changes):
    config = TrainConfig(**{"epochs": 3, "warmup_epochs": 0, "batch_size": 12, "workers": 0} | changes)
    return TrainStream(data, augment, config, seed=0, rank=rank, world=world)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def refusal(*arguments, **changes):
    with pytest.raises((ValueError, OSError)) as error:
        load(*arguments, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels_of(data):
    return torch.cat([images for images, _ in data.batches(5)])


# --- the same images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_splits_and_batches_bit_for_bit(whole, layout, in_memory):
    expected, got = load(whole["parquet"]), load(whole[layout], in_memory=in_memory)
    assert isinstance(got.train, ImageData if in_memory else ImageFiles)
    for one, other in ((expected.train, got.train), (expected.validation, got.validation), (expected.test, got.test)):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(pixels_of(one), pixels_of(other))
    assert got.train.classes == tuple(CLASSES)
    steps = range(stream_of(expected.train).total_steps)
    assert all(same(stream_of(expected.train)[step], stream_of(got.train)[step]) for step in steps)


def test_every_layout_gives_the_same_random_boxes(whole):
    streams = [stream_of(load(whole[layout], in_memory=False).train, BOXES) for layout in LAYOUTS]
    for step in (0, 5, 11):
        assert all(same(streams[0][step], stream[step]) for stream in streams[1:])
    assert not torch.equal(streams[0][0][0], stream_of(load(whole["folder"]).train, AugmentConfig(flip=True))[0][0])


@pytest.mark.parametrize(("layout", "window"), [("folder", 0), ("webdataset", 32), ("parquet", 32)])
def test_an_epoch_taken_up_in_the_middle_gives_what_was_left_of_it(whole, layout, window):
    data = load(whole[layout], in_memory=False).train
    in_order = list(stream_of(data, BOXES, shuffle_window=window).batches(0))
    fresh = load(whole[layout], in_memory=False).train
    resumed = list(stream_of(fresh, BOXES, shuffle_window=window, workers=int(layout == "parquet")).batches(6))
    assert len(in_order) == 12
    assert all(same(one, other) for one, other in zip(in_order[6:], resumed, strict=True))


@pytest.mark.parametrize("augment", [AUGMENT, BOXES], ids=["policy", "boxes"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_read_their_own_images_only_and_share_a_batch_between_them(whole, augment, world):
    whole_batch = stream_of(load(whole["webdataset"], in_memory=False).train, augment)[7]
    parts, read = [], []
    for rank in range(world):
        data = load(whole["webdataset"], in_memory=False).train
        source_read = data.source.read
        data.source.read = lambda index, source_read=source_read: read.append(index) or source_read(index)
        parts.append(stream_of(data, augment, rank, world)[7])
    places = torch.cat([share_of(12, rank, world) for rank in range(world)])
    assert torch.equal(torch.cat([part[0] for part in parts])[places.argsort()], whole_batch[0])
    assert torch.equal(torch.cat([part[1] for part in parts])[places.argsort()], whole_batch[1])
    assert len(read) == len(set(read)) == 12


def test_a_run_ends_with_the_same_weights_from_every_layout(whole, tmp_path):
    settings = [
        "model.dim=16", "model.depth=1", "model.num_heads=2", "model.image_size=8", "model.patch_size=4", "model.num_classes=3",
        "train.epochs=2", "train.warmup_epochs=0", "train.batch_size=16", "train.precision=fp32", "train.workers=0",
    ]  # fmt: skip
    config = override(get_recipe("cifar10_budget"), settings)
    weights = []
    for layout, in_memory in (("parquet", True), ("folder", False), ("webdataset", True)):
        splits = load(whole[layout], name="cifar10", in_memory=in_memory)
        model = build_model(config)
        run = Run(tmp_path / f"{layout}{in_memory}", config)
        train(model, splits.train, lambda trained, s=splits: quick_accuracy(trained, s.validation), run, quiet=True)
        weights.append(model.state_dict())
    assert all(torch.equal(one[key], weights[0][key]) for one in weights[1:] for key in one)


def test_nothing_is_decoded_to_make_the_splits(whole, monkeypatch):
    monkeypatch.setattr(files, "decode", lambda *_: pytest.fail("an image was decoded"))
    for layout in LAYOUTS:
        splits = load(whole[layout], in_memory=False, train_limit=40)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 6, 9)


def test_what_fits_is_kept_in_memory_and_what_does_not_is_not(whole, monkeypatch):
    assert isinstance(load(whole["folder"]).train, ImageData)
    monkeypatch.setattr(data, "MEMORY_BYTES", 69 * 3 * 8 * 8 - 1)
    assert isinstance(load(whole["folder"]).train, ImageFiles)
    monkeypatch.setattr(data, "MEMORY_BYTES", 69 * 3 * 8 * 8)
    assert isinstance(load(whole["folder"]).train, ImageData)


def test_random_boxes_need_files(whole):
    with pytest.raises(ValueError, match=r"--set data.in_memory=false"):
        stream_of(load(whole["folder"]).train, BOXES)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_can_be_sent_to_other_processes(whole, layout):
    data = load(whole[layout], in_memory=False).train
    first = data.images  # opens files
    assert torch.equal(pickle.loads(pickle.dumps(data)).images, first)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 1003, 64, 65])
def test_a_windowed_order_is_a_permutation_that_reads_few_blocks_at_a_time(size):
    orders = [epoch_order(size, seed=0, epoch=epoch, window=64) for epoch in range(2)]
    assert all(order.sort().values.tolist() == list(range(size)) for order in orders)
    assert not torch.equal(*orders)
    for part in orders[0].split(64):
        assert len((part // 4).unique()) <= 18  # 16 blocks of 4; a short block shifts the borders
    neighbours = (orders[0].diff().abs() == 1).float().mean()
    assert neighbours < 0.1  # blocks do not stay together


def test_a_window_as_large_as_the_epoch_is_the_full_shuffle():
    assert torch.equal(epoch_order(50, 0, 1, window=50), epoch_order(50, 0, 1))


# --- what the model sees of an image ---------------------------------------------------------------------------------


@pytest.mark.parametrize("area", [0.08, 0.9])
@pytest.mark.parametrize("size", [(50, 37), (300, 5), (5, 300), (1, 1)])
def test_random_boxes_are_those_of_torchvision(size, area):
    image = Image.new("RGB", size)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, [area, 1.0], [3 / 4, 4 / 3])
        assert random_box(image.height, image.width, area, seed) == tuple(int(number) for number in expected)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (64, 64), (31, 200)])
def test_the_test_view_is_that_of_torchvision(size):
    model = ModelConfig(image_size=(28, 28), patch_size=4)
    image = picture(0, size)
    expected = TorchvisionCenterCrop(28)(Resize(32, InterpolationMode.BICUBIC)(image))
    got = decode({"bytes": file_of(image)}, model, "here", partial(center_crop, share=0.875))
    assert np.array_equal(got, np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_the_test_view_of_one_line_of_pixels_is_its_middle(size):
    grey = np.full((size[1], size[0], 3), 50, np.uint8)
    grey[size[1] // 2 - 40 : size[1] // 2 + 40, size[0] // 2 - 40 : size[0] // 2 + 40] = 200
    view = center_crop(Image.fromarray(grey), ModelConfig(image_size=(64, 64), patch_size=4), 0.875)
    assert (np.asarray(view) == 200).all()


def test_center_crop_is_used_for_the_test_set_and_boxes_replace_it_in_training(whole):
    plain, cut = load(whole["folder"], in_memory=False), load(whole["folder"], in_memory=False, center_crop=0.5)
    assert not torch.equal(plain.test.images, cut.test.images)
    assert same(stream_of(plain.train, BOXES)[0], stream_of(cut.train, BOXES)[0])


# --- damaged images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_images_are_named_counted_and_replaced_by_the_next_of_their_class(damaged, layout, in_memory, caplog):
    splits = load(damaged[layout], in_memory=in_memory, max_bad_samples=2)
    sizes = (len(splits.train), len(splits.validation), len(splits.test))
    assert sizes == (54, 6, 9)
    shown = list(stream_of(splits.train, AugmentConfig()).batches(0))
    pixels_of(splits.validation)
    known = {np.asarray(picture(row).resize((8, 8), Image.Resampling.BICUBIC)).tobytes(): row for row in range(60)}
    for images, labels in shown:
        rows = [known[image.permute(1, 2, 0).numpy().tobytes()] for image in images]
        assert [row * 7 % 3 for row in rows] == labels.tolist()
        assert not {4, 31} & set(rows)
    messages = [record.getMessage() for record in caplog.records]
    assert [message[: message.index(":")] for message in messages] == [f"skipped in train ({n} of at most 2)" for n in (1, 2)]
    wanted = {
        "parquet": ["train row 4 (train-00000-of-00002.parquet row 4)", "train row 31 (train-00001-of-00002.parquet row 1)"],
        "folder": [f"train/{CLASSES[1]}/00000004.png", f"train/{CLASSES[1]}/00000031.png"],
        "webdataset": ["train-000000.tar:00000004", "train-000001.tar:00000031"],
    }[layout]
    assert all(any(name in message for message in messages) for name in wanted)


def test_damaged_images_give_the_same_batches_in_every_layout(damaged):
    streams = [stream_of(load(damaged[layout], in_memory=layout == "folder", max_bad_samples=2).train) for layout in LAYOUTS]
    for step in range(12):
        assert all(same(streams[0][step], stream[step]) for stream in streams[1:])


def test_one_image_too_many_stops_the_run_with_a_clear_line(damaged):
    assert "data.max_bad_samples" in refusal(damaged["folder"])
    data = load(damaged["folder"], in_memory=False, max_bad_samples=1).train
    with pytest.raises(ValueError, match=r"\.png .*2 images of train .*data\.max_bad_samples"):
        list(stream_of(data).batches(0))


def test_the_limit_holds_for_all_workers_together_and_each_image_counts_once(damaged, caplog):
    data = load(damaged["webdataset"], in_memory=False, max_bad_samples=2).train
    assert len(list(stream_of(data, workers=2).batches(0))) == 12
    in_training = [row for row in (4, 31) if row in data.rows.tolist()]
    assert len(data.unreadable) == len(in_training) == len(caplog.records)
    data = load(damaged["webdataset"], in_memory=False, max_bad_samples=len(in_training) - 1).train
    with pytest.raises(ValueError, match="max_bad_samples") as error:
        list(stream_of(data, workers=2).batches(0))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(("images", "allowed"), [(999, 0), (1000, 1), (50_000, 50), (1_281_167, 100)])
def test_by_default_one_image_in_a_thousand_and_at_most_a_hundred_may_be_unreadable(images, allowed):
    from sape2.data import allowed_unreadable

    assert allowed_unreadable(images, DataConfig()) == allowed
    assert allowed_unreadable(images, DataConfig(max_bad_samples=7)) == 7


def test_a_class_without_a_readable_image_is_named(tmp_path):
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                file = b"no image" if (split, name) == ("train", "dog") else file_of(picture(number))
                (tmp_path / split / name / f"{number}.png").write_bytes(file)
    line = refusal(tmp_path, max_bad_samples=100)
    assert f"{tmp_path} train: no image of the class 'dog'" in line
    assert "(3 tried)" in line


@pytest.mark.parametrize("side", [9_500, 13_500], ids=["above the limit", "twice above it"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(side):
    bomb = file_of(Image.new("1", (side, side)))
    assert side**2 > MAX_PIXELS > len(bomb) * 10
    with pytest.raises(ValueError, match=r"^here .*too many pixels"):
        decode({"bytes": bomb}, MODEL, "here")


# --- lost files ------------------------------------------------------------------------------------------------------


def with_nothing_open(data):
    """As another process gets it: a file that is held open can be read after it was removed."""
    return pickle.loads(pickle.dumps(data))


def test_a_shard_that_is_gone_is_tried_again_and_then_reported(whole, tmp_path, no_delay, caplog):
    folder = shutil.copytree(whole["webdataset"], tmp_path / "shards")
    data = with_nothing_open(load(folder, in_memory=False).train)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(OSError, match=r"No such file or directory; tried 3 times over 0.02 s") as error:
        list(stream_of(data).batches(0))
    assert str(folder / "train-000001.tar") in str(error.value)
    assert sum("trying again" in record.getMessage() for record in caplog.records) == 2
    assert len(data.unreadable) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_come_back_in_time_are_read_on(whole, tmp_path, layout, monkeypatch):
    folder = shutil.copytree(whole[layout], tmp_path / "here")
    expected = load(whole[layout]).train.images
    data = with_nothing_open(load(folder, in_memory=False).train)
    folder.rename(tmp_path / "away")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "away").rename(folder)

    monkeypatch.setattr(base.time, "sleep", sleep)
    monkeypatch.setattr(files, "MAX_THREADS", 1)
    assert torch.equal(data.images, expected)
    assert waits == [0.5, 1.0]


def test_a_single_missing_file_of_a_folder_is_an_unreadable_image(whole, tmp_path):
    folder = shutil.copytree(whole["folder"], tmp_path / "here")
    data = load(folder, in_memory=False, max_bad_samples=1).train
    missing = data.source.name(int(data.rows[5]))
    os.unlink(missing)
    assert len(data.images) == 54
    assert list(data.unreadable.reasons) == [missing]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_the_shards_are_what_datasets_reads(whole):
    shards = {"train": str(whole["webdataset"] / "train-*.tar")}
    expected = list(datasets.load_dataset("webdataset", data_files=shards, streaming=True)["train"].decode(False))
    source = open_sources(DataConfig("tiny", str(whole["webdataset"])), MODEL)["train"]
    assert len(expected) == len(source.labels) == 60
    for number, sample in enumerate(expected):
        assert source.read(number)["bytes"] == sample["png"]["bytes"]
        assert source.labels[number] == sample["cls"]
        assert source.name(number).endswith(f":{sample['__key__']}")


def test_rows_from_the_cache_of_datasets_are_read_by_number():
    encoded = [file_of(picture(row)) for row in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [{"bytes": file, "path": None} for file in encoded], "label": [0, 1, 2, 1, 0]}
    source = HubImages("owner/name train", datasets.Dataset.from_dict(columns, features=features), DataConfig("tiny"))
    assert (source.labels, source.classes) == ([0, 1, 2, 1, 0], tuple(CLASSES))
    assert [source.read(number)["bytes"] for number in (4, 0)] == [encoded[4], encoded[0]]
    assert source.name(3) == "owner/name train row 3"


def test_labels_can_be_in_json(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (
            ("a/1.x.PNG", file_of(picture(1))),
            ("a/1.json", b'{"label": 2}'),
            ("2.png", b""),
            ("2.json", b"["),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    places = index_shard(tmp_path / "train-0.tar")
    assert [(key, label) for key, _, _, label in places] == [("a/1", 2), ("2", "[")]


@pytest.mark.parametrize(
    ("layout", "file", "message"),
    [
        ("parquet", "data/train-00001-of-00002.parquet", "1 of 2 files like train-00000-of-00002.parquet"),
        ("webdataset", "train-000001.tar", "1 of 3 files like train-000000.tar"),
    ],
)
def test_a_numbered_file_that_is_missing_is_told(whole, tmp_path, layout, file, message, caplog):
    folder = shutil.copytree(whole[layout], tmp_path / layout)
    assert len(load(folder).train) == 54
    assert caplog.messages == []
    (folder / file).unlink()
    load(folder)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a-0-of-3.tar", "a-1-of-3.tar"], True),
        (["a-00000-of-00002-0123456789abcdef.parquet"], True),
        (["a-00000-of-00002-0123456789abcdef.parquet", "a-00001-of-00002-0123456789abcdee.parquet"], False),
        (["a-1.tar", "a-3.tar"], True),
        (["2012.tar", "2015.tar"], False),  # years
        (["a-0.tar", "b-2.tar", "c.tar"], False),
    ],
)
def test_only_holes_in_a_series_are_told(names, told, caplog):
    base.tell.cache_clear()
    base.tell_missing("here", [Path(name) for name in names])
    assert bool(caplog.messages) == told


def test_more_than_one_layout_must_be_chosen_from(whole, tmp_path):
    shutil.copytree(whole["webdataset"], tmp_path, dirs_exist_ok=True)
    shutil.copytree(whole["parquet"], tmp_path, dirs_exist_ok=True)
    assert "--set data.layout=parquet" in refusal(tmp_path)
    assert load(tmp_path, layout="webdataset").train.fingerprint["layout"] == "webdataset"


def test_a_test_set_without_labels_gives_way_to_the_validation_set(tmp_path):
    encoded = [file_of(picture(row)) for row in range(12)]
    for split, labels in (("train", [0, 1, 2] * 4), ("validation", [0, 1, 2] * 4), ("test", [-1] * 12)):
        write_parquet(tmp_path / f"{split}.parquet", encoded, labels, names=None)
    splits = load(tmp_path)
    assert splits.test.labels.tolist() == [0, 1, 2] * 4
    (tmp_path / "validation.parquet").unlink()
    assert "labels in test" in refusal(tmp_path)


PATH = pyarrow.struct({"path": pyarrow.string()})
BOTH = pyarrow.struct({"bytes": pyarrow.large_binary(), "path": pyarrow.large_string()})


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "path", "bytes and path", "in the folders of splits"]
)
def test_rows_may_name_image_files_in_the_folder(tmp_path, kind, caplog):
    stored = {
        "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "path": PATH,
        "bytes and path": BOTH,
    }
    for split, first in (("train", 0), ("test", 10)):
        folder = tmp_path / (f"{split}/images" if kind.startswith("in") else f"images/{split}")
        folder.mkdir(parents=True)
        for row in range(6):
            (folder / f"{row}.png").write_bytes(file_of(picture(first + row, (8, 8))))
        names = [str((folder / f"{row}.png").relative_to(tmp_path)) for row in range(6)]
        values = [{"path": name} for name in names] if "path" in kind else names
        table = pyarrow.table({"image": pyarrow.array(values, stored.get(kind)), "label": [0, 1, 2] * 2})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    found = load(tmp_path)
    assert torch.equal(found.test.images[5], torch.tensor(np.asarray(picture(15, (8, 8)))).permute(2, 0, 1))
    assert caplog.messages == []
    (tmp_path / "extra.png").write_bytes(b"x")
    load(tmp_path)
    assert "left out, extra.png" in caplog.text
    shutil.copy(tmp_path / "train.parquet", tmp_path / "test.parquet")
    assert "6 files" in refusal(tmp_path)


@pytest.mark.parametrize("stored", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()])
def test_images_are_read_from_every_kind_of_bytes(tmp_path, stored):
    for split in ("train", "test"):
        files = pyarrow.array([file_of(picture(row, (8, 8))) for row in range(6)], stored)
        pyarrow.parquet.write_table(pyarrow.table({"image": files, "label": [0, 1, 2] * 2}), tmp_path / f"{split}.parquet")
    assert torch.equal(load(tmp_path).test.images[5], torch.tensor(np.asarray(picture(5, (8, 8)))).permute(2, 0, 1))


@pytest.mark.parametrize("values", [[[1, 2]] * 3, [{"a": b"x"}] * 3, [1.5] * 3])
def test_a_column_of_no_images_is_refused_with_its_type(tmp_path, values):
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table({"image": values, "label": [0, 1, 2]}), tmp_path / f"{split}.parquet")
    assert "column 'image' holds" in refusal(tmp_path)


def test_a_path_in_a_parquet_file_cannot_leave_the_folder(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(file_of(picture(0)))
    features = datasets.Features(
        {"img": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, "label": datasets.Value("int64")}
    )
    for split in ("train", "test"):
        rows = {"img": [{"bytes": None, "path": "../secret.png"}] * 6, "label": [0, 1, 2] * 2}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    assert "'../secret.png' leads out of" in refusal(tmp_path / "data")


# --- other images ----------------------------------------------------------------------------------------------------


def resume(folder, run_folder, whole, **changes):
    settings = ["model.image_size=8", "model.num_classes=3", "train.batch_size=16", "train.workers=0"]
    config = override(get_recipe("cifar10_budget"), settings)
    splits = load(folder, name="cifar10", **changes)
    run = Run(run_folder, config)
    run.check_settings()
    run.check_images(splits.train.fingerprint)
    run.start(splits.train.fingerprint)


def test_a_run_notices_other_images_and_accepts_another_layout_of_the_same(whole, tmp_path):
    run_folder = tmp_path / "run"
    for layout in (*LAYOUTS, "parquet"):
        resume(whole[layout], run_folder, whole)
    fewer = write_layouts_of(tmp_path / "fewer", train=57)
    with pytest.raises(ValueError, match=r"train images \(60 there, 57 here\)"):
        resume(fewer["folder"], run_folder, whole)
    other = shutil.copytree(whole["folder"], tmp_path / "other")
    for path in (other / "test").rglob("*.png"):
        path.write_bytes(file_of(picture(500)))
    with pytest.raises(ValueError, match="the content of its test images"):
        resume(other, run_folder, whole)


def test_renamed_files_of_the_same_layout_are_noticed(whole, tmp_path):
    resume(whole["webdataset"], tmp_path / "run", whole)
    folder = shutil.copytree(whole["webdataset"], tmp_path / "shards")
    (folder / "train-000002.tar").rename(folder / "train-000003.tar")
    with pytest.raises(ValueError, match="names or sizes of its train images"):
        resume(folder, tmp_path / "run", whole)


def test_a_damaged_fingerprint_says_what_to_do(whole, tmp_path):
    resume(whole["folder"], tmp_path / "run", whole)
    (tmp_path / "run" / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data.json is damaged"):
        resume(whole["folder"], tmp_path / "run", whole)


# --- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_imagenet_recipe_runs_dry_on_a_generated_folder_of_a_thousand_classes(tmp_path, capsys):
    encoded = [file_of(picture(number, (40, 30)), "JPEG") for number in range(5)]
    for split, count in (("train", 4), ("val", 1)):
        for label in range(1000):
            folder = tmp_path / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"n{label:08d}_{number}.JPEG").write_bytes(encoded[(label + number) % 5])
    settings = ["model.image_size=32", "train.batch_size=16", "train.workers=0"]
    options = [option for setting in settings for option in ("--set", setting)]
    command = ["train", "imagenet", "--data", str(tmp_path), "--model", "vit_nano", "--dry-run", "--json", *options]
    assert main(command) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (row["training_images"], row["validation_images"], row["test_images"]) == (3000, 1000, 1000)
    assert row["steps"] == 300 * (3000 // 16)
