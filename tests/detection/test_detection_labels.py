"""Categories of COCO files go by name; ids and names that are there twice are refused."""

import json

import pytest
from PIL import Image

from sape2.detection.coco import open_split


def write_coco(where, split, categories, changes=None):
    (where / split / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(where / split / "images" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"id": 1, "image_id": 1, "category_id": categories[0][0], "bbox": [1, 1, 9, 9]}],
    }
    (where / split / "annotations.json").write_text(json.dumps(content | (changes or {})))


def test_categories_of_other_ids_are_matched_by_name(tmp_path):
    write_coco(tmp_path, "train", [(7, "cat"), (90, "dog")])
    write_coco(tmp_path, "test", [(1, "dog"), (2, "cat")])
    train, test = open_split(tmp_path, "train"), open_split(tmp_path, "test")
    test.match_classes(train)
    assert test.classes == ("cat", "dog")
    assert train[0][1]["labels"].tolist() == [1]
    assert test[0][1]["labels"].tolist() == [2]


def test_a_category_of_one_split_only_is_refused(tmp_path):
    write_coco(tmp_path, "train", [(1, "cat")])
    write_coco(tmp_path, "test", [(1, "Cat")])
    with pytest.raises(ValueError, match=r"has the category 'Cat', which .* has not"):
        open_split(tmp_path, "test").match_classes(open_split(tmp_path, "train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": f"{n}.png", "height": 48, "width": 64} for n in "ab"]},
            "id 1 twice: a.png and b.png",
        ),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "id 1 twice: cat and dog"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]}, "categories 1 and 2 both have the name 'cat'"),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, n, 9]} for n in (8, 9)]},
            "annotations has id 1 twice",
        ),
    ],
)
def test_repeated_ids_are_refused_with_both_entries(tmp_path, changes, message):
    write_coco(tmp_path, "train", [(1, "cat")], changes)
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path, "train")
