"""Webdataset shards: what is cut, joined, doubled or linked is refused by name, and never read as less or as something else."""

import io
import re
import shutil
import subprocess
import tarfile

import pytest
from layout_cases import file_of, picture, shard_of

from sape2.config import DataConfig, ModelConfig
from sape2.data import load_data, webdataset
from sape2.data.walk import walk
from sape2.data.webdataset import index_shard

PNG = file_of(picture(1))
SAMPLES = [(f"{number}.{ending}", PNG if ending == "png" else b"1") for number in range(3) for ending in ("cls", "png")]


def png(value):
    return file_of(picture(value))


def write_shard(path, files, mode="w", **settings):
    with tarfile.open(path, mode, **settings) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def keys_of(shard):
    return [key for key, *_ in index_shard(shard)]


def refusal(shard):
    with pytest.raises(ValueError, match=re.escape(str(shard))) as error:
        index_shard(shard, {"cat": 0, "dog": 1})
    assert "\n" not in str(error.value)
    return str(error.value)


# --- whole, or refused -----------------------------------------------------------------------------------------------


def test_a_cut_shard_is_refused_wherever_it_was_cut(tmp_path):
    shard = write_shard(tmp_path / "train.tar", SAMPLES)
    whole, blocks = shard.read_bytes(), 512 * len(SAMPLES) * 2
    cuts = [cut for edge in range(0, len(whole), 512) for cut in (edge - 1, edge, edge + 1, edge + 256) if cut >= 0]
    for cut in cuts:
        shard.write_bytes(whole[:cut])
        if cut >= blocks + 512:  # all files, and one block of zeros, are there
            assert keys_of(shard) == ["0", "1", "2"]
        else:
            assert refusal(shard).startswith(f"the shard {shard} ")


def test_a_damaged_header_is_not_the_end(tmp_path):
    shard = write_shard(tmp_path / "train.tar", SAMPLES)
    data = bytearray(shard.read_bytes())
    data[2 * 1024 + 148] ^= 1  # a digit of the checksum of 1.cls
    shard.write_bytes(data)
    assert "after sample 0: at byte 2048 " in refusal(shard)


def test_two_shards_in_one_file_are_refused(tmp_path):
    one, two = (write_shard(tmp_path / name, SAMPLES[at:][:2]).read_bytes() for name, at in (("a.tar", 0), ("b.tar", 2)))
    (tmp_path / "both.tar").write_bytes(one + two)
    assert "end of the archive" in refusal(tmp_path / "both.tar")


@pytest.mark.parametrize("mode", ["w", "w|"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_python_is_read(tmp_path, mode, kind):
    """The stream, "w|", is how the TarWriter of webdataset writes."""
    long = "a" * 60 + "/" + "b" * 90
    files = [*SAMPLES, (f"{long}.png", PNG), (f"{long}.cls", b"2")]
    assert keys_of(write_shard(tmp_path / "train.tar", files, mode, format=kind)) == ["0", "1", "2", long]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
def test_what_the_program_tar_writes_and_appends_to_is_read(tmp_path):
    for name, data in SAMPLES:
        (tmp_path / name).write_bytes(data)
    shard = tmp_path / "train.tar"
    for command in ("-cf", "-rf"):
        names = [name for name, _ in SAMPLES if (command == "-cf") == name.startswith("0")]
        subprocess.run(["tar", command, shard, *names], cwd=tmp_path, check=True)
    assert sorted(keys_of(shard)) == ["0", "1", "2"]


def test_a_packed_shard_is_named_whatever_its_ending(tmp_path):
    shard = write_shard(tmp_path / "train.tar", SAMPLES, "w:xz")
    assert "is packed with xz" in refusal(shard)


def test_packed_shards_beside_open_ones_are_refused(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}-0.tar", SAMPLES)
    for name in ("train-1.tar.gz", "train-1.tgz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=name):
            webdataset.read(walk(tmp_path))
        (tmp_path / name).unlink()


# --- one image and one label -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("a.png", "a.depth.png", "a.mask.png"), ("a.depth.png", "a.mask.png", "a.png")])
def test_the_plain_image_of_a_sample_is_read(tmp_path, order):
    shard = write_shard(tmp_path / "train.tar", [("a.cls", b"1"), *((name, png(len(name))) for name in order)])
    [(key, offset, size, label)] = index_shard(shard)
    assert (key, label) == ("a", 1)
    assert shard.read_bytes()[offset : offset + size] == png(len("a.png"))


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.png", "a.png"), ("22.5.png", "22.6.png")])
def test_two_images_of_one_key_are_refused_with_both_names(tmp_path, names):
    shard = write_shard(tmp_path / "train.tar", [(name, png(1)) for name in names])
    assert f"two images, {names[0]} and {names[1]}" in refusal(shard)


@pytest.mark.parametrize("other", ["png", "rgb.png"])
def test_another_kind_of_image_does_not_stand_for_a_lost_one(tmp_path, other):
    files = [(f"{key}.{ending}", png(1)) for key in "abc" for ending in (other, "depth.png")]
    files = [file for file in files if file[0] not in (f"b.{other}", "a.depth.png", "c.depth.png")]
    shard = write_shard(tmp_path / "train.tar", [*files, *((f"{key}.cls", b"1") for key in "abc")])
    assert f"b.depth.png and a.{other} are the images of two samples" in refusal(shard)


def test_numbers_before_the_names_of_other_places_are_told(tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("1 cat\n0 dog\n3d\n")
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tar", SAMPLES)
    webdataset.read(walk(tmp_path))
    assert "the name '1 cat' in place 0, from 0; a label 1 in shards is a place" in caplog.text


def test_names_in_shards_are_numbered_by_classes_txt(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog \n\n")
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tar", [("a.png", png(1)), ("a.cls", b"dog"), ("b.png", png(1)), ("b.cls", b"0")])
    found = webdataset.read(walk(tmp_path))
    assert found["test"].classes == ("cat", "dog")
    assert found["train"].labels == [1, 0]


def test_names_are_found_in_both_forms_of_their_letters(tmp_path):
    (tmp_path / "classes.txt").write_text("caf\u00e9\ntea\x0b1", encoding="utf-8")
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tar", [("a.png", png(1)), ("a.cls", "cafe\u0301".encode())])
    found = webdataset.read(walk(tmp_path))["train"]
    assert (found.labels, found.classes) == ([0], ("caf\u00e9", "tea\x0b1"))


def test_a_first_class_without_a_name_does_not_move_the_others(tmp_path):
    (tmp_path / "classes.txt").write_text("\ncat\ndog\n")
    for split in ("train", "test"):
        shard_of(tmp_path / f"{split}.tar", 6)
    with pytest.raises(ValueError, match="names a class ''"):
        load_data(DataConfig("tiny", str(tmp_path)), ModelConfig(num_classes=3))


def test_a_name_that_could_be_a_number_is_told(tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("0\n2\n1")
    for split in ("train", "test"):
        shard_of(tmp_path / f"{split}.tar", 3)
    assert webdataset.read(walk(tmp_path))["train"].labels == [0, 1, 2]
    assert "classes.txt has the name '2' in place 1" in caplog.text


def test_a_name_that_classes_txt_has_not_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog")
    for split in ("train", "test"):
        shard_of(tmp_path / f"{split}.tar", 6, label=lambda number: ("Cat", "dog")[number % 2])
    with pytest.raises(ValueError, match=r"label 'Cat' .* no class of cat, dog; it has 'cat'"):
        load_data(DataConfig("tiny", str(tmp_path)), ModelConfig(num_classes=2))


def test_keys_of_other_bytes_than_utf8_are_read_and_shown_as_text(tmp_path):
    for split in ("train", "test"):
        shard_of(tmp_path / f"{split}.tar", 3, prefix="caf\udce9")
    train = webdataset.read(walk(tmp_path))["train"]
    assert train.labels == [0, 1, 2]
    assert train.name(1) == rf"{tmp_path}/train.tar:caf\xe9001"


def test_a_word_without_a_number_is_refused_with_its_sample(tmp_path):
    for split in ("train", "test"):
        shard_of(tmp_path / f"{split}.tar", 3, label="abc".__getitem__)
    with pytest.raises(ValueError, match=r"train.tar:s000: label 'a'.*classes.txt"):
        load_data(DataConfig("tiny", str(tmp_path)), ModelConfig())
    (tmp_path / "classes.txt").write_bytes(b"a\nb\xe9\nc")
    with pytest.raises(ValueError, match=r"classes.txt is not UTF-8"):
        load_data(DataConfig("tiny", str(tmp_path)), ModelConfig())


def labelled(path, *files):
    return write_shard(path / "train.tar", [("a.png", PNG), *files])


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ([("a.cls", b"1"), ("a.cls", b"1\n")], 1),
        ([("a.json", b'{"label": "dog"}'), ("a.cls", b"1")], 1),  # the name counts as its number
        ([("a.json", b'{"label": "Labrador"}'), ("a.cls", b"1")], 1),  # no class: words about the image
        ([("a.json", b'{"label": null}'), ("a.cls", b"1")], 1),
        ([("a.json", b'{"width": 3}')], None),
        ([("a.CLS", b"dog")], 1),
        ([("a.depth.cls", b"0"), ("a.cls", b"1")], 1),
        ([], None),
    ],
)
def test_labels_that_agree_are_one(tmp_path, files, label):
    assert index_shard(labelled(tmp_path, *files), {"cat": 0, "dog": 1})[0][-1] == label


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.cls", b"1"), ("a.cls", b"0")], "two labels, 1 in a.cls and 0 in a.cls"),
        ([("a.json", b'{"label": 0}'), ("a.cls", b"1")], "two labels, 0 in a.json and 1 in a.cls"),
        ([("a.json", b'{"label": "cat"}'), ("a.cls", b"1")], "two labels, 0 in a.json and 1 in a.cls"),
        ([("a.json", b'{"label": 0, "label": 1}')], "two labels, 0 in a.json and 1 in a.json"),
        ([("a.json", b'{"label": 0.0}'), ("a.cls", b"1")], "two labels, 0.0 in a.json and 1 in a.cls"),
        ([("a.cls", b"Labrador"), ("a.json", b'{"label": "Boxer"}')], "two labels, 'Labrador' in a.cls and 'Boxer' in a.json"),
        ([("b.cls", b"0")], "sample b .*b.cls"),
        ([("b.heic", b""), ("b.cls", b"0")], "sample b .*b.cls"),
        ([("22.5.png", PNG), ("22.5.cls", b"1")], "sample 22 .*22.5.cls"),
    ],
)
def test_labels_that_disagree_or_belong_to_no_image_are_refused(tmp_path, files, message):
    assert re.search(message, refusal(labelled(tmp_path, *files)))


def test_an_image_without_a_label_is_named(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tar", [*SAMPLES, ("x.png", PNG)])
    with pytest.raises(ValueError, match=r"train.tar:x has no label$"):
        load_data(DataConfig("tiny", str(tmp_path)), ModelConfig(image_size=(8, 8), patch_size=4, num_classes=2))


def test_shards_without_any_label_give_way_to_the_validation_set(tmp_path):
    for split, files in (("train", SAMPLES), ("val", SAMPLES), ("test", [("0.png", PNG)])):
        write_shard(tmp_path / f"{split}.tar", files)
    assert webdataset.read(walk(tmp_path))["test"].labels == [1, 1, 1]
    (tmp_path / "val.tar").unlink()
    with pytest.raises(ValueError, match="labels in test"):
        webdataset.read(walk(tmp_path))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_link_in_place_of_a_file_is_refused(tmp_path, kind):
    shard = labelled(tmp_path)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        tar.addfile(link)
    assert "b.png is a link" in refusal(shard)


def test_hidden_files_and_notes_are_left_out(tmp_path):
    files = [
        ("._a.png", b""),
        ("__MACOSX/._a.png", b""),
        ("x/.b.cls", b"0"),
        ("a.txt", b"a dog"),
        ("meta.json", b'{"made": 1}'),
    ]
    assert index_shard(labelled(tmp_path, *files))[0][0::3] == ("a", None)


def test_one_key_written_in_two_ways_is_one_sample(tmp_path):
    files = [("a.png", png(1)), ("a.cls", b"0"), ("./a.png", png(2))]
    assert "two images, a.png and ./a.png" in refusal(write_shard(tmp_path / "train.tar", files))
    assert keys_of(write_shard(tmp_path / "one.tar", [("./a.png", png(1)), ("a.cls", b"\xef\xbb\xbf1")])) == ["./a"]


def test_images_of_kinds_that_are_not_read_are_told_unless_another_stands_for_them(tmp_path, caplog):
    files = [("a.png", png(1)), ("a.cls", b"0"), ("a.gif", b"x"), ("b.avif", b"x")]
    assert keys_of(write_shard(tmp_path / "train.tar", files)) == ["a"]
    assert "train.tar: 1 image is left out, b.avif" in caplog.text
