"""The models of the sprint are measured once each, and trained again where only their rows are left."""

import pytest
import sprint
import sprint_measures
from test_sprint import TINY

from sape2.runs.rows import read_rows

TRIAL = sprint.Trial("digits", "none", epochs=1, settings=TINY)


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
