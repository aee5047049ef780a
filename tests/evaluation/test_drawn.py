"""Which images a limit leaves, and intervals: by class whatever the order of the set, Wilson's for shares, none of no width."""

import numpy as np
import pytest
import torch
from evaluation_cases import Images, random_vit

from sape2.data import ImageData
from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import LIMITS, drawn, images_taken, interval_of, mean_row, wilson_interval
from sape2.evaluation.measures import MEASURES


def sorted_images(classes=5, each=8, size=8):
    """As a folder of classes gives them: one class after the other."""
    pixels = torch.randint(0, 256, (classes * each, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(classes).repeat_interleave(each)
    return ImageData(pixels, labels, tuple("abcdefgh"[:classes]), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("limit", [5, 10, 25])
def test_a_limit_takes_every_class_in_its_share(limit):
    data = sorted_images()
    assert drawn(data, limit).labels.bincount().tolist() == [limit // 5] * 5
    assert drawn(data, limit).labels.cpu().tolist() == drawn(data, limit).labels.tolist()


def test_a_smaller_draw_is_a_part_of_a_larger_one_and_the_same_every_time():
    data = sorted_images()
    few, more = (set(drawn(data, n).index.tolist()) for n in (5, 20))
    assert few < more
    assert few == set(drawn(data, 5).index.tolist())
    assert drawn(data, None) is data
    assert drawn(data, 40) is data


def test_a_set_that_takes_no_index_gives_the_same_images():
    data = sorted_images()
    plain = Images(torch.cat([images for images, _ in data.batches(7)]), data.labels)
    for ours, theirs in zip(drawn(data, 10).batches(4), drawn(plain, 10).batches(4), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("accuracy", "cost")])
def test_every_measure_sees_all_classes_of_a_sorted_set(name, monkeypatch):
    """Also in the shares that the parts of a measure take."""
    seen = []
    batches = ImageData.batches

    def watched(self, batch_size):
        seen.append(self.labels)
        yield from batches(self, batch_size)

    monkeypatch.setattr(ImageData, "batches", watched)
    list(MEASURES[name](random_vit("sape2", torch.float32), sorted_images(each=4), 5))
    assert {len(labels) for labels in seen} - {20} == {5}  # of all 20 only a first batch, for the size of an image
    assert all(set(labels.tolist()) == set(range(5)) for labels in seen)


def test_accuracy_over_a_few_images_is_that_of_all_classes():
    rows = accuracy(random_vit("ape", torch.float32), sorted_images(), limit=10)
    assert {row["class"] for row in rows if row["name"] == "class_accuracy"} == set("abcde")
    assert next(row["n"] for row in rows if row["name"] == "accuracy") == 10


@pytest.mark.parametrize(("name", "limit", "there", "taken"), [
    ("accuracy", None, 50, 50), ("accuracy", 8, 50, 8), ("accuracy", 80, 50, 50), ("shift", None, 5000, 1000),
    ("shift", 2000, 5000, 2000), ("cost", 1000, 5000, 64), ("cost", 8, 5000, 8),
])  # fmt: skip
def test_how_many_images_a_measure_takes(name, limit, there, taken):
    assert images_taken(name, limit, there) == taken
    assert LIMITS.keys() == MEASURES.keys() - {"accuracy"}


@pytest.mark.parametrize("name", MEASURES)
def test_no_images_and_no_number_of_them_are_refused(name):
    model, none = random_vit("ape", torch.float32), sorted_images(each=0)
    with pytest.raises(ValueError, match="there are no images to measure on"):
        list(MEASURES[name](model, none))
    with pytest.raises(ValueError, match="must be at least 1; got -2"):
        list(MEASURES[name](model, sorted_images(), limit=-2))


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_of_another_precision_a_numpy_number_and_inference_mode_are_taken(name):
    model = random_vit("ape+sape2", torch.float64, depth=1).requires_grad_()
    with torch.inference_mode():
        rows = list(MEASURES[name](model, sorted_images(), limit=np.int64(4)))
    assert {"cost": "parameters", "accuracy": "accuracy"}.get(name, rows[0]["name"]) == rows[0]["name"]
    assert next(model.parameters()).dtype == torch.float64


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 6, 11, 12])
def test_wilson_is_that_of_scipy(right):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, 12).proportion_ci(method="wilson")
    assert wilson_interval(right / 12, 12) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("values", [[1.0] * 12, [0.0] * 12, [1.0], [1.0, 0.0]])
def test_no_share_has_an_interval_of_no_width(values):
    row = mean_row("shift", "shift_accuracy", torch.tensor(values), "fraction", "p")
    assert 0 <= row["ci_low"] <= row["value"] <= row["ci_high"] <= 1
    assert row["ci_high"] - row["ci_low"] > 0.2


@pytest.mark.parametrize("values", [[3.0], [0.25, 0.25, 0.25], [-1.0, -1.0]])
def test_equal_numbers_and_single_ones_have_no_interval(values):
    assert interval_of(torch.tensor(values).double()) == {}
    assert interval_of(torch.tensor(values).double(), is_share=True) == {}


def test_a_difference_of_shares_is_no_share():
    row = mean_row("resolution", "accuracy_drop", torch.zeros(9), "fraction", "p")
    assert "ci_low" not in row


def test_every_accuracy_has_its_interval():
    rows = accuracy(random_vit("ape", torch.float32), sorted_images())
    shares = [row for row in rows if "accuracy" in row["name"]]
    assert len(shares) == 6
    assert all(row["ci_low"] < row["ci_high"] for row in shares)
