"""`sape2 detect` finds what is wrong with either split before the first step, and tells what it changes or leaves out."""

import os
import shutil

import pytest
import torch
from coco_cases import SETTINGS, write_coco
from PIL import Image

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_detection_recipe
from sape2.detection import create_detector, evaluate_detector, open_split
from sape2.detection.batches import make_transform, padded_size
from sape2.detection.splits import check_sizes, open_images

pytest.importorskip("faster_coco_eval")
SETS = [text for setting in SETTINGS for text in ("--set", setting)]


def command(root, *more):
    """Of a run in root/run on the images in root/data."""
    detect = ["detect", "coco", "--data", root / "data", "--encoding", "ape", "--model", "vit_nano", "--out", root / "run"]
    return [*map(str, detect), *SETS, *more]


@pytest.fixture
def line_of(tmp_path, capfd):
    """The line with which the command ends before its first step; nothing is left of the run."""

    def give(*more):
        assert main(command(tmp_path, *more)) == 2
        err = capfd.readouterr().err
        assert "epoch" not in err
        assert not (tmp_path / "run").exists()
        lines = [line for line in err.splitlines() if line.startswith("sape2: ")]
        assert lines == err.splitlines()[-1:]
        return lines[0]

    return give


def picture(root, split, number):
    return root / "data" / split / "images" / f"{number}.png"


# --- the pixels of both splits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["cut", "no image", "empty", "another size", "not readable"])
def test_an_image_that_cannot_be_read_is_named_with_its_id(tmp_path, line_of, split, kind):
    write_coco(tmp_path / "data")
    path = picture(tmp_path, split, 3)
    data = path.read_bytes()
    if kind == "another size":
        Image.new("RGB", (60, 64)).save(path)
    elif kind == "not readable":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "no image": b"no image", "empty": b""}[kind])
    line = line_of()
    assert "3.png" in line
    assert "image 4" in line
    assert str(tmp_path / "data" / split) in line


@pytest.mark.parametrize(("size", "right"), [((64, 32), True), ((32, 64), True), ((32, 32), False)])
def test_width_and_height_may_be_those_before_or_after_turning_and_no_other(tmp_path, line_of, capfd, size, right):
    def lying(values):
        values["images"][3].update(width=size[0], height=size[1])
        values["annotations"][3].update(bbox=[4, 4, 20, 20], area=400)

    write_coco(tmp_path / "data", {"test": lying})
    stored = Image.new("RGB", (64, 32))
    stored.getexif()[0x0112] = 6
    stored.save(picture(tmp_path, "test", 3), exif=stored.getexif())
    if right:
        assert main(command(tmp_path)) == 0
        err = capfd.readouterr().err
        assert "cut off" not in err
        assert ("EXIF would turn, left as they are stored" in err) == (size == stored.size)  # they may be drawn on either
    else:
        assert "image 4" in line_of()


# --- thin images -------------------------------------------------------------------------------------------------------


def thin(width, height):
    def change(values):
        values["images"][2].update(width=width, height=height)
        values["annotations"][2].update(bbox=[0, 0, width, height], area=width * height, segmentation=None)

    return change


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [(2, 1000), (1000, 2)])
def test_an_image_so_thin_that_no_pixel_is_left_is_refused(tmp_path, line_of, split, size):
    write_coco(tmp_path / "data", {split: thin(*size)})
    Image.new("RGB", size).save(picture(tmp_path, split, 2))
    line = line_of()
    assert "image 3 (2.png)" in line
    assert str(tmp_path / "data" / split) in line
    assert f"{size[1]}x{size[0]}" in line


def test_an_image_of_one_column_is_trained_on_and_measured(tmp_path):
    write_coco(tmp_path / "data", dict.fromkeys(("train", "test"), thin(1, 64)))
    for split in ("train", "test"):
        Image.new("RGB", (1, 64)).save(picture(tmp_path, split, 2))
    assert main(command(tmp_path)) == 0


@pytest.mark.parametrize("size", [(1000, 2), (2, 1000), (1, 97), (0, 5)])
def test_a_detector_refuses_what_was_planned_for_no_size(size):
    model = create_detector("vit_nano", encoding="ape", image_size=96, patch_size=8, num_classes=3).eval()
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        model([torch.rand(3, *size)])
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        padded_size(size, (96, 96), 16)


def test_jitter_that_leaves_no_pixel_is_refused_and_what_is_not_refused_can_be_jittered(tmp_path, line_of):
    write_coco(tmp_path / "data", {"train": thin(8, 1000)})
    Image.new("RGB", (8, 1000)).save(picture(tmp_path, "train", 2))
    images = open_split(tmp_path / "data", "train")
    check_sizes(images, (128, 128), 16)
    with pytest.raises(ValueError, match=r"image 3 .*images\.scale_jitter"):
        check_sizes(images, (128, 128), 16, low=0.5)
    check_sizes(images, (128, 128), 16, low=0.99)
    config = override(get_detection_recipe("coco"), ["images.scale_jitter=[0.99, 0.99]"])
    transform = make_transform(config.images, (128, 128))
    assert transform(*images[2])[0].shape == (3, 128, 128)
    assert "image 3 (2.png)" in line_of("--set", "images.scale_jitter=[0.1, 2.0]")


# --- what is measured --------------------------------------------------------------------------------------------------

NOTHING = {
    "no annotation": lambda values: values.update(annotations=[]),
    "crowds alone": lambda values: [entry.update(iscrowd=1) for entry in values["annotations"]],
    "boxes outside": lambda values: [entry.update(bbox=[70, 70, 9, 9]) for entry in values["annotations"]],
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", NOTHING)
def test_a_split_without_an_object_that_counts_is_refused(tmp_path, line_of, split, kind):
    write_coco(tmp_path / "data", {split: NOTHING[kind]})
    line = line_of()
    assert "no object" in line
    assert str(tmp_path / "data" / split / "annotations.json") in line


def test_a_limit_that_leaves_no_object_is_refused(tmp_path, line_of):
    write_coco(tmp_path / "data", {"test": lambda values: values["annotations"].pop(0)})
    assert "images.test_images" in line_of("--set", "images.test_images=1")


def test_nothing_is_measured_on_images_without_objects(tmp_path):
    write_coco(tmp_path, {"test": NOTHING["no annotation"]})
    config = override(get_detection_recipe("coco"), SETTINGS)
    with pytest.raises(ValueError, match="no object"):
        evaluate_detector(None, open_split(tmp_path, "test"), config)


@pytest.mark.parametrize("part", [[[12, 12, 30, 30]], None, {"size": [64, 64], "counts": "€"}])
def test_a_mask_that_only_the_test_images_lack_is_found_before_training(tmp_path, line_of, part):
    write_coco(tmp_path / "data", {"test": lambda values: values["annotations"][2].update(segmentation=part)})
    assert "test/annotations.json: annotation 3" in line_of("--set", "detector.masks=true")


def test_what_is_told_of_both_splits_stands_before_the_first_epoch(tmp_path, capfd):
    def change(values):
        values["annotations"][0].update(bbox=[50, 12, 40, 20], area=300)
        values["annotations"][1].pop("area")

    write_coco(tmp_path / "data", {"train": change, "test": change})
    assert main(command(tmp_path)) == 0
    lines = capfd.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if "epoch 1/1" in line)
    for split in ("train", "test"):
        told = [line for line in lines[:first] if line.startswith(str(tmp_path / "data" / split))]
        assert len(told) == 3
        assert "annotation 1" in told[0]
        assert "annotation 1" in told[1]
        assert "annotation 2" in told[2]


# --- one image, one split ----------------------------------------------------------------------------------------------


def test_a_folder_of_images_that_both_splits_use_is_refused(tmp_path, line_of):
    write_coco(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "images")
    (tmp_path / "data" / "test" / "images").symlink_to("../train/images")
    line = line_of()
    assert "4 of 4 test images" in line
    assert "image 1 of" in line


def test_a_file_of_the_other_split_is_refused_by_whatever_link(tmp_path, line_of):
    write_coco(tmp_path / "data")
    picture(tmp_path, "test", 2).unlink()
    picture(tmp_path, "test", 2).symlink_to(picture(tmp_path, "train", 5))
    assert "image 3" in line_of()
    common = tmp_path / "data" / "common"
    for split in ("train", "test"):
        shutil.move(tmp_path / "data" / split / "images", common / split)
        (tmp_path / "data" / split / "images").symlink_to("../common")
        annotations = tmp_path / "data" / split / "annotations.json"
        annotations.write_text(annotations.read_text().replace('"file_name": "', f'"file_name": "{split}/'))
    (common / "test" / "2.png").unlink()
    (common / "test" / "2.png").symlink_to(common / "train" / "5.png")
    line = line_of()
    assert "1 of 4 test images" in line
    assert "image 3 of" in line
    assert "image 6 of" in line


def test_copies_of_training_images_are_told(tmp_path, capfd):
    write_coco(tmp_path / "data")
    for number in (1, 2):
        shutil.copy(picture(tmp_path, "train", 5), picture(tmp_path, "test", number))
    assert main(command(tmp_path)) == 0
    err = capfd.readouterr().err
    assert "2 of 4 test images are copies of training images, the first: image 2 (1.png)" in err
    assert err.index("copies") < err.index("epoch 1/1")


def test_links_in_a_circle_are_refused(tmp_path, line_of):
    write_coco(tmp_path / "data")
    picture(tmp_path, "test", 2).unlink()
    os.symlink("2.png", picture(tmp_path, "test", 2))
    assert "image 3" in line_of()


def test_a_finished_run_is_not_shown_for_other_images(tmp_path, capfd):
    write_coco(tmp_path / "data")
    assert main(command(tmp_path)) == 0
    capfd.readouterr()
    assert main(command(tmp_path)) == 0
    assert "box_map" in capfd.readouterr().out
    write_coco(tmp_path / "data", {"test": lambda values: values["annotations"].pop()})
    assert main(command(tmp_path)) == 2
    assert "labels of its test images" in capfd.readouterr().err
    (tmp_path / "run" / "results.jsonl").unlink()  # trained, not measured yet
    assert main(command(tmp_path)) == 2


def test_images_are_not_opened_before_the_annotations_of_both_splits_are_right(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train" / "images" / "1.png").write_bytes(b"")
    config = override(get_detection_recipe("coco"), [*SETTINGS, f"images.source={tmp_path}"])
    train, test = open_images(config)
    assert (len(train), len(test)) == (8, 4)
