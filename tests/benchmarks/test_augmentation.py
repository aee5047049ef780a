"""How fast augmentation is: the benchmark runs on every recipe, and the page shows its rows."""

import augmentation
import pytest
from test_tables import lines_of
from timing import RESULTS

from sape2.config.recipes import RECIPES
from sape2.runs.rows import read_rows


def test_the_table_of_the_page_is_that_of_the_rows():
    rows = [row for row in read_rows(RESULTS / "augmentation.jsonl") if row["part"] == "augment"]
    expected = [
        [f"`{row['recipe']}`", f"{row['images']} of {row['pixels']}x{row['pixels']}"]
        + [f"{round(row[f'{form}_images_per_s']):,}" for form in ("plain", "ours")]
        + [f"{row['times_faster']:.2f}"]
        for row in rows
    ]
    names = [line[0] for line in expected]
    assert len(expected) >= 10
    assert [line for line in lines_of("data.md") if line[0] in names] == expected


@pytest.mark.parametrize("name", [name for name in RECIPES if "imagenet" not in name])
def test_both_forms_run_on_every_recipe_of_small_images(monkeypatch, name):
    monkeypatch.setattr(augmentation, "LARGEST", 2**15)
    rows = augmentation.measure(name, rounds=1)
    assert rows
    assert all(row["times_faster"] > 0 for row in rows)
