"""Bytes that come from anywhere: each input ends in a result or in one clear error.

Hypothesis looks for odd ones; the slow test tries 10,000 of each kind, which a plain loop does in a tenth of the time.
"""

import functools
import io
import random
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_cases import deep, saved, see_through, turned
from layout_cases import MODEL, file_of, picture

from sape2.config import DataConfig
from sape2.data import as_images, decode
from sape2.data.labels import as_numbers
from sape2.data.parquet import ParquetImages
from sape2.data.webdataset import index_shard

KINDS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "DDS"]
WHOLE = [file_of(picture(number), kind) for number, kind in enumerate(KINDS)]
WHOLE += [
    saved(deep(np.uint16, 65535)),
    saved(deep(np.float32, 1), "TIFF"),
    saved(turned(6), exif=turned(6).getexif()),
    saved(turned(5), "JPEG", exif=turned(5).getexif()),
    saved(see_through("LA")),
    saved(see_through("P"), "GIF", transparency=3),
    saved(picture(0).convert("CMYK"), "JPEG"),
]
FEW = pytest.param(40, id="few")
MANY = pytest.param(1000, id="many", marks=pytest.mark.slow)

edits = st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=4)), max_size=4)
damaged = st.builds(
    lambda whole, changes, cut: edited(whole, changes)[: max(1, round(cut * len(whole)))],
    st.sampled_from(WHOLE),
    edits,
    st.floats(0, 1) | st.just(1.0),
)
image_bytes = st.binary(max_size=200) | st.sampled_from(WHOLE) | damaged


def edited(whole, changes):
    """The bytes with some of them overwritten."""
    result = bytearray(whole)
    for place, new in changes:
        start = place % len(whole)
        result[start : start + len(new)] = new
    return bytes(result)


def message_of(errors, function):
    """What the function gave, or the line with which it refused."""
    try:
        return function(), None
    except errors as error:
        return None, str(error)


def tried(count, strategy, check):
    """Runs `check` on that many inputs, always the same ones."""
    seen = []
    quiet = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    quiet(given(strategy)(lambda value: seen.append(check(value))))()
    assert len(seen) >= count / 2
    return seen


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_an_image_or_refused_by_name(count):
    def check(data):
        array, message = message_of(ValueError, lambda: decode({"bytes": data}, MODEL, "here"))
        if message is None:
            assert (array.shape, array.dtype) == ((8, 8, 3), np.uint8)
        else:
            assert message.startswith("here cannot be read as an image: ")
        return message is None

    outcomes = tried(count, image_bytes, check)
    assert any(outcomes)
    assert not all(outcomes)


entries = st.none() | st.fixed_dictionaries({"bytes": st.none() | image_bytes, "path": st.none() | st.text(max_size=20)})


def read_all(path):
    """Every image of one parquet file, decoded."""
    config = DataConfig("tiny", max_bad_samples=2)
    source = ParquetImages(f"{path.parent} train", path.parent, [path], config)
    as_numbers(source)
    return as_images(source, config, MODEL).decoded()


rows = st.lists(st.tuples(entries, st.none() | st.integers(-1, 4)), max_size=6)


@pytest.mark.parametrize("count", [pytest.param(15, id="few"), MANY])
@pytest.mark.filterwarnings("ignore")
def test_any_rows_are_splits_or_one_line(count, tmp_path):
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"img": image, "label": datasets.Value("int64")})

    made = tmp_path / "train.parquet"

    def check(found):
        columns = {"img": [entry for entry, _ in found], "label": [label for _, label in found]}
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=features.arrow_schema), made)
        images, message = message_of((ValueError, OSError), lambda: read_all(made))
        if message is None:
            assert images.labels.tolist() == columns["label"]
            assert images.images.shape == (len(found), 3, 8, 8)
        else:
            assert str(tmp_path) in message
        return message is None

    outcomes = tried(count, rows, check)
    assert not all(outcomes)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("whole", ["parquet", "webdataset"])
def test_a_damaged_file_of_many_images_gives_images_or_one_line(count, whole, tmp_path):
    made = write_shard(tmp_path) if whole == "webdataset" else write_rows(tmp_path)
    clean = made.read_bytes()

    def check(value):
        changes, cut = value
        made.write_bytes(edited(clean, changes)[: max(1, round(cut * len(clean)))])
        read = index_shard if whole == "webdataset" else read_all
        _, message = message_of((ValueError, OSError), lambda: read(made))
        assert message is None or str(tmp_path) in message
        return message is None

    outcomes = tried(count, st.tuples(edits, st.floats(0, 1) | st.just(1.0)), check)
    assert not all(outcomes)


def write_shard(folder):
    path = folder / "train-0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            for name, content in ((f"{number}.png", WHOLE[0]), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_rows(folder):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"img": [{"bytes": WHOLE[0], "path": None}] * 6, "label": [0, 1, 2] * 2}
    path = folder / "train.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def reading(kind, data, made):
    """The function, and what it is given, that read such a file."""
    image = (decode, {"bytes": data}, MODEL, str(made))
    return {"image": image, "webdataset": (index_shard, made), "parquet": (read_all, made)}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "webdataset", "parquet"])
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_damaged_files_of_each_kind(kind, tmp_path):
    draw, outcomes = random.Random(0), []
    made = tmp_path / "image" if kind == "image" else write_shard(tmp_path) if kind == "webdataset" else write_rows(tmp_path)
    clean = WHOLE if kind == "image" else [made.read_bytes()]
    for number in range(10_000):
        whole = clean[number % len(clean)]
        changes = [(draw.randrange(len(whole)), draw.randbytes(draw.randint(1, 4))) for _ in range(draw.randrange(4))]
        data = edited(whole, changes)[: draw.choice([len(whole), draw.randint(1, len(whole))])]
        if kind != "image":
            made.write_bytes(data)
        _, message = message_of((ValueError, OSError), functools.partial(*reading(kind, data, made)))
        assert message is None or str(tmp_path) in message
        outcomes.append(message is None)
    assert 500 < sum(outcomes) < 9_900
