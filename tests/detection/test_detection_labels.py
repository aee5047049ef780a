"""Categories of COCO files go by name."""

import json

import pytest
from PIL import Image

from sape2.detection.coco import open_split


def write_coco(where, split, categories):
    (where / split / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(where / split / "images" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"id": 1, "image_id": 1, "category_id": categories[0][0], "bbox": [1, 1, 9, 9]}],
    }
    (where / split / "annotations.json").write_text(json.dumps(content))


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
    with pytest.raises(ValueError, match="'Cat'"):
        open_split(tmp_path, "test").match_classes(open_split(tmp_path, "train"))
