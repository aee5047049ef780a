"""results.jsonl: what was measured on all images is never replaced by a look at a few."""

import pytest

from sape2.config.recipes import get_recipe
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run

FULL, FEW, MORE = (
    {"measure": "accuracy", "name": "accuracy", "split": "test", "value": value, "n": n, "limit": limit}
    for value, n, limit in ((0.9, 359, None), (0.1, 8, 8), (0.5, 100, 100))
)


def of(row, weights="last", **changes):
    return row | {"weights": weights} | changes


def values(rows):
    return [row["value"] for row in rows]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, get_recipe("digits"))


@pytest.mark.parametrize("first", [[], [FEW], [MORE, FEW]])
def test_the_fullest_is_what_the_run_shows_whatever_came_last(run, first):
    for row in [*first, FULL, FEW, MORE]:
        run.add_results([of(row)])
    assert values(run.results()) == [0.9]
    run.add_results([of(FULL, value=0.8)])
    assert values(read_rows(run.folder / "results.jsonl")) == [0.8]


def test_what_is_not_finite_is_read_as_not_measured(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"value": NaN, "std": -Infinity, "n": 3}\n')
    assert read_rows(tmp_path / "rows.jsonl") == [{"value": None, "std": None, "n": 3}]


def test_of_two_partial_ones_the_larger_is_shown(run):
    for row in (MORE, FEW):
        run.add_results([of(row)])
    assert values(run.results()) == [0.5]


def test_other_splits_weights_and_images_are_apart(run):
    rows = [of(FULL), of(FEW, "best"), of(FEW, split="validation"), of(FEW, other_data="others")]
    for row in rows:
        run.add_results([row])
    assert read_rows(run.folder / "results.jsonl") == rows
    assert run.results() == rows[:3]


@pytest.mark.parametrize(("rows", "measured"), [
    ([of(FULL), of(FULL, "best")], True), ([of(FULL), of(FEW, "best")], False), ([of(FULL)], False),
])  # fmt: skip
def test_a_run_is_measured_when_all_its_test_images_are(run, rows, measured):
    for row in rows:
        run.add_results([row])
    assert not run.is_measured
    run.weights("last").touch()
    assert run.is_measured == measured


def test_what_an_editor_adds_to_a_file_of_rows_is_no_damage(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n\n')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_a_line_end_of_unicode_ends_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "x\u2028y\x85z"}\n{"a": 2}\n', encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": "x\u2028y\x85z"}, {"a": 2}]


@pytest.mark.parametrize(("key", "value"), [("value", "0.9"), ("n", [359]), ("limit", "8"), ("measure", None), ("split", {})])
def test_a_row_that_another_program_changed_is_named_with_its_line(run, key, value):
    """Numbers as text, from a spreadsheet; add_results compares it with new rows."""
    write_rows(run.folder / "results.jsonl", [of(FULL), of(FULL, "best") | {key: value}])
    for read in (run.results, lambda: run.add_results([of(FEW)])):
        with pytest.raises(ValueError, match=rf"results\.jsonl line 2 was changed: its {key} is .*; put back"):
            read()


def test_an_epoch_that_another_program_changed_is_named_with_its_line(run):
    write_rows(run.folder / "metrics.jsonl", [{"epoch": 1, "precision": "fp32"}, {"epoch": 2, "images_per_s": "43,6"}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 was changed: its images_per_s is '43,6'"):
        run.epochs()
