"""The models of the sprint are measured once each, and trained again where only their rows are left."""

import pytest
import sprint_measures
import sprint_plan
from test_sprint import TINY

from sape2.runs.rows import read_rows

TRIAL = sprint_plan.Trial("digits", "none", epochs=1, settings=TINY)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(sprint_measures, "ROWS", tmp_path / "measures.jsonl")
    monkeypatch.setitem(sprint_measures.PARTS, "sizes", lambda run: [{"name": "8x8", "value": 0.5}])
    return tmp_path


def measures(out):
    sprint_measures.measure_trial(TRIAL, "sizes", None, out)
    return [row["digest"] for row in read_rows(out / "measures.jsonl")]


def test_a_run_that_is_not_finished_is_not_measured(out):
    (out / TRIAL.digest).mkdir()
    assert measures(out) == []


def test_a_kept_run_without_a_folder_is_trained_again_and_measured_once(out, monkeypatch):
    monkeypatch.setattr(sprint_measures, "train", lambda *trial: None)  # its row is kept
    sprint_measures.train_again("search", TRIAL, None, out)
    assert measures(out) == [TRIAL.digest]
    assert measures(out) == [TRIAL.digest]


def test_models_of_the_whole_length_have_tables_of_their_own(monkeypatch):
    trials = sprint_plan.STAGES["headline"](read_rows(sprint_plan.ROWS))
    (long,) = (trial for trial in trials if (trial.encoding, trial.seed) == ("ape", 0))
    short = next(iter(sprint_plan.one_rate(["ape"], [0])))
    monkeypatch.setattr(sprint_measures, "read_rows", lambda path: [{"digest": long.digest}])
    monkeypatch.setattr(sprint_measures, "rows_of", lambda rows, *stages: rows)
    rows = [
        {"digest": trial.digest, "encoding": "ape", "seed": 0, "part": "sizes", "name": "48x48", "value": value}
        for trial, value in ((long, 0.7), (short, 0.4))
    ]
    assert "0.700" in sprint_measures.TABLES["sizes of the whole"](rows)
    assert "0.400" not in sprint_measures.TABLES["sizes of the whole"](rows)
    assert "0.400" in sprint_measures.TABLES["sizes"](rows)
