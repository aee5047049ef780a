"""The composed set against brute force, COCO files of every kind and every mistake, and the metrics on known cases."""

import json
import shutil

import numpy as np
import pytest
import torch
from image_cases import colours, turned
from PIL import Image

from sape2.config.detection import ImagesConfig
from sape2.detection import composed
from sape2.detection.batches import TrainView, epoch_batches, make_transform, one_size_batches, padded_size
from sape2.detection.coco import count_objects, open_split
from sape2.detection.composed import MIN_VISIBLE, TEST_COLUMNS, TEST_EVERY, _draw, _sources, compose, run_lengths
from sape2.detection.masks import decode_run_lengths, encode_segmentation
from sape2.detection.metrics import metric_rows

pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compose(tmp_path_factory.mktemp("data") / "digits", train_images=10, test_images=6)


# --- the composed set ------------------------------------------------------------------------------------------------


def test_boxes_are_the_tight_boxes_of_masks(folder):
    for split in ("train", "test"):
        images = open_split(folder, split, masks=True)
        for _, target in (images[i] for i in range(len(images))):
            for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
                places = [(y, x) for y, row in enumerate(mask.tolist()) for x, value in enumerate(row) if value]
                rows, columns = zip(*places, strict=True)
                assert box.tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
                assert area == len(places)


def test_masks_do_not_overlap_and_digits_stay_visible(folder):
    images = open_split(folder, "train", masks=True)
    assert all(images[i][1]["masks"].sum(0).max() == 1 for i in range(len(images)))
    photographs, digits, labels = _sources()
    overlaps = 0
    for number in range(40):
        _, visible, items, _ = _draw(photographs, digits, labels, "train", np.random.default_rng([0, 0, number]))
        for seen, item in zip(visible, items, strict=True):
            assert seen.sum() >= MIN_VISIBLE * item.mask.sum()
            overlaps += seen.sum() < item.mask.sum()
    assert overlaps > 5  # digits do cover one another


def test_outside_of_masks_the_image_is_the_photograph(folder):
    photographs = dict(zip(("china.jpg", "flower.jpg"), _sources()[0], strict=True))
    values = json.loads((folder / "train" / "annotations.json").read_text())
    images = open_split(folder, "train", masks=True)
    for entry, (pixels, target) in zip(values["images"], (images[i] for i in range(len(images))), strict=True):
        crop = entry["crop"]
        cut = photographs[crop["photograph"]][crop["top"] :, crop["left"] :][: crop["height"], : crop["width"]]
        size = (entry["width"], entry["height"])
        ground = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BILINEAR))
        same = (torch.from_numpy(ground.copy()).permute(2, 0, 1) == pixels).all(0)
        covered = target["masks"].any(0).bool()
        assert same[~covered].all()
        assert same[covered].float().mean() < 0.05


def test_training_and_test_share_neither_digits_nor_places(folder):
    items, columns = {}, {}
    for split in ("train", "test"):
        values = json.loads((folder / split / "annotations.json").read_text())
        items[split] = {entry["item"] for entry in values["annotations"]}
        crops = [entry["crop"] for entry in values["images"]]
        columns[split] = (min(c["left"] for c in crops), max(c["left"] + c["width"] for c in crops))
    assert not items["train"] & items["test"]
    assert all((item % TEST_EVERY == 0) == (split == "test") for split, found in items.items() for item in found)
    assert columns["train"][1] <= TEST_COLUMNS <= columns["test"][0]


def test_labels_are_those_of_the_digits(folder):
    labels = _sources()[2]
    values = json.loads((folder / "test" / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in values["categories"]}
    assert all(names[entry["category_id"]] == str(labels[entry["item"]]) for entry in values["annotations"])
    counts = count_objects(open_split(folder, "test"))
    assert list(counts) == [str(digit) for digit in range(10)]
    assert sum(counts.values()) == len(values["annotations"])


def test_a_seed_gives_the_same_bytes_and_a_longer_set_begins_with_them(folder, tmp_path):
    longer = compose(tmp_path / "longer", train_images=11, test_images=1)
    other = compose(tmp_path / "other", train_images=1, test_images=1, seed=1)
    first, same, different = (path / "train" / "images" / "000000.png" for path in (folder, longer, other))
    assert first.read_bytes() == same.read_bytes() != different.read_bytes()


def test_a_composed_folder_is_taken_up_and_another_refused(folder, tmp_path):
    before = (folder / "composed.json").stat().st_mtime_ns
    assert compose(folder, 10, 6) == folder
    assert (folder / "composed.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=f"^{folder} "):
        compose(folder, 11, 6)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"^{tmp_path} "):
        compose(tmp_path, 1, 1)
    (tmp_path / "composed.json").write_text("{")
    with pytest.raises(ValueError, match=r"composed\.json is damaged"):
        compose(tmp_path, 1, 1)


def test_a_set_is_composed_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert compose(str(tmp_path / "link"), 1, 1) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"train", "test", "composed.json"}


def test_nothing_is_left_of_a_composition_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(composed, "_write_split", lambda folder, *_: folder.mkdir(parents=True) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compose(tmp_path / "set", 1, 1)
    assert list(tmp_path.iterdir()) == []


# --- masks -----------------------------------------------------------------------------------------------------------


def decoded(segmentation, size):
    return decode_run_lengths(encode_segmentation(segmentation, size))


def test_run_lengths_and_their_compressed_form_decode_to_the_mask():
    from faster_coco_eval.core import mask as rle

    generator = np.random.default_rng(0)
    for mask in (generator.random((5, 7)) > 0.5, np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        size = mask.shape
        assert (decoded({"size": list(size), "counts": run_lengths(mask)}, size) == mask).all()
        compressed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert (decoded({"size": list(size), "counts": compressed["counts"]}, size) == mask).all()


def test_polygons_are_filled_and_joined():
    mask = decoded([[1, 1, 4, 1, 4, 3, 1, 3], [5, 0, 6, 0, 6, 4, 5, 4]], (4, 6))
    wanted = np.zeros((4, 6))
    wanted[1:3, 1:4] = 1
    wanted[:, 5] = 1
    assert (mask == wanted).all()


# --- files -----------------------------------------------------------------------------------------------------------


def whole():
    square = [[2, 2, 6, 2, 6, 6, 2, 6]]
    right = {"size": [8, 10], "counts": [60, 20]}
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 8, "width": 10},
            {"id": 9, "file_name": "b.png", "height": 6, "width": 6},
        ],
        "categories": [{"id": 44, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 44, "bbox": [2, 2, 4, 4], "area": 16, "segmentation": square},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [6, 0, 9, 3.0], "iscrowd": 1, "segmentation": right},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [1, 1, 0, 4], "segmentation": square},
        ],
    }


@pytest.fixture
def write(tmp_path):
    """Writes a published layout with changed annotations; gives its folder."""

    def written(change=lambda values: None):
        values = whole()
        change(values)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "train2017").mkdir(exist_ok=True)
        for name, size in (("a", (10, 8)), ("b", (6, 6))):
            Image.new("L", size, 100).save(tmp_path / "train2017" / f"{name}.png")
        (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(values))
        return tmp_path

    return written


def test_published_layout_crowds_empty_images_and_boxes_of_no_size(write):
    images = open_split(write(), "train", masks=True)
    assert images.classes == ("dog", "cat")
    assert images.sizes == [(8, 10), (6, 6)]
    pixels, target = images[0]
    assert pixels.shape == (3, 8, 10)
    assert target["boxes"].tolist() == [[2, 2, 6, 6], [6, 0, 10, 3]]  # the second is cut at the border
    assert target["labels"].tolist() == [2, 1]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [16, 12]
    assert target["masks"].sum((1, 2)).tolist() == [16, 20]
    empty = images[1][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 6, 6)
    told = ["end outside of their image", "not those of their segmentation", "without area", "of no size inside their image"]
    told += ["1 of 2", "1 of 2, dog"]
    for note, wanted in zip(images.notes, told, strict=True):
        assert wanted in note
    assert "annotation 3" in images.notes[3]
    assert count_objects(images) == {"dog": 0, "cat": 1}


def test_training_leaves_crowds_out(write):
    view = TrainView(
        open_split(write(), "train", masks=True), make_transform(ImagesConfig(flip=False), (8, 10)), seed=0, epoch=0
    )
    image, target = view[0]
    assert image.dtype == torch.float32
    assert image.max() == 100 / 255
    assert target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, 8, 10)


def test_damage_is_named(write):
    folder = write(lambda values: values["images"][0].update(width=11))
    with pytest.raises(ValueError, match=r"a\.png .*8x10.* 8x11.* image 7"):
        open_split(folder, "train")[0]
    (folder / "train2017" / "a.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(ValueError, match=r"a\.png .image 7 "):
        open_split(folder, "train")[0]
    (folder / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017\.json is damaged"):
        open_split(folder, "train")
    with pytest.raises(FileNotFoundError, match="instances_val2017"):
        open_split(folder, "test")
    shutil.rmtree(folder / "train2017")
    with pytest.raises(FileNotFoundError, match=f"{folder}/train2017"):
        open_split(folder / "train2017", "train")


def lying(folder, width, height):
    """The first image is stored as 4x6 with EXIF orientation 6; annotations say `width` and `height`."""
    image = turned(6, 4, 6)
    image.save(folder / "train2017" / "a.png", exif=image.getexif())
    path = folder / "annotations" / "instances_train2017.json"
    values = json.loads(path.read_text())
    values["images"][0].update(width=width, height=height)
    values["annotations"] = [{"id": 1, "image_id": 7, "category_id": 44, "bbox": [1, 0, 2, 3]}]
    path.write_text(json.dumps(values))
    return open_split(folder, "train")


def test_an_image_lies_as_its_boxes_do(write):
    stored = torch.from_numpy(colours(4, 6)).permute(2, 0, 1)
    for (width, height), pixels in (((6, 4), stored), ((4, 6), stored.rot90(-1, (1, 2)))):
        found, target = lying(write(), width, height)[0]
        assert torch.equal(found.as_subclass(torch.Tensor), pixels)
        assert target["boxes"].tolist() == [[1, 0, 3, 3]]
    with pytest.raises(ValueError, match=r"a\.png .*6x4.* 5x5"):
        lying(write(), 5, 5)[0]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_padded_size_is_what_the_model_sees():
    assert padded_size((96, 64), (96, 96), 16) == (96, 64)
    assert padded_size((480, 640), (1024, 1024), 64) == (768, 1024)
    assert padded_size((500, 333), (1024, 1024), 64) == (1024, 704)
    assert padded_size((30, 60), (60, 30), 8) == (32, 64)  # fitted either way up


def test_batches_hold_one_size_as_far_as_these_fill_them():
    sizes = [(8, 8)] * 7 + [(8, 16)] * 6 + [(16, 8)] * 4
    first, again, later = (epoch_batches(sizes, 3, 0, epoch) for epoch in (0, 0, 1))
    assert first == again != later
    for batches in (first, later):
        flat = [index for batch in batches for index in batch]
        assert len(flat) == len(set(flat)) == 15  # of 17, a whole number of batches
        assert sum(len({sizes[i] for i in batch}) == 1 for batch in batches) == 5
    assert sorted(i for batch in one_size_batches(sizes, 3) for i in batch) == list(range(17))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in one_size_batches(sizes, 3))
    with pytest.raises(ValueError, match="18"):
        epoch_batches(sizes, 18, 0, 0)


def test_augmentation_moves_boxes_with_masks_and_is_seeded(folder):
    images = open_split(folder, "train", masks=True)
    transform = make_transform(ImagesConfig(flip=True, scale_jitter=(0.5, 2.0)), (64, 80))
    flipped = 0
    for number in range(6):
        one, other = (TrainView(images, transform, seed=0, epoch=0)[number] for _ in range(2))
        assert torch.equal(one[0], other[0])
        pixels, target = one
        assert pixels.shape == (3, 64, 80)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        flipped += not torch.equal(TrainView(images, transform, seed=0, epoch=1)[number][0], pixels)
    assert flipped == 6


def test_a_flip_mirrors_pixels_boxes_and_masks(folder):
    images = open_split(folder, "train", masks=True)
    plain, flipping = (make_transform(ImagesConfig(flip=flag), (96, 96)) for flag in (False, True))
    mirrored = 0
    for number in range(len(images)):
        (pixels, target), (turned, moved) = (TrainView(images, t, 0, 0)[number] for t in (plain, flipping))
        if torch.equal(pixels, turned):
            continue
        mirrored += 1
        assert torch.equal(pixels.flip(-1), turned)
        assert torch.equal(target["masks"].flip(-1), moved["masks"])
        width = pixels.shape[-1]
        assert moved["boxes"][:, [0, 2]].tolist() == (width - target["boxes"][:, [2, 0]]).tolist()
    assert 0 < mirrored < len(images)


# --- metrics ---------------------------------------------------------------------------------------------------------


def perfect(targets):
    rows = [{key: target[key][target["iscrowd"] == 0] for key in ("boxes", "labels", "masks")} for target in targets]
    return [row | {"scores": torch.linspace(0.9, 0.5, len(row["labels"]))} for row in rows]


def rows_of(predictions, targets, masks=True):
    return metric_rows([(predictions[i : i + 2], targets[i : i + 2]) for i in range(0, len(targets), 2)], masks)


def values(predictions, targets, masks=True):
    return {row["name"]: row["value"] for row in rows_of(predictions, targets, masks)}


def test_metrics_of_perfect_shifted_and_wrong_detections(folder, write):
    images = open_split(folder, "test", masks=True)
    targets = [images[i][1] for i in range(len(images))]
    right = values(perfect(targets), targets)
    assert {name: right[name] for name in ("box_map", "box_map_50", "box_mar_100", "mask_map")} == pytest.approx(
        dict.fromkeys(("box_map", "box_map_50", "box_mar_100", "mask_map"), 1.0)
    )
    shifted = [row | {"boxes": row["boxes"] + 4.0} for row in perfect(targets)]
    found = values(shifted, targets)
    assert 0 < found["box_map"] < 0.9
    assert found["mask_map"] == pytest.approx(1.0)  # the masks did not move
    far = [row | {"boxes": row["boxes"] + 1000.0} for row in perfect(targets)]
    assert values(far, targets, masks=False)["box_map"] == 0
    wrong = [row | {"labels": row["labels"] % 10 + 1} for row in perfect(targets)]
    assert values(wrong, targets, masks=False)["box_map_50"] < 0.3
    nothing = [{key: value[:0] for key, value in row.items()} for row in perfect(targets)]
    assert values(nothing, targets)["mask_map"] == 0
    assert "box_map_large" not in right  # no digit is that large


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong(write):
    target = open_split(write(), "train", masks=True)[0][1]
    inside = {
        "boxes": torch.tensor([[2.0, 2, 6, 6], [6, 0, 9, 3]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.8]),
    }
    assert values([inside], [target], masks=False)["box_map"] == pytest.approx(1.0)
    outside = inside | {
        "boxes": torch.tensor([[2.0, 2, 6, 6], [0, 0, 2, 2]]),
        "labels": torch.tensor([2, 2]),
        "scores": torch.tensor([0.8, 0.9]),
    }
    assert values([outside], [target], masks=False)["box_map"] == pytest.approx(0.5)


def test_rows_say_what_they_are(folder):
    images = open_split(folder, "test", masks=True)
    targets = [images[i][1] for i in range(len(images))]
    rows = rows_of(perfect(targets), targets, masks=False)
    row = rows[0]
    assert all(row["name"].startswith("box") for row in rows)
    assert (row["measure"], row["name"], row["unit"], row["n"]) == ("detection", "box_map", "fraction", 6)
    assert row["objects"] == sum(len(target["labels"]) for target in targets)
    assert "0.50:0.05:0.95" in row["protocol"]
