"""Every field of the COCO format, of either split: taken as it is, taken and told, or refused with the file and the id."""

import json
import re

import numpy as np
import pytest
import torch
from coco_cases import write_coco

from sape2.detection import open_split
from sape2.detection.coco import count_objects
from sape2.detection.masks import encode_segmentation

mask_library = pytest.importorskip("faster_coco_eval.core.mask")
HUGE = 10**400


def item(**fields):
    """Changes the third annotation, that of image 3."""
    return lambda values: values["annotations"][2].update(fields)


def without(field):
    return lambda values: values["annotations"][2].pop(field)


def image(**fields):
    return lambda values: values["images"][2].update(fields)


def category(**fields):
    return lambda values: values["categories"][1].update(fields)


def every(key, **fields):
    return lambda values: [entry.update(fields) for entry in values[key]]


def outline(*parts):
    return item(segmentation=list(parts))


def rle(**fields):
    return item(segmentation={"size": [64, 64], "counts": [1000, 96, 3000]} | fields)


def both(*changes):
    return lambda values: [change(values) for change in changes]


COMPRESSED = mask_library.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))["counts"].decode()

# --- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "bbox of strings": (item(bbox=["10", "12", "24", "20"]), "annotation 3 needs bbox"),
    "bbox NaN": (item(bbox=[1, 2, float("nan"), 4]), "annotation 3 needs bbox"),
    "bbox infinite": (item(bbox=[1, 2, float("inf"), 4]), "annotation 3 needs bbox"),
    "bbox beyond floats": (item(bbox=[1, 2, HUGE, 4]), "annotation 3 needs bbox"),
    "bbox of booleans": (item(bbox=[True, 2, 3, 4]), "annotation 3 needs bbox"),
    "bbox of three": (item(bbox=[1, 2, 3]), "annotation 3 needs bbox"),
    "bbox null": (item(bbox=None), "annotation 3 needs bbox"),
    "bbox of null": (item(bbox=[1, 2, None, 4]), "annotation 3 needs bbox"),
    "bbox an object": (item(bbox={"x": 1}), "annotation 3 needs bbox"),
    "bbox missing": (without("bbox"), "annotation 3 needs bbox"),
    "width negative": (item(bbox=[40, 12, -24, 20]), "annotation 3 needs bbox .*negative"),
    "area a string": (item(area="480"), "annotation 3 needs area"),
    "area NaN": (item(area=float("nan")), "annotation 3 needs area"),
    "area negative": (item(area=-480), "annotation 3 needs area"),
    "area beyond floats": (item(area=HUGE), "annotation 3 needs area"),
    "iscrowd 2": (item(iscrowd=2), "annotation 3 needs iscrowd .*2"),
    "iscrowd a string": (item(iscrowd="0"), "annotation 3 needs iscrowd"),
    "iscrowd a list": (item(iscrowd=[0]), "annotation 3 needs iscrowd"),
    "annotation of an unknown image": (item(image_id=99), "annotation 3 speaks of image 99"),
    "image_id a string": (item(image_id="3"), "annotation 3 speaks of image '3'"),
    "image_id a float": (item(image_id=3.0), "annotation 3 speaks of image 3.0"),
    "image_id a boolean": (item(image_id=True), "annotation 3 speaks of image True"),
    "image_id null": (item(image_id=None), "annotation 3 speaks of image None"),
    "image_id a list": (item(image_id=[3]), r"annotation 3 speaks of image \[3\]"),
    "annotation of an unknown category": (item(category_id=7), "annotation 3 has category 7.*1, 2"),
    "category_id a list": (item(category_id=[1]), "annotation 3 has category"),
    "category_id a string": (item(category_id="1"), "annotation 3 has category '1'"),
    "category_id null": (item(category_id=None), "annotation 3 has category None"),
    "annotation id a string": (item(id="c"), "annotation number 3 needs id .*'c'"),
    "annotation id a float": (item(id=3.5), "annotation number 3 needs id"),
    "annotation id twice": (item(id=2), "annotations has id 2 twice"),
    "annotation a number": (lambda values: values["annotations"].insert(2, 7), "annotation number 3 must be an object"),
    "image null": (lambda values: values["images"].append(None), "image number .* must be an object"),
    "image id a string": (image(id="3"), r"image number 3 needs id .*'3' in 2\.png"),
    "image id a float": (image(id=3.0), "image number 3 needs id"),
    "image id a boolean": (image(id=True), "image number 3 needs id"),
    "image id null": (image(id=None), "image number 3 needs id"),
    "image id twice": (image(id=2), r"images has id 2 twice: 1\.png and 2\.png"),
    "file_name null": (image(file_name=None), "image 3 needs file_name"),
    "file_name empty": (image(file_name=""), "image 3 needs file_name"),
    "file_name a number": (image(file_name=2), "image 3 needs file_name"),
    "file_name a folder": (image(file_name="."), "image 3 is missing"),
    "file_name missing": (image(file_name="nowhere.png"), "image 3 is missing"),
    "file_name with a NUL": (image(file_name="2.png\0"), "image 3 has a file_name that is no path"),
    "file_name half a character": (image(file_name="\ud800.png"), "image 3 has a file_name that is no path"),
    "file_name too long": (image(file_name="a" * 300 + ".png"), "image 3 (is missing|has a file_name)"),
    "file_name of other capitals": (image(file_name="2.PNG"), r"no file .*2\.PNG; it has '2\.png': write both alike"),
    "file_name outside": (image(file_name="../../secret.png"), "image 3 lies outside"),
    "file_name absolute": (image(file_name="/etc/hostname"), "image 3 lies outside"),
    "file_name with backslashes": (image(file_name="images\\2.png"), "image 3 is missing.*/"),
    "two images of one file": (image(file_name="1.png"), "images 2 and 3 "),
    "two images of one file by another path": (image(file_name="./../images/1.png"), "images 2 and 3 "),
    "height null": (image(height=None), r"image 3 \(2\.png\) needs height and width"),
    "height missing": (lambda values: values["images"][2].pop("height"), "image 3 .* needs height and width"),
    "height a string": (image(height="64"), "image 3 .* needs height and width"),
    "height a float": (image(height=64.0), "image 3 .* needs height and width"),
    "width 0": (image(width=0), "image 3 .* needs height and width"),
    "width negative number": (image(width=-64), "image 3 .* needs height and width"),
    "more pixels than are read": (image(width=10**7), "image 3 .* at most .* pixels"),
    "categories of one id": (category(id=1), "categories has id 1 twice: box and cup"),
    "categories that look alike": (category(name="box\u200b"), "look alike"),
    "a category whose name shows nothing": (category(name="\u200b"), "shows nothing"),
    "categories of one name": (category(name="box"), "categories 1 and 2 .*'box'"),
    "category id a string": (category(id="2"), "category number 2 needs id"),
    "category id null": (category(id=None), "category number 2 needs id"),
    "category name null": (category(name=None), "category 2 needs name .*None"),
    "category name a number": (category(name=2), "category 2 needs name"),
    "category name empty": (category(name=" "), "category 2 needs name"),
    "category a string": (lambda values: values["categories"].append("box"), "category number 3 must be an object"),
    "no category": (lambda values: values.update(categories=[], annotations=[]), "has no categories"),
    "no image": (lambda values: values.update(images=[], annotations=[]), "has no images"),
    "annotations null": (lambda values: values.update(annotations=None), "needs a list called annotations"),
    "images missing": (lambda values: values.pop("images"), "needs a list called images"),
    "annotations missing": (lambda values: values.pop("annotations"), "needs a list called annotations"),
    "segmentation missing": (without("segmentation"), "annotation 3 has no segmentation"),
    "segmentation null": (item(segmentation=None), "annotation 3 has no segmentation"),
    "segmentation empty": (item(segmentation=[]), "annotation 3 has no segmentation"),
    "segmentation a string": (item(segmentation="mask"), "annotation 3: .*polygons or run lengths"),
    "polygon not in a list": (outline(1, 2, 3, 4, 5, 6), "annotation 3: .* three points"),
    "polygon of two points": (outline([12, 12, 30, 30]), "annotation 3: .* three points"),
    "polygon of two points beside a whole one": (outline([12, 12, 30, 12, 30, 30], [1, 1, 2, 2]), "annotation 3: .* three"),
    "polygon of an odd length": (outline([12, 12, 30, 12, 30, 30, 9]), "annotation 3: .* three points"),
    "polygon of strings": (outline(["12", "12", "30", "12", "30", "30"]), "annotation 3: .* finite numbers"),
    "polygon NaN": (outline([12, 12, 30, 12, 30, float("nan")]), "annotation 3: .* finite numbers"),
    "polygon null": (outline(None), "annotation 3: .* three points"),
    "polygon far outside": (outline([12, 12, 1e9, 12, 30, 30]), "annotation 3: .* pixels outside"),
    "run lengths of another size": (rle(size=[32, 128]), "annotation 3: .* of 64x64"),
    "run lengths of no size": (rle(size=None), "annotation 3: .* of 64x64"),
    "run lengths of too few pixels": (rle(counts=[1000, 96]), "annotation 3: .* 4096 pixels"),
    "run lengths negative": (rle(counts=[5000, -904]), "annotation 3: .* 4096 pixels"),
    "run lengths of floats": (rle(counts=[1000.0, 96, 3000]), "annotation 3: .* 4096 pixels"),
    "run lengths null": (rle(counts=None), "annotation 3: counts"),
    "compressed, not ASCII": (rle(counts="€"), "annotation 3: compressed run lengths"),
    "compressed, cut": (rle(counts=COMPRESSED[:-9]), "annotation 3: compressed run lengths"),
    "compressed, empty": (rle(counts=""), "annotation 3: compressed run lengths"),
    "compressed, of a larger image": (rle(counts="zzzzzz"), "annotation 3: compressed run lengths"),
}


@pytest.mark.parametrize(("split", "name"), [*(("train", name) for name in REFUSED), ("test", "bbox of strings")])
def test_what_cannot_be_used_is_refused_with_file_and_id(tmp_path, name, split):
    change, message = REFUSED[name]
    write_coco(tmp_path, {split: change})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_split(tmp_path, split, masks=True)
    assert str(tmp_path / split / "annotations.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"images": 1}', "[" * 100_000, "\xff"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    write_coco(tmp_path)
    (tmp_path / "train" / "annotations.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"annotations\.json is (damaged|not in COCO format)"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("key", ["annotations", "bbox"])
def test_what_a_file_has_twice_is_refused(tmp_path, key):
    write_coco(tmp_path)
    path = tmp_path / "train" / "annotations.json"
    path.write_text(path.read_text().replace(f'"{key}": [', f'"{key}": [], "{key}": [', 1))
    with pytest.raises(ValueError, match=rf"annotations\.json is damaged: an object has '{key}' twice"):
        open_split(tmp_path, "train")


# --- taken and told ----------------------------------------------------------------------------------------------------

TOLD = {
    "corners in place of width and height": (
        lambda values: [entry.update(bbox=[10, 12, 70, 72]) for entry in values["annotations"]],
        "end outside of their image.*: 4, .*annotation 1 ",
        4,
    ),
    "one box over the border": (item(bbox=[50, 50, 20, 10], area=200), "end outside of their image.*: 1, .*annotation 3", 4),
    "box outside": (item(bbox=[70, 12, 24, 20]), "no size inside their image.*: 1, .*annotation 3", 3),
    "box of no width": (item(bbox=[12, 12, 0, 20]), "no size inside their image.*: 1, .*annotation 3", 3),
    "box thinner than a pixel": (item(bbox=[12, 12, 0.5, 20], area=10), "less than one pixel.*: 1, .*annotation 3", 4),
    "no area": (without("area"), "without area.*: 1, .*annotation 3", 4),
    "area null": (item(area=None), "without area.*: 1, .*annotation 3", 4),
    "area of another box": (item(area=4096), "areas that do not fit.*: 1, .*area 4096, annotation 3", 4),
    "area 0": (item(area=0), "without area, or of area 0.*: 1, .*annotation 3", 4),
    "area of half a box without outline": (both(item(area=100), without("segmentation")), "areas that do not fit", 4),
    "the same object twice": (
        lambda values: values["annotations"].append(values["annotations"][2] | {"id": 99}),
        "category and the box of another one.*: 1, .*annotation 99",
        5,
    ),
    "mask beside its box": (
        outline([50, 50, 60, 50, 60, 60, 50, 60]),
        "not those of their segmentation.*: 1, .*annotation 3",
        4,
    ),
    "corners that stay inside": (
        both(item(bbox=[12, 12, 36, 32]), outline([12, 12, 36, 12, 36, 32, 12, 32])),
        "not those of their segmentation.*: 1, .*annotation 3",
        4,
    ),
    "to be ignored": (item(ignore=1), "objects with ignore, taken as any other.*: 1, .*annotation 3", 4),
    "crowds alone": (item(iscrowd=1), "crowds alone.*: 1 of 4", 3),
    "an image without objects": (lambda values: values["annotations"].pop(2), "without an object: 1 of 4", 3),
    "a category that is never used": (
        lambda values: values["categories"].append({"id": 9, "name": "hat"}),
        "categories without an object here: 1 of 3, hat",
        4,
    ),
}


OF_MASKS = {
    "polygon over the border": (outline([50, 50, 70, 50, 70, 60, 50, 60]), "polygons that end outside.*: 1, .*annotation 3", 4),
    "polygon outside": (outline([70, 50, 90, 50, 90, 60]), "masks without a pixel.*: 1, .*annotation 3", 3),
    "polygon of no area": (outline([12, 12, 12, 12, 12, 12]), "masks without a pixel.*: 1, .*annotation 3", 3),
    "run lengths of nothing": (rle(counts=[4096]), "masks without a pixel.*: 1, .*annotation 3", 3),
    "run lengths beside their box": (rle(counts=[64, 64, 3968]), "not those of their segmentation.*: 1, .*annotation 3", 4),
}


@pytest.mark.parametrize("name", [*TOLD, *OF_MASKS])
def test_what_is_changed_or_left_out_is_told_with_a_count_and_an_example(tmp_path, name):
    change, note, objects = (TOLD | OF_MASKS)[name]
    images = open_split(write_coco(tmp_path, {"test": change}), "test", masks=name in OF_MASKS)
    assert any(re.search(note, told) for told in images.notes)
    assert all(told.startswith(str(tmp_path / "test" / "annotations.json")) for told in images.notes)
    assert sum(count_objects(images).values()) == objects
    assert all(len(images[index][1]["boxes"]) == len(images[index][1]["area"]) for index in range(4))


def test_a_box_over_the_border_is_cut_there_and_the_border_itself_is_inside(tmp_path):
    images = open_split(write_coco(tmp_path, {"test": item(bbox=[50, 50, 20, 10], area=200)}), "test")
    assert images[2][1]["boxes"].tolist() == [[50, 50, 64, 60]]
    rounded = both(item(bbox=[40.0, 40, 24.009, 24], area=576), outline([40, 40, 64, 40, 64, 64, 40, 64]))  # to hundredths
    write_coco(tmp_path, {"test": rounded})
    assert open_split(tmp_path, "test").notes == []


# --- right -------------------------------------------------------------------------------------------------------------


def other_ids(values):
    """Negative ids, zero, and ids beyond 32 bits."""
    names = {1: -5, 2: 0, 3: 2**40, 4: 7}
    for key, field in (("images", "id"), ("annotations", "image_id")):
        for entry in values[key]:
            entry[field] = names[entry[field]]
    for key, field in (("categories", "id"), ("annotations", "category_id")):
        for entry in values[key]:
            entry[field] -= 1


RIGHT = {
    "as it is": lambda values: None,
    "ids negative, zero and large": other_ids,
    "annotations without id": every("annotations", id=None),
    "iscrowd null": every("annotations", iscrowd=None),
    "iscrowd missing": lambda values: [entry.pop("iscrowd") for entry in values["annotations"]],
    "iscrowd a boolean": every("annotations", iscrowd=False),
    "fields that are not read": both(
        lambda values: values.update(info=None, licenses=["?"], type=7),
        every("images", license="none", date_captured=None, coco_url=3),
        every("annotations", keypoints=None, score="0.3"),
        every("categories", supercategory=None, isthing=2),
    ),
    "numbers with a point": lambda values: [e.update(bbox=list(map(float, e["bbox"]))) for e in values["annotations"]],
    "paths with dots": lambda values: [e.update(file_name=f"./../images/{e['file_name']}") for e in values["images"]],
    "outlines that are not asked for": every("annotations", segmentation=[[1, 2, 3, 4]]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_changes_nothing_is_taken_without_a_word(tmp_path, name):
    changed = open_split(write_coco(tmp_path / "changed", {"test": RIGHT[name]}), "test")
    plain = open_split(write_coco(tmp_path / "plain"), "test")
    assert changed.notes == []
    assert changed.classes == plain.classes
    for index in range(4):
        (pixels, target), (wanted_pixels, wanted) = changed[index], plain[index]
        assert torch.equal(pixels, wanted_pixels)
        for key in ("boxes", "labels", "area", "iscrowd"):
            assert torch.equal(target[key], wanted[key]), key


def test_a_byte_order_mark_and_files_in_folders_are_read(tmp_path):
    write_coco(tmp_path, {"test": lambda values: [e.update(file_name=f"a b/ü/{e['file_name']}") for e in values["images"]]})
    images, annotations = tmp_path / "test" / "images", tmp_path / "test" / "annotations.json"
    (images / "a b").mkdir()
    (images / "a b" / "ü").mkdir()
    for path in images.glob("*.png"):
        path.rename(images / "a b" / "ü" / path.name)
    annotations.write_text(annotations.read_text(), encoding="utf-8-sig")
    assert len(open_split(tmp_path, "test")[3][1]["boxes"]) == 1


def test_a_name_with_a_backslash_is_a_name_where_there_is_such_a_file(tmp_path):
    write_coco(tmp_path, {"test": image(file_name="a\\2.png")})
    (tmp_path / "test" / "images" / "2.png").rename(tmp_path / "test" / "images" / "a\\2.png")
    assert open_split(tmp_path, "test")[2][0].shape == (3, 64, 64)


def test_every_form_of_a_mask_gives_the_same_pixels(tmp_path):
    polygon, square = [12, 12, 36, 12, 36, 32, 12, 32], np.zeros((64, 64), np.uint8)
    square[12:32, 12:36] = 1
    counts = np.diff(np.flatnonzero(np.diff(np.pad(square.T.ravel(), 1)) != 0), prepend=0, append=64 * 64).tolist()
    forms = [
        outline(polygon),
        outline([12, 12, 24, 12, 24, 32, 12, 32], [24, 12, 36, 12, 36, 32, 24, 32]),
        rle(counts=counts),
        rle(counts=mask_library.encode(np.asfortranarray(square))["counts"].decode()),
    ]
    for number, form in enumerate(forms):
        images = open_split(
            write_coco(tmp_path / str(number), {"test": both(item(bbox=[12, 12, 24, 20]), form)}), "test", masks=True
        )
        assert images.notes == []
        assert (images[2][1]["masks"][0].numpy() == square).all()


def test_a_boolean_crowd_is_a_crowd(tmp_path):
    images = open_split(write_coco(tmp_path, {"test": item(iscrowd=True)}), "test")
    assert images[2][1]["iscrowd"].tolist() == [1]


def test_images_beyond_the_limit_are_checked_but_neither_opened_nor_told(tmp_path):
    write_coco(tmp_path, {"train": both(image(file_name="nowhere.png"), item(bbox=[70, 12, 24, 20]))})
    assert open_split(tmp_path, "train", limit=2).notes == []
    write_coco(tmp_path, {"train": image(height=None)})
    with pytest.raises(ValueError, match=r"image 3 .* needs height"):
        open_split(tmp_path, "train", limit=2)


def test_one_split_in_two_layouts_is_refused(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps({}))
    assert open_split(tmp_path, "train")
    with pytest.raises(ValueError, match=r"instances_val2017\.json"):
        open_split(tmp_path, "test")


def test_images_that_the_annotations_do_not_list_are_told(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "test" / "images" / "more").mkdir()
    (tmp_path / "test" / "images" / "more" / "9.png").write_bytes((tmp_path / "test" / "images" / "1.png").read_bytes())
    (tmp_path / "test" / "images" / "notes.txt").write_text("x")
    [note] = open_split(tmp_path, "test").notes
    assert "left out: 1, more/9.png" in note
    assert open_split(tmp_path, "test", limit=2).notes == []


def test_the_size_of_run_lengths_may_be_written_with_a_point():
    wanted = encode_segmentation({"size": [4, 3], "counts": [2, 5, 5]}, (4, 3))
    assert encode_segmentation({"size": [4.0, 3.0], "counts": [2, 5, 5]}, (4, 3)) == wanted


def test_a_split_is_opened_by_a_path_of_either_kind_and_another_word_is_refused(tmp_path):
    write_coco(tmp_path)
    assert len(open_split(str(tmp_path), "train")) == len(open_split(tmp_path, "train")) == 8
    with pytest.raises(ValueError, match="unknown split 'val'; known splits: train, test"):
        open_split(tmp_path, "val")
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_split(tmp_path / "train" / "annotations.json", "train")
