"""results.jsonl: what was measured on all images is never replaced by a look at a few."""

import json

import pytest

from sape2.evaluation.runs import is_measured
from sape2.training.run_folder import own_results, read_rows, update_results

FULL, FEW, MORE = (
    {"measure": "accuracy", "name": "accuracy", "split": "test", "value": value, "n": n, "limit": limit}
    for value, n, limit in ((0.9, 359, None), (0.1, 8, 8), (0.5, 100, 100))
)


def of(row, weights="last", **changes):
    return row | {"weights": weights} | changes


def values(rows):
    return [row["value"] for row in rows]


@pytest.mark.parametrize("first", [[], [FEW], [MORE, FEW]])
def test_the_fullest_is_what_the_run_shows_whatever_came_last(tmp_path, first):
    for row in [*first, FULL, FEW, MORE]:
        update_results(tmp_path, [of(row)])
    assert values(own_results(tmp_path)) == [0.9]
    update_results(tmp_path, [of(FULL, value=0.8)])
    assert values(read_rows(tmp_path / "results.jsonl")) == [0.8]


def test_of_two_partial_ones_the_larger_is_shown(tmp_path):
    for row in (MORE, FEW):
        update_results(tmp_path, [of(row)])
    assert values(own_results(tmp_path)) == [0.5]


def test_other_splits_weights_and_images_are_apart(tmp_path):
    rows = [of(FULL), of(FEW, "best"), of(FEW, split="validation"), of(FEW, other_data="others")]
    for row in rows:
        update_results(tmp_path, [row])
    assert read_rows(tmp_path / "results.jsonl") == rows
    assert own_results(tmp_path) == rows[:3]


@pytest.mark.parametrize("n", [8, 359, 1000])
def test_rows_from_before_limits_were_written_count_by_their_n(tmp_path, n):
    before = {key: value for key, value in of(FULL, value=0.7, n=n).items() if key != "limit"}
    update_results(tmp_path, [before])
    update_results(tmp_path, [of(MORE)])
    assert values(own_results(tmp_path)) == [0.5 if n < 100 else 0.7]
    update_results(tmp_path, [of(FULL)])
    assert values(own_results(tmp_path)) == [0.9]


@pytest.mark.parametrize(("rows", "measured"), [
    ([of(FULL), of(FULL, "best")], True), ([of(FULL), of(FEW, "best")], False), ([of(FULL)], False),
])  # fmt: skip
def test_a_run_is_measured_when_all_its_test_images_are(tmp_path, rows, measured):
    for row in rows:
        update_results(tmp_path, [row])
    assert is_measured(tmp_path) == measured


@pytest.mark.parametrize(("n", "measured"), [(359, True), (8, False)])
def test_of_older_rows_the_number_of_images_decides(tmp_path, n, measured):
    (tmp_path / "data.json").write_text(json.dumps({"test": {"images": 359}}))
    rows = [{key: value for key, value in of(FULL, weights, n=n).items() if key != "limit"} for weights in ("last", "best")]
    update_results(tmp_path, rows)
    assert is_measured(tmp_path) == measured
