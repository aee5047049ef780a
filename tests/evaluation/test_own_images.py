"""A run belongs to its images: rows of others come in only under a name of their own."""

import datasets
import pytest
from layout_cases import hub_splits, write_layouts_of
from own_cases import fill, finished_run

from sape2 import evaluation
from sape2.cli import main
from sape2.evaluation.base import row
from sape2.inspect import pictures
from sape2.runs.images import other_images
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.compare.headlines import read_runs


@pytest.fixture(autouse=True)
def _as_users_run_it(as_users_call_it):
    """The commands get what a user types."""


@pytest.fixture
def mine(tmp_path):
    return fill(tmp_path / "mine", {"cat": 6, "dog": 6}, (8, 8))


@pytest.fixture
def others(tmp_path):
    return fill(tmp_path / "others", {"cat": 7, "dog": 7}, (9, 9))


@pytest.fixture
def command(tmp_path, mine):
    """The words of the `sape2 train` whose run is in tmp_path/run, finished and untrained."""
    return finished_run(tmp_path / "run", mine)


@pytest.fixture
def evaluate(tmp_path, command, monkeypatch):
    """`sape2 evaluate` of that run with a measure that counts its calls."""
    monkeypatch.setattr(pictures, "draw_measures", lambda *_: [])
    calls = []

    def measure(model, data, limit=None):
        calls.append(1)
        yield row("first", "number", float(len(calls)), "number", len(data), "protocol")

    monkeypatch.setitem(evaluation.MEASURES, "first", measure)
    return lambda *words: main(["evaluate", str(tmp_path / "run"), "--measures", "first", *map(str, words)])


def test_other_images_are_not_measured_as_the_runs_own(tmp_path, others, evaluate, capfd):
    assert evaluate("--data", others) == 2
    err = capfd.readouterr().err
    assert "number of its train images" in err
    assert "--other-data NAME" in err
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_other_images_under_a_name_have_rows_of_their_own(tmp_path, others, evaluate, capfd):
    for words in ([], ["--data", others, "--other-data", "garden"], [], ["--data", others, "--other-data", "garden"]):
        assert evaluate(*words) == 0
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    assert [(r["data"], r.get("other_data"), r["value"]) for r in rows] == [("mine", None, 3.0), ("garden", "garden", 4.0)]
    assert Run.open(tmp_path / "run").results() == rows[:1]
    (run,), _ = read_runs([tmp_path / "run"])
    assert run.rows == rows[:1]


def test_rows_of_other_images_do_not_make_a_run_measured(tmp_path, others, evaluate):
    for weights in ("last", "best"):
        assert evaluate("--data", others, "--other-data", "garden", "--weights", weights) == 0
    assert not Run.open(tmp_path / "run").is_measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--other-data", "garden"], "needs --data, the folder or hub id"),
        (["--data", ".", "--other-data", "mine"], "a name that is not the run's own, 'mine'; got 'mine'"),
    ],
)
def test_other_images_need_a_folder_and_a_name_of_their_own(evaluate, capfd, words, message):
    assert evaluate(*words) == 2
    assert message in capfd.readouterr().err


def test_a_finished_run_notices_that_the_images_of_its_folder_changed(tmp_path, mine, command, evaluate, capfd):
    for weights in ("last", "best"):
        assert evaluate("--weights", weights) == 0
    assert main(command) == 0
    (mine / "cat" / "0.png").write_bytes((mine / "dog" / "0.png").read_bytes())
    data = Run.open(tmp_path / "run").config.data
    settings = [f"data.mean={list(data.mean)}", f"data.std={list(data.std)}"]
    assert evaluate() == 2
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 2
    assert capfd.readouterr().err.count("content of its train images") == 2


# --- classes of others -----------------------------------------------------------------------------------------------


@pytest.fixture
def measured(evaluate, monkeypatch):
    """The class names of the labels that a measure was given by `evaluate --other-data garden`; the status else."""
    seen = []

    def measure(model, data, limit=None):
        seen.append([data.classes[label] for label in data.labels.tolist()])
        yield row("first", "number", 1.0, "number", len(data), "protocol")

    monkeypatch.setitem(evaluation.MEASURES, "first", measure)
    return lambda data: evaluate("--data", data, "--other-data", "garden") or seen.pop()


@pytest.fixture
def hub(monkeypatch):
    """Makes `datasets.load_dataset` give splits of (names or None, labels)."""
    return lambda **splits: monkeypatch.setattr(datasets, "load_dataset", lambda _: hub_splits(**splits))


def test_classes_of_other_images_are_matched_by_name_and_may_be_fewer(tmp_path, measured, capfd):
    assert measured(fill(tmp_path / "others", {"dog": 7}, (9, 9))) == ["dog"]
    err = capfd.readouterr().err
    assert "garden has 1 of the 2 classes" in err
    assert "garden has no test set of its own: measured are 1 of its 7 images, 20% of each class" in err


@pytest.mark.parametrize(("name", "hint"), [("cow", ""), ("Cat", "'cat'")])
def test_a_class_that_the_run_has_not_is_refused_with_the_names(tmp_path, measured, capfd, name, hint):
    assert measured(fill(tmp_path / "others", {name: 7, "dog": 7}, (9, 9))) == 2
    err = capfd.readouterr().err
    assert [part for part in (f"'{name}'", "(cat, dog)", hint) if part not in err] == []


def test_other_images_can_have_a_hub_id_and_another_order_of_classes(measured, hub, capfd):
    hub(train=(["dog", "cat"], [0, 1] * 4), test=(["dog", "cat"], [0, 0, 1]))
    assert measured("some/garden") == ["dog", "dog", "cat"]
    assert "classes" not in capfd.readouterr().err


def test_other_images_without_names_go_by_number_and_it_is_said(measured, hub, capfd):
    hub(train=(None, [0, 1] * 4), test=(None, [1, 0, 1]))
    assert measured("some/garden") == ["1", "0", "1"]
    assert "garden has no names of classes" in capfd.readouterr().err


def test_a_run_notices_that_its_classes_have_other_names(tmp_path, mine, evaluate, capfd):
    (mine / "cat").rename(mine / "aardvark")
    assert evaluate() == 2
    assert "the names" in capfd.readouterr().err
    known = {"layout": "a", "classes": ["cat", "dog"], "train": {}, "test": {}}
    assert other_images(known, known | {"layout": "b", "classes": ["dog", "cat"]}) == "the names of its classes, or their order"
    assert other_images(known, known | {"layout": "b", "classes": []}) is None


def test_the_same_images_in_another_layout_are_the_runs_own(tmp_path, monkeypatch, capfd):
    layouts = write_layouts_of(tmp_path / "layouts")
    finished_run(tmp_path / "run", layouts["folder"])
    capfd.readouterr()
    for layout in layouts.values():
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(layout), "--limit", "3"]) == 0, capfd.readouterr().err


def test_a_measure_that_is_named_twice_is_measured_once(evaluate, capfd):
    assert evaluate("--measures", "first,first", "--json") == 0
    assert len(capfd.readouterr().out.splitlines()) == 1
