"""What stands in one line is alike: the same images, the same precision, the same number of images; and the head says what."""

import csv
import json
from dataclasses import replace

import pytest
from study_cases import finish, tiny_study

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.config.recipes.changed import changed_in_words
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.studies.compare.groups import group_runs, mean_rows
from sape2.studies.compare.headlines import read_runs
from sape2.studies.compare.outcome import outcome
from sape2.studies.compare.rawrows import raw_row
from sape2.studies.compare.report import compare
from sape2.tables import format_spread

SPLIT = {"images": 100, "labels": "aa", "bytes": "bb", "names": "cc"}
SEEN = {"layout": "parquet", "classes": ["x", "y"], "reading_rule": 2, "train": SPLIT, "test": SPLIT}


@pytest.fixture
def make(tmp_path):
    """make(seed) -> folder of a finished run, with what is told of its images, precision and rows."""

    def folder_of(seed=0, seen=SEEN, precision="fp32", value=0.5, settings=(), rows=None):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        config = replace(override(get_recipe("cifar10_budget"), ["model.encoding=ape", *settings]), seed=seed)
        Run(folder, config).start(seen)
        write_rows(folder / "metrics.jsonl", [{"epoch": 1, "precision": precision}])
        about = {"measure": "accuracy", "name": "accuracy", "split": "test", "weights": "last", "n": 100, "limit": None}
        write_rows(folder / "results.jsonl", [about | {"value": value} | row for row in rows or [{}]])
        (folder / "model.safetensors").write_bytes(b"")
        return folder

    return folder_of


def table_of(*folders):
    comparison = compare(read_runs(folders)[0], None)
    return [line["seeds"] for line in comparison.table()], " ".join(comparison.notes())


def other(split, **changes):
    return SEEN | {split: SPLIT | changes}


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (other("train", bytes="zz"), "the content of its train images"),
        (other("test", labels="zz"), "the labels of its test images"),
        (other("test", images=99), "the number of its test images"),
        (other("train", names="zz"), "the names or sizes"),
        (SEEN | {"classes": ["y", "x"]}, "the names of its classes"),
        (SEEN | {"reading_rule": 1}, "the rule by which they were read"),
    ],
)
def test_runs_on_other_images_are_no_seeds_of_one_line(make, seen, said):
    seeds, notes = table_of(make(0), make(1), make(2, seen))
    assert seeds == ["0, 1", "2"]
    assert said in notes
    assert "saw other images" in notes


def test_another_layout_of_the_same_images_is_the_same(make):
    assert table_of(make(0), make(1, SEEN | {"layout": "folder", "train": SPLIT | {"names": "zz"}}))[0] == ["0, 1"]


def test_what_is_not_known_of_images_is_told(make):
    seeds, notes = table_of(make(0), make(1, None))
    assert seeds == ["0, 1"]
    assert "want of a data.json" in notes


def test_the_same_seed_on_other_images_is_another_line_and_not_the_same_run(make):
    assert table_of(make(0), make(0, other("train", bytes="zz")))[0] == ["0", "0"]
    with pytest.raises(ValueError, match="are the same run"):
        table_of(make(0), make(0))


def test_another_precision_is_another_line(make):
    runs, _ = read_runs([make(0), make(1, precision="bf16")])
    assert [group.label for group in group_runs(runs)] == ["ape, precision=fp32", "ape, precision=bf16"]


def test_a_seed_over_fewer_images_is_left_out_of_the_mean_and_told(make):
    few = {"n": 8, "limit": 8}
    comparison = compare(read_runs([make(0, value=0.5), make(1, value=0.9, rows=[few])])[0], None)
    assert comparison.table()[0]["accuracy"] == "0.5000 (1)"
    assert "is over 8 images and that of other seeds over 100" in " ".join(comparison.notes())


def test_a_number_over_a_part_of_the_images_says_so(make):
    comparison = compare(read_runs([make(0, rows=[{"n": 8, "limit": 8}])])[0], None)
    assert "accuracy is over 8 images drawn by class." in comparison.notes()
    assert next(comparison.rows())["images"] == 8


# --- raw rows --------------------------------------------------------------------------------------------------------


def study_rows(tmp_path, name, seen, seeds=(0, 1)):
    study = tiny_study(tmp_path / name, ("ape", "none"), 2)
    for cell in study.cells:
        finish(cell, 0.5 + 0.1 * cell.config.seed)
        (cell.folder / "data.json").write_text(json.dumps(seen))
    return [raw_row(cell.run) for cell in study.cells if cell.config.seed in seeds]


def test_raw_rows_of_other_images_do_not_stand_in_one_comparison(tmp_path):
    first, second = study_rows(tmp_path, "a", SEEN, (0,)), study_rows(tmp_path, "b", other("train", bytes="zz"), (1,))
    assert "classes" not in first[0]["images"]
    with pytest.raises(ValueError, match=r"ape seed 1 .*ape seed 0: the content of its train images"):
        outcome([*first, *second])
    same = study_rows(tmp_path, "c", SEEN, (1,))
    assert outcome([*first, *same, same[0] | {"images": {}, "seed": 2}]).encodings == ["ape", "none"]


def test_seeds_of_different_precision_are_told(tmp_path):
    rows = study_rows(tmp_path, "a", SEEN)
    assert not any("precision" in note for note in outcome(rows).notes())
    mixed = outcome([row | ({"precision": "bf16"} if row["seed"] else {}) for row in rows])
    assert any("bf16: seeds 1" in note for note in mixed.notes())


def test_the_head_of_a_study_tells_changed_settings(tmp_path):
    found = outcome(study_rows(tmp_path, "a", SEEN))
    assert "model.depth=1" in found.title
    assert next(found.rows())["changed"] == found.finished[0]["changed"]


# --- what is said beside numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], ""),
        (["train.epochs=4", "train.warmup_epochs=0.4", "model.encoding=rope"], ""),
        (["data.train_limit=256", "augment.flip=false"], "data.train_limit=256, augment.flip=false"),
        (["model.image_size=[16,16]", "train.clip_grad=1"], "model.image_size=[16,16], train.clip_grad=1.0"),
        (["train.workers=3", "data.in_memory=true"], ""),  # they decide nothing
    ],
)
def test_changed_settings_are_those_that_a_recipe_has_not(settings, words):
    assert changed_in_words(override(get_recipe("cifar10_budget"), settings)) == words
    assert changed_in_words(replace(get_recipe("digits"), recipe="mine")) == ""


def test_settings_of_the_folder_are_always_told_for_images_of_ones_own():
    assert changed_in_words(get_recipe("images")) == "model.image_size=[32,32], model.patch_size=4, train.batch_size=32"


def test_table_page_and_file_of_a_report_tell_what_was_changed(make, tmp_path, capfd):
    folders = [make(seed, settings=["data.train_limit=256"]) for seed in (0, 1)]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert "data.train_limit=256" in capfd.readouterr().out
    assert "data.train_limit=256" in (tmp_path / "out" / "report.md").read_text()
    (line,) = csv.DictReader((tmp_path / "out" / "report.csv").open())
    assert "data.train_limit=256" in line["conditions"]


def test_seeds_of_one_value_have_neither_band_nor_plus_minus():
    rows = [[{"measure": "shift", "name": "a", "value": 0.5, "limit": None}]] * 2
    (mean,) = mean_rows(rows)
    assert "ci_low" not in mean
    assert format_spread(0.5, 0.0, 4) == "0.5000 (all alike)"
    assert format_spread(0.5, 0.00001, 4) == "0.5000 ± <0.0001"
    assert format_spread(0.5, 0.01, 4) == "0.5000 ± 0.0100"


def test_the_line_of_one_run_keeps_its_rows(make):
    folder = make(0)
    assert read_runs([folder])[0][0].rows == read_rows(folder / "results.jsonl")
