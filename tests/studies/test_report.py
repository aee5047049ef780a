"""`sape2 report`: which number of a run is shown where, seeds together, what is missing stays empty."""

import csv
import json
import sys
from dataclasses import replace

import pytest
from PIL import Image

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.studies.compare.groups import group_runs
from sape2.studies.compare.headlines import read_runs, telling_layer
from sape2.studies.compare.report import compare
from sape2.studies.compare.summary import mean_and_std

CONDITIONS = {"split": "test", "weights": "last", "unit": "", "protocol": "p"}


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def row(measure, name, value, n=100, **conditions):
    return CONDITIONS | {"measure": measure, "name": name, "value": value, "n": n} | conditions


def results(value, n=100, layers=2):
    """Rows of every measure, as they are written, with `value` in the places that the report reads."""
    scaled = {"transform": "scaled", "border": "none", "rule": "clamp"}
    rows = [
        row("accuracy", "accuracy", value, n),
        row("shift", "circular_consistency", 0.1, n, shifts="full", border="circular"),
        row("shift", "circular_consistency", value, n, shifts="sub_patch", border="circular"),
        row("shift", "worst_case_accuracy", 0.2, n, shifts="plus_minus", border="reflect"),
        row("shift", "worst_case_accuracy", value, n, shifts="patch", border="circular"),
        *(row("shift", "shift_accuracy", value, n, shift_px=px, axis="x", border="circular") for px in (0, 1)),
        row("resolution", "accuracy_at_size", 0.9, n, size="8x8", **scaled),
        row("resolution", "accuracy_at_size", 0.1, n, size="16x16", **scaled),
        row("resolution", "accuracy_drop", 0.8, n, size="16x16", **scaled),
        row("resolution", "mean_accuracy_below", 0.9 - value, n, **scaled),
        row("resolution", "mean_accuracy_above", 0.9 - value / 2, n, **scaled),
        row("resolution", "mean_accuracy_above", 0.0, n, **scaled | {"rule": "rescale"}),
        row("health", "warnings", 3.0, 8),
    ]
    for layer in range(1, layers + 1):
        place = {"masks": "scenes", "layer": layer, "sign": "minus"}
        rows += [
            row("grouping", "bias_auroc", 0.5 - 0.1 * layer, n, distance="far", **place),
            row("grouping", "bias_auroc", 0.99, n, distance="far", head=1, **place),
            row("grouping", "bias_auroc", value, n, distance="near", **place),
            row("grouping", "bias_separation", -layer, n, distance="all", masks="scenes", layer=layer),
            row("grouping", "bias_auroc", 1.0, n, distance="far", **place | {"masks": "colour clusters"}),
        ]
    return rows


@pytest.fixture
def make(tmp_path):
    """make(name, encoding, seed, rows) -> folder of a finished run; training took 10 ms a step of 64 images."""

    def folder_of(name, encoding="ape", seed=0, rows=(), finished=True, settings=()):
        folder = tmp_path / name
        config = replace(override(get_recipe("digits"), [f"model.encoding={encoding}", *settings]), seed=seed)
        Run(folder, config).start()
        speed = {"images_per_s": 100 * config.train.batch_size, "device": "cpu", "precision": "fp32"}
        losses = {"loss": 2.0, "accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.5}
        write_rows(folder / "metrics.jsonl", [speed | losses | {"epoch": epoch} for epoch in (1, 2)])
        write_rows(folder / "results.jsonl", rows)
        if finished:
            (folder / "model.safetensors").write_bytes(b"weights are not read")
        return folder

    return folder_of


def table_of(*folders, measures=None):
    runs, _ = read_runs(folders)
    return compare(runs, measures).table()


def test_each_column_is_the_number_that_it_says(make):
    (line,) = table_of(make("a", rows=results(0.75)))
    assert line == {
        "encoding": "ape",
        "seeds": "0",
        "accuracy": "0.7500",
        "consistency": "0.7500",
        "worst case": "0.7500",
        "drop, smaller": "0.7500",
        "drop, larger": "0.3750",
        "layer": "2",
        "AUROC near": "0.7500",
        "AUROC far": "0.3000",
        "d'": "-2.0000",
        "warnings": "3",
        "ms per step": "10.0",
    }


def test_the_telling_layer_is_furthest_from_chance_by_the_mean_over_seeds(make):
    def auroc(*values):
        return [
            row("grouping", "bias_auroc", v, layer=layer, masks="scenes", distance="far", sign="minus")
            for layer, v in enumerate(values, start=1)
        ]

    runs, _ = read_runs([make("a", seed=0, rows=auroc(0.9, 0.3)), make("b", seed=1, rows=auroc(0.4, 0.2))])
    assert telling_layer(runs[:1]) == 1
    assert telling_layer(runs) == 2
    assert telling_layer([]) is None


def test_seeds_share_a_line_with_mean_and_standard_deviation(make):
    lines = table_of(make("a", rows=results(0.7)), make("b", "none", rows=results(0.5)), make("c", seed=1, rows=results(0.8)))
    assert [(line["encoding"], line["seeds"], line["accuracy"]) for line in lines] == [
        ("ape", "0, 1", "0.7500 ± 0.0707"),
        ("none", "0", "0.5000"),
    ]
    assert mean_and_std([0.7, 0.8]) == pytest.approx((0.75, 0.1 / 2**0.5))
    assert mean_and_std([0.7]) == (0.7, None)


def test_what_was_not_measured_is_an_empty_cell_and_never_a_zero(make, tmp_path, capfd):
    folders = make("a", rows=results(0.0)), make("b", "none", rows=[row("accuracy", "accuracy", 0.5)])
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    found = {(r["label"], r["name"]): (r["mean"], r["n"]) for r in rows}
    assert found["ape", "consistency"] == (0.0, 1)
    assert found["none", "consistency"] == (None, 0)
    (first, second) = csv.DictReader((tmp_path / "out" / "report.csv").open())
    assert (first["consistency"], second["consistency"], second["accuracy"]) == ("0.0", "", "0.5")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| none | 0 | 0.5000 |  |  |" in page
    assert "shift is not measured for every run of: none." in page


def test_a_cell_says_how_many_seeds_it_is_of_if_not_all(make):
    folders = make("a", rows=results(0.7)), make("b", seed=1, rows=[row("accuracy", "accuracy", 0.5)])
    (line,) = table_of(*folders)
    assert line["accuracy"] == "0.6000 ± 0.1414"
    assert line["consistency"] == "0.7000 (1)"


def test_folders_are_compared_in_pairs_with_a_baseline(make, tmp_path, capfd):
    """d = 0.1, 0.2: mean 0.15, t(0.975, 1) = 12.706 times 0.05."""
    values = {"ape": (0.5, 0.6), "rope": (0.6, 0.8), "none": (0.4,)}
    folders = [make(f"{e}{s}", e, s, results(v)) for e, some in values.items() for s, v in enumerate(some)]
    argv = ["report", *map(str, folders), "--baseline", "ape", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "minus ape; vit_nano" in capfd.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Minus ape" in page
    assert "| rope | 0, 1 | +0.1500 (-0.4853 to +0.7853) | +0.1500" in page
    assert "| none | 0 | -0.1000 | -0.1000" in page
    assert main([*argv, "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    accuracy = {row["label"]: (row["pairs"], row["difference"]) for row in rows if row["name"] == "accuracy"}
    assert accuracy == {"ape": (0, None), "rope": (2, pytest.approx(0.15)), "none": (1, pytest.approx(-0.1))}
    lines = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert float(lines[1]["accuracy ci_high"]) == pytest.approx(0.15 + 0.05 * 12.7062, abs=1e-5)


def test_the_baseline_may_be_written_in_any_order(make):
    runs, _ = read_runs([make("a", rows=results(0.5)), make("b", "ape+sape2", rows=results(0.7))])
    assert compare(runs, None, baseline="sape2+ape").baseline == "ape+sape2"


def test_lines_are_named_by_what_differs(make):
    runs, _ = read_runs(
        [
            make("a"),
            make("b", "none", settings=["train.epochs=3", "train.warmup_epochs=1"]),
            make("c", "none", settings=["train.lr=0.5"]),
        ]
    )
    epochs = runs[0].config.train.epochs
    lr = runs[0].config.train.lr
    assert [group.label for group in group_runs(runs)] == [
        f"ape, {epochs} epochs, lr={lr}",
        f"none, 3 epochs, lr={lr}",
        f"none, {epochs} epochs, lr=0.5",
    ]


def test_a_figure_names_what_differs_in_its_lines_and_what_is_shared_once(make):
    folders = [make("a", rows=results(0.5)), make("b", settings=["train.epochs=1", "train.warmup_epochs=0"])]
    found = compare(read_runs(folders)[0], None)
    assert [group.name for group in found.groups] == ["60 epochs", "1 epoch"]
    assert found.title.startswith("ape, vit_nano, digits; test set")
    alone = compare(read_runs(folders[:1])[0], None)
    assert [group.name for group in alone.groups] == ["ape"]
    assert alone.title.startswith("vit_nano, digits, 60 epochs; test set")


def test_differing_numbers_of_images_are_told(make):
    runs, _ = read_runs([make("a", rows=results(0.5, n=100)), make("b", "none", rows=results(0.5, n=20))])
    assert "shift was measured on different numbers of images: 20, 100." in compare(runs, None).notes()
    assert not any(note.startswith("health was") for note in compare(runs, None).notes())
    assert compare(runs[:1], None).notes() == []


def test_times_of_different_numbers_of_processes_are_not_compared_silently(make):
    """A line from before they were counted is one of a single process."""
    folders = [make(name, seed=seed, rows=results(0.5)) for seed, name in enumerate("abc")]
    for folder, processes in ((folders[1], 1), (folders[2], 2)):
        write_rows(folder / "metrics.jsonl", [row | {"processes": processes} for row in read_rows(folder / "metrics.jsonl")])
    for chosen, expected in ((folders[:2], 0), (folders, 1)):
        notes = compare(read_runs(chosen)[0], None).notes()
        assert sum("different numbers of processes" in note for note in notes) == expected


def test_report_writes_tables_and_figures_with_a_line_for_each(make, tmp_path, capfd):
    folders = make("a", rows=results(0.7)), make("b", seed=1, rows=results(0.8)), make("c", "none", rows=results(0.5))
    out = tmp_path / "out"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert "0.7500 ± 0.0707" in printed
    files = ["curves.png", "grouping.png", "report.csv", "report.md", "resolution.png", "shift.png"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert all(name in printed for name in files)
    page = (out / "report.md").read_text()
    for name in files:
        if name.endswith("png"):
            assert f"]({name})" in page
            assert Image.open(out / name).size[0] > 400


def test_without_matplotlib_there_are_tables_and_one_line_that_says_why(make, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert main(["report", str(make("a", rows=results(0.7))), "--out", str(out)]) == 0
    assert capfd.readouterr().err == "no figures: pictures need matplotlib: pip install 'sape2[viz]'\n"
    assert sorted(path.name for path in out.iterdir()) == ["report.csv", "report.md"]


def test_measures_can_be_chosen(make):
    (line,) = table_of(make("a", rows=results(0.7)), measures=["accuracy", "health"])
    assert list(line) == ["encoding", "seeds", "accuracy", "warnings", "ms per step"]


def test_an_unfinished_run_is_left_out_and_told(make, tmp_path, capfd):
    folders = make("a", rows=results(0.7)), make("b", "none", finished=False)
    assert main(["report", *map(str, folders), "--measures", "accuracy", "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == f"left out: the run in {folders[1]} is not finished\n"


@pytest.mark.parametrize(
    ("runs", "options", "named"),
    [
        (["a", "a"], [], "are the same run (same settings and seed)"),
        (["a", "nowhere"], [], "there is no run folder"),
        (["begun"], [], "none of these runs is finished"),
        (["a"], ["--measures", "speed"], "unknown measure 'speed'; known measures: accuracy, shift"),
        (["a"], ["--measures", "shift"], "no run has results of shift on the test set with weights last"),
        (["a"], ["--baseline", "rope"], "the baseline must be one line of the table; 'rope' is 0 of: ape"),
        (["a"], ["--weights", "best"], "of accuracy, shift, resolution, grouping, health on the test set with weights best;"),
    ],
)
def test_mistakes_are_told_in_one_line(make, tmp_path, capfd, runs, options, named):
    make("a", rows=[row("accuracy", "accuracy", 0.5)])
    make("begun", finished=False)
    argv = ["report", *(str(tmp_path / name) for name in runs), *options, "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert named in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
