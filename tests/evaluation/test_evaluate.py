"""`sape2 evaluate` with several measures: progress, figures, how many images, and nothing lost."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from sape2 import evaluation
from sape2.cli import main
from sape2.cli.output import MANY
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import load_data
from sape2.evaluation.base import row
from sape2.evaluation.runs import measure
from sape2.inspect import pictures
from sape2.models.trained import build_model
from sape2.runs import run as run_module
from sape2.runs.checkpoint import save_weights
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def run(tmp_path):
    """A finished run of one layer, untrained."""
    config = override(get_recipe("digits"), ["model.depth=1", "model.encoding=sape2"])
    Run(tmp_path / "run", config).start()
    save_weights(tmp_path / "run" / "model.safetensors", build_model(config))
    return tmp_path / "run"


def test_measures_draw_their_figures_and_the_last_line_names_them(run, capfd):
    assert main(["evaluate", str(run), "--measures", "shift,resolution,grouping,health", "--limit", "4"]) == 0
    out, err = capfd.readouterr()
    names = ["shift", "equivariance", "resolution", "grouping", "health"]
    files = [f"{name}-4_images.png" for name in names]  # so few do not replace those of all
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(files)
    assert " ".join(out.split()).endswith(", ".join(f"figures/{name}" for name in files))
    for name in files:
        assert Image.open(run / "figures" / name).size[0] > 400
    rows = read_rows(run / "results.jsonl")
    shift = [row for row in rows if row["measure"] == "shift"]
    consistency = next(row["value"] for row in shift if row["name"] == "circular_consistency" and row["shifts"] == "sub_patch")
    assert re.search(rf"consistency +│ +{consistency:.4f}", out)
    assert f"{len(shift)} rows of shift in results.jsonl; with --all they are printed" in out
    assert "lie_derivative" not in out
    told = [f"{measure}: {sum(row['measure'] == measure for row in rows)} rows, " for measure in names if measure[0] != "e"]
    lines = err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(text) for line, text in zip(lines, told, strict=True))
    assert max(row["n"] for row in rows if row["name"] == "accuracy_at_size") == 4


def given(name, value, fails=False):
    """A measure of two rows, that may fail after the first."""

    def measure(model, data, limit=None):
        yield row(name, "number", value, "unit", limit, "protocol")
        if fails:
            raise ValueError(f"{name} cannot be measured")
        yield row(name, "another", value, "unit", limit, "protocol")

    return measure


def test_measuring_again_replaces_the_rows_of_that_measure_only(run, monkeypatch, capfd):
    other = {"measure": "first", "name": "number", "value": 7.0, "split": "validation", "weights": "last"}
    write_rows(run / "results.jsonl", [other])
    monkeypatch.setitem(evaluation.MEASURES, "first", given("first", 1.0))
    monkeypatch.setitem(evaluation.MEASURES, "second", given("second", 2.0))
    assert main(["evaluate", str(run), "--measures", "first,second", "--limit", "3"]) == 0
    monkeypatch.setitem(evaluation.MEASURES, "first", given("first", 5.0))
    assert main(["evaluate", str(run), "--measures", "first", "--json"]) == 0
    found = [(r["measure"], r["split"], r["value"]) for r in read_rows(run / "results.jsonl")]
    assert sorted(found) == sorted([("first", "validation", 7.0), *[("first", "test", 5.0), ("second", "test", 2.0)] * 2])


@pytest.mark.parametrize(("rule", "lines"), [({"reading_rule": 1}, 1), ({}, 0)])
def test_a_run_whose_images_were_read_by_another_rule_is_measured_with_a_note(run, monkeypatch, capfd, rule, lines):
    (run / "data.json").write_text(json.dumps({"layout": "folder", "train": {}, "test": {}} | rule))
    monkeypatch.setitem(evaluation.MEASURES, "first", given("first", 1.0))
    assert main(["evaluate", str(run), "--measures", "first"]) == 0
    assert capfd.readouterr().err.count("read its training images by rule 1") == lines


def test_what_was_measured_before_a_measure_fails_is_kept(run, monkeypatch, capfd):
    write_rows(run / "results.jsonl", [])
    for name, fails in (("first", False), ("second", False), ("second", True)):
        monkeypatch.setitem(evaluation.MEASURES, name, given(name, float(fails), fails))
        if name == "second":
            status = main(["evaluate", str(run), "--measures", "first,second"])
            assert status == (2 if fails else 0)
    assert "sape2: second cannot be measured" in capfd.readouterr().err
    assert [(r["measure"], r["value"]) for r in read_rows(run / "results.jsonl")] == [
        *[("second", 0.0)] * 2,
        *[("first", 0.0)] * 2,
    ]


def test_settings_and_images_are_read_once_and_weights_loaded_once(run, monkeypatch):
    """With a figure of the test set, which needs the model again."""
    config = Run.open(run).config
    Run(run, config).start(load_data(config.data, config.model).train.fingerprint)
    calls = Counter()
    for name in ("read_config", "other_images", "load_weights"):
        call = getattr(run_module, name)
        monkeypatch.setattr(run_module, name, lambda *given, name=name, call=call: calls.update([name]) or call(*given))
    assert main(["evaluate", str(run)]) == 0
    assert (run / "figures" / "confusion.png").exists()
    assert calls == {"read_config": 1, "other_images": 1, "load_weights": 1}


@pytest.mark.parametrize(("same", "times"), [(True, 1), (False, 2)])
def test_weights_that_lie_in_two_files_are_measured_once(run, monkeypatch, same, times):
    """As after a run whose last epoch was the best one."""
    held, calls = Run.open_finished(run), []
    config = held.config
    last, best = (run / f"{name}.safetensors" for name in ("model", "best"))
    if same:
        shutil.copy(last, best)
    else:
        save_weights(best, build_model(replace(config, seed=1)))
    monkeypatch.setitem(
        evaluation.MEASURES, "first", lambda model, data, limit: calls.append(1) or given("first", 0.5)(model, data)
    )
    rows = measure(held, load_data(config.data, config.model), ["first"], "test", ["last", "best"])
    assert len(calls) == times
    assert [(row["weights"], row["name"], row["value"]) for row in rows] == [
        (weights, name, 0.5) for weights in ("last", "best") for name in ("number", "another")
    ]
    assert read_rows(run / "results.jsonl") == rows


@pytest.mark.parametrize("everything", [False, True])
def test_of_many_rows_a_reader_gets_headlines_and_warnings_unless_all_are_asked_for(run, monkeypatch, capfd, everything):
    def health(model, data, limit=None):
        for layer in range(MANY):
            yield row("health", "gate_mean", 0.5, "number", 1, "protocol", layer=layer)
        yield row("health", "warning_gates", 0.9, "fraction", 1, "protocol", layer=1, message="gates of layer 1 are saturated")
        yield row("health", "warnings", 1.0, "warnings", 1, "protocol")

    monkeypatch.setitem(evaluation.MEASURES, "health", health)
    monkeypatch.setattr(pictures, "draw_measures", lambda *_: [])
    assert main(["evaluate", str(run), "--measures", "health", *(["--all"] if everything else [])]) == 0
    out = capfd.readouterr().out
    assert ("gate_mean" in out) == everything
    assert ("warning: gates of layer 1 are saturated" in out) != everything
    assert (f"{MANY + 2} rows of health in results.jsonl; with --all they are printed" in out) != everything


def test_without_matplotlib_there_are_rows_and_one_line_that_says_why(run, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", str(run), "--measures", "grouping", "--limit", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[0])["n"] == 2
    assert err.splitlines()[1:] == ["no figures: pictures need matplotlib: pip install 'sape2[viz]'"]
    assert not (run / "figures").exists()


def test_figures_of_another_split_have_names_of_their_own(run, capfd):
    assert main(["evaluate", str(run), "--measures", "grouping", "--limit", "2", "--split", "validation"]) == 0
    assert [path.name for path in (run / "figures").iterdir()] == ["grouping-validation-2_images.png"]


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_that_is_no_number_of_images_is_told(run, capfd, limit):
    assert main(["evaluate", str(run), f"--limit={limit}"]) == 2
    assert f"--limit needs whole numbers from 1 on; got '{limit}'" in capfd.readouterr().err
