"""The work on a grid of runs: order, resume, several workers, runs that fail, folders that go away."""

import json
import shutil
import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from study_cases import finish, tiny_study

from sape2.cli.options import default_name
from sape2.runs.files import safe_name
from sape2.runs.lock import NAME, Holder, hold
from sape2.runs.rows import read_rows
from sape2.studies.compare import rawrows
from sape2.studies.compare import work as working
from sape2.studies.compare.progress import study_progress
from sape2.studies.compare.rawrows import digest_of, raw_row, read_raw
from sape2.studies.compare.work import forget_failures, work
from sape2.training.interruption import Stopped


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(working, "LOOK_S", 0.01)


class Runner:
    """Finishes cells with the accuracies given by name, and remembers which; raises what stands there for one."""

    def __init__(self, outcomes=None):
        self.outcomes, self.seen = outcomes or {}, []

    def __call__(self, cell):
        self.seen.append(cell.name)
        outcome = self.outcomes.get(cell.name, 0.5)
        if isinstance(outcome, BaseException):
            raise outcome
        finish(cell, outcome)


ALL = ["none seed 0", "ape seed 0", "none seed 1", "ape seed 1"]


def accuracies(rows):
    return {f"{row['encoding']} seed {row['seed']}": row["rows"][0]["value"] for row in rows if "failed" not in row}


# --- what is done ----------------------------------------------------------------------------------------------------


def test_the_work_goes_seed_by_seed_and_every_run_leaves_a_line(study):
    run = Runner({"ape seed 1": 0.75})
    rows = work(study, run)
    assert run.seen == ALL
    assert rows == read_rows(study.rows) == read_raw(study.rows)
    assert accuracies(rows) == dict.fromkeys(ALL[:3], 0.5) | {"ape seed 1": 0.75}
    assert [path.name for path in study.folder.rglob(f"{NAME}*")] == []


def test_what_is_finished_is_not_done_again_though_its_line_or_its_folder_is_missing(study):
    work(study, Runner(dict.fromkeys(ALL, 0.25)))
    whole = read_raw(study.rows)
    study.rows.unlink()
    assert work(study, Runner()) == whole
    shutil.rmtree(study.cells[1].folder)
    run = Runner()
    assert work(study, run) == whole
    assert run.seen == []


def test_a_study_can_grow_and_keeps_its_lines(tmp_path, study):
    work(study, Runner())
    run = Runner()
    rows = work(tiny_study(tmp_path / "out", ("ape", "rope"), 3), run)
    assert run.seen == ["rope seed 0", "rope seed 1", "ape seed 2", "rope seed 2"]
    assert len(rows) == 8


def test_a_stop_between_runs_leaves_the_rest_for_later(study):
    caught = []

    def stopping(cell):
        finish(cell)
        caught.append(15)

    with pytest.raises(Stopped) as stopped:
        work(study, stopping, caught=caught)
    assert stopped.value.signal_number == 15
    run = Runner()
    work(study, run)
    assert run.seen == ALL[1:]


# --- runs that fail --------------------------------------------------------------------------------------------------


def test_a_failed_run_is_noted_with_its_reason_and_the_rest_is_finished(study):
    failures = {"ape seed 0": ValueError("the loss is nan\nat step 3"), "none seed 1": RuntimeError("out of memory")}
    told = []
    rows = work(study, Runner(failures), lambda what, cell, rows: told.append((what, cell.name)))
    assert {f"{row['encoding']} seed {row['seed']}": row["failed"] for row in rows if "failed" in row} == {
        "ape seed 0": "the loss is nan at step 3",
        "none seed 1": "RuntimeError: out of memory",
    }
    assert list(accuracies(rows)) == ["none seed 0", "ape seed 1"]
    assert [what for what, _ in told] == ["starting", "finished", "starting", "failed"] * 1 + ["starting", "failed"] + [
        "starting",
        "finished",
    ]


def test_failed_runs_are_tried_again_on_demand_only_and_count_as_finished_then(study):
    work(study, Runner({"ape seed 0": ValueError("no")}))
    again = Runner()
    assert len([row for row in work(study, again) if "failed" in row]) == 1
    assert again.seen == []
    forget_failures(study)
    rows = work(study, again)
    assert again.seen == ["ape seed 0"]
    assert len(rows) == 4
    assert not any("failed" in row for row in rows)


def test_a_full_disk_stops_the_work_and_loses_no_line(study):
    with pytest.raises(OSError, match="No space left"):
        work(study, Runner({"none seed 1": OSError(28, "No space left on device")}))
    assert list(accuracies(read_raw(study.rows))) == ALL[:2]
    run = Runner()
    assert len(work(study, run)) == 4
    assert run.seen == ALL[2:]


def test_a_folder_that_is_deleted_stops_the_work_and_is_not_made_again(study):
    def deleting(cell):
        shutil.rmtree(study.folder)
        cell.run.check_lock()

    with pytest.raises(FileNotFoundError, match="none-s0 was removed"):
        work(study, deleting)
    assert not study.folder.exists()


def test_a_run_that_was_lost_to_another_worker_is_neither_failed_nor_finished_here(study):
    def losing(cell):
        if cell.name == ALL[0] and not (cell.folder / "config.json").exists():
            finish(cell, 0.25)  # by the other one
            (cell.folder / NAME).unlink()
            cell.run.check_lock()
        finish(cell)

    rows = work(study, losing)
    assert accuracies(rows)[ALL[0]] == 0.25
    assert len(rows) == 4


# --- several workers -------------------------------------------------------------------------------------------------


def test_workers_share_the_runs_without_double_work_and_all_see_all_lines(tmp_path):
    study = tiny_study(tmp_path / "out", ("none", "ape", "sincos"), 2)
    study.start()
    runners, results = [Runner() for _ in range(4)], []
    threads = [threading.Thread(target=lambda run=run: results.append(work(study, run))) for run in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for run in runners for name in run.seen) == sorted(cell.name for cell in study.cells)
    assert [len(rows) for rows in results] == [6] * 4
    assert len(read_rows(study.rows)) == 6


def test_a_run_that_another_holds_is_left_for_the_end_and_waited_for(study):
    held = hold(study.cells[0].folder)
    run, told = Runner(), []

    def tell(what, cell, rows):
        told.append(what)
        if what == "waiting":
            held.release()

    assert len(work(study, run, tell)) == 4
    assert run.seen == [*ALL[1:], ALL[0]]
    assert told.count("waiting") == 1


def leave_lock(folder, **values):
    folder.mkdir()
    (folder / NAME).write_text(json.dumps(asdict(Holder(**values))))


def test_the_run_of_a_killed_worker_is_taken_up_but_not_if_it_kills_every_worker(study):
    dead = {"note": "no checkpoint yet"}
    leave_lock(study.cells[0].folder, **dead)
    leave_lock(study.cells[1].folder, **dead, deaths=2)
    run = Runner()
    rows = work(study, run)
    assert run.seen == [ALL[0], *ALL[2:]]
    (failed,) = (row["failed"] for row in rows if "failed" in row)
    assert "3 processes" in failed


def test_lines_written_by_two_at_once_are_all_there_in_the_end(study, monkeypatch):
    """The other one writes what it knew, which is less, after this one."""
    first, second = study.cells[:2]
    finish(first)
    finish(second)
    rows, write = [raw_row(cell.run) for cell in (first, second)], rawrows.write_rows
    interfering = [lambda: write(study.rows, rows[:1])]

    def racing(path, new):
        write(path, new)
        if interfering:
            interfering.pop()()

    monkeypatch.setattr(rawrows, "write_rows", racing)
    assert study.gather() == rows
    assert read_raw(study.rows) == rows


# --- folders that hold something else --------------------------------------------------------------------------------


def test_another_study_in_the_folder_is_refused_and_the_difference_named(tmp_path, study):
    work(study, Runner())
    with pytest.raises(ValueError, match=r"train.lr \(0.001 there, 0.1 here\)"):
        tiny_study(tmp_path / "out", settings=["train.lr=0.1"]).check()
    config = json.loads((study.cells[0].folder / "config.json").read_text())
    config["model"]["depth"] = 3
    (study.cells[0].folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"none-s0 .*model.depth \(3 there, 1 here\)"):
        study.check()


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"study\.json"):
        tiny_study(tmp_path).check()
    with pytest.raises(NotADirectoryError, match="is a file"):
        tiny_study(tmp_path / "notes.txt").check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": 3}'])
def test_damaged_settings_are_named(study, text, as_users_call_it):
    (study.folder / "study.json").write_text(text)
    with pytest.raises(ValueError, match=r"study\.json is damaged"):
        study.check()


# --- names and progress --------------------------------------------------------------------------------------------------


def test_folders_have_safe_names_and_two_encodings_never_share_one(tmp_path):
    assert safe_name("ape+sape2:count=cyclic,dot=key") == "ape+sape2_count=cyclic_dot=key"
    assert safe_name("rope:" + "x" * 200) != safe_name("rope:" + "x" * 201)
    assert len(safe_name("rope:" + "x" * 200)) < 130
    long = "rope:" + "x" * 300
    run = SimpleNamespace(recipe="digits", model=SimpleNamespace(name="vit_nano", encoding=long), seed=0)
    assert default_name(run) == f"digits-vit_nano-{safe_name(long)}-s0"
    assert safe_name(long).endswith(digest_of({"encoding": long}))  # as folders are named that exist
    with pytest.raises(ValueError, match="would share a folder"):
        tiny_study(tmp_path, ("rope+sape2", "sape2+rope"))


def test_runs_of_other_encodings_in_the_folder_are_not_counted(tmp_path, study, capfd):
    work(study, Runner())
    part = tiny_study(study.folder, encodings=("ape",))
    with study_progress(part) as progress:
        progress.tell("finished", part.cells[0], part.gather())
    assert "(2 of 2 runs)" in capfd.readouterr().err
