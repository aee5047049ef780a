"""A study as jobs: what is submitted, what is taken up, what stops; then real jobs, killed and out of time."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from slurm_cases import install_slurm, starts
from study_cases import finish

from sape2.cli import main
from sape2.runs.checkpoint import last_checkpoint
from sape2.runs.lock import NAME, hold
from sape2.studies.compare import launch as launching
from sape2.studies.compare.launch import CellJob, launch
from sape2.studies.compare.rawrows import read_raw
from sape2.training.interruption import Stopped

ALL = ["none seed 0", "ape seed 0", "none seed 1", "ape seed 1"]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(launching, "LOOK_S", 0.01)


class Jobs:
    """A launcher whose jobs are over after `looks` looks, when `end` has been called with their cell."""

    def __init__(self, end=finish, looks=2):
        self.end, self.looks, self.submitted, self.under_way, self.most = end, looks, [], 0, 0

    def submit(self, study, cell):
        self.submitted.append(cell.name)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        left = [None] * self.looks

        def done():
            if left and not (left.pop() or left):
                self.end(cell)
                self.under_way -= 1
            return not left

        return SimpleNamespace(job_id=len(self.submitted), done=done)


def test_each_run_is_submitted_once_and_its_row_gathered(study):
    jobs, told = Jobs(), []
    rows = launch(study, jobs, tell=lambda what, cell, rows: told.append(what))
    assert jobs.submitted == ALL
    assert jobs.most == 4
    assert rows == read_raw(study.rows)
    assert len(rows) == 4
    assert (told.count("submitted"), told.count("finished")) == (4, 4)


def test_no_more_jobs_at_a_time_than_are_asked_for(study):
    jobs = Jobs()
    launch(study, jobs, 2)
    assert jobs.most == 2
    assert sorted(jobs.submitted) == sorted(ALL)


def test_what_is_settled_is_not_submitted(study):
    finish(study.cells[1])
    jobs = Jobs()
    assert len(launch(study, jobs)) == 4
    assert jobs.submitted == [ALL[0], *ALL[2:]]
    jobs = Jobs()
    launch(study, jobs)
    assert jobs.submitted == []


def test_a_run_whose_job_vanished_is_submitted_again_and_after_three_noted_as_failed(study):
    vanish = {ALL[0]: 1, ALL[2]: 9}

    def end(cell):
        vanish[cell.name] = vanish.get(cell.name, 0) - 1
        if vanish[cell.name] < 0:
            finish(cell)

    jobs, told = Jobs(end), []
    rows = launch(study, jobs, tell=lambda what, cell, rows: told.append((what, cell.name)))
    assert {name: jobs.submitted.count(name) for name in ALL} == {ALL[0]: 2, ALL[1]: 1, ALL[2]: 3, ALL[3]: 1}
    (failed,) = (row["failed"] for row in rows if "failed" in row)
    assert "3 jobs" in failed
    assert ("failed", ALL[2]) in told


def test_a_run_that_someone_holds_is_not_noted_as_failed_for_it(study):
    """Its jobs came to nothing, but a process outside of them works on it."""
    cell = study.cells[0]
    lock, submitted = hold(cell.folder), []

    def end(which):
        submitted.append(which.name)
        if which == cell and submitted.count(which.name) < 5:
            return
        if which == cell:
            lock.release()
        finish(which)

    rows = launch(study, Jobs(end))
    assert not any("failed" in row for row in rows)


def test_an_error_that_is_not_of_one_run_stops_and_is_told_in_one_line(study):
    def end(cell):
        folder = launching.jobs_folder(study, cell)
        folder.mkdir(parents=True)
        (folder / "reason.txt").write_text("OSError: [Errno 28] No space left on device")

    jobs = Jobs(end, looks=1)
    with pytest.raises(OSError, match=r"the job of none seed 0 stopped: .*No space left on device; logs: "):
        launch(study, jobs)


def test_an_old_reason_does_not_stop_a_new_job(study):
    folder = launching.jobs_folder(study, study.cells[0])
    folder.mkdir(parents=True)
    (folder / "reason.txt").write_text("OSError: yesterday")
    vanish = [1]
    assert len(launch(study, Jobs(lambda cell: finish(cell) if not vanish or vanish.pop() is None else None))) == 4


def test_a_signal_ends_the_command_and_the_same_one_goes_on(study):
    caught = []

    def end(cell):
        finish(cell)
        caught.append(15)

    jobs = Jobs(end, looks=1)
    with pytest.raises(Stopped):
        launch(study, jobs, 2, caught=caught)
    assert jobs.submitted == ALL[:2]
    again = Jobs()
    assert len(launch(study, again)) == 4
    assert again.submitted == ALL[2:]


def test_a_job_out_of_time_stops_training_first_and_is_requeued_then(study, monkeypatch):
    """SIGUSR2 has submitit's handler when the job begins; that one exits."""
    heard = []

    def working(*_, caught, **__):
        os.kill(os.getpid(), signal.SIGUSR2)
        heard.append(list(caught))
        raise Stopped(caught[0])

    monkeypatch.setattr(launching, "load_data", lambda *_: None)
    monkeypatch.setattr(launching, "work", working)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append("requeued"))
    try:
        CellJob(study, study.cells[0])()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [[signal.SIGTERM], "requeued"]


def test_a_job_leaves_the_reason_of_an_error_of_everyone(study, monkeypatch, capfd):
    def working(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launching, "load_data", lambda *_: None)
    monkeypatch.setattr(launching, "work", working)
    CellJob(study, study.cells[0])()
    folder = launching.jobs_folder(study, study.cells[0])
    assert (folder / "reason.txt").read_text() == "OSError: [Errno 28] No space left on device"
    assert "Traceback" in capfd.readouterr().err


# --- mistakes --------------------------------------------------------------------------------------------------------

SETTINGS = ["model.dim=12", "model.depth=1", "train.epochs=4", "train.warmup_epochs=0", "train.batch_size=32"]
SETTINGS += ["train.precision=fp32", "train.workers=0", "train.checkpoint_every=1", "data.train_limit=128"]
COMPARE = ["compare", "digits", "--encodings", "none,ape", "--seeds", "1"]
COMPARE += [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (["--jobs", "2"], "--jobs needs --launcher slurm"),
        (["--slurm", "partition=gpu"], "--slurm needs --launcher"),
        (["--launcher", "slurm", "--slurm", "partition"], "--slurm needs KEY=VALUE"),
        (["--launcher", "slurm", "--jobs", "0"], "--jobs"),
    ],
)
def test_a_mistake_in_the_options_is_one_line_and_makes_nothing(tmp_path, capfd, extra, line):
    pytest.importorskip("submitit")
    assert main([*COMPARE, "--out", str(tmp_path / "out"), *extra]) == 2
    assert line in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_line_names_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*COMPARE, "--out", str(tmp_path / "out"), "--launcher", "slurm"]) == 2
    assert "--launcher needs submitit: pip install 'sape2[cluster]'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("extra", "line"), [("color=red", "color"), ("nodes=2", "--slurm may not set nodes"), ("", "needs sbatch")]
)
def test_a_parameter_that_sbatch_does_not_have_or_that_is_ours_is_named(tmp_path, capfd, monkeypatch, extra, line):
    pytest.importorskip("submitit")
    if extra:
        install_slurm(tmp_path / "slurm", monkeypatch)
    options = ["--slurm", extra] if extra else []
    assert main([*COMPARE, "--out", str(tmp_path / "out"), "--launcher", "slurm", *options]) == 2
    err = capfd.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- real jobs -------------------------------------------------------------------------------------------------------


def same_weights(folder, other):
    for name in ("none-s0", "ape-s0"):
        one, two = (load_file(where / name / "model.safetensors") for where in (folder, other))
        assert all(torch.equal(one[key], two[key]) for key in two)


def signal_once(folder, number, at="step-00000003"):
    """Waits until the run is at a checkpoint, and sends the signal to the process that holds it."""
    while not ((found := last_checkpoint(folder)) and found.name >= at):
        time.sleep(0.01)
    os.kill(json.loads((folder / NAME).read_text())["pid"], number)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


def in_the_background(call, *arguments):
    import threading

    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize(("number", "submitted", "started"), [(signal.SIGKILL, 2, 1), (signal.SIGUSR2, 1, 2)])
def test_slurm_jobs_that_are_killed_or_out_of_time_go_on_to_the_same_weights(
    tmp_path, alone, capfd, monkeypatch, number, submitted, started
):
    pytest.importorskip("submitit")
    install_slurm(tmp_path / "slurm", monkeypatch)
    sender = in_the_background(signal_once, tmp_path / "out" / "none-s0", number)
    assert main([*COMPARE, "--out", str(tmp_path / "out"), "--launcher", "slurm", "--slurm", "timeout_min=30"]) == 0
    sender.join()
    assert capfd.readouterr().err.count("none seed 0: submitted") == submitted
    assert starts(tmp_path / "slurm")["1"] == started
    same_weights(tmp_path / "out", alone)


@pytest.mark.slow
def test_a_command_given_again_watches_the_jobs_that_are_in_the_queue(tmp_path, alone, monkeypatch):
    pytest.importorskip("submitit")
    install_slurm(tmp_path / "slurm", monkeypatch)
    argv = [*COMPARE, "--out", str(tmp_path / "out"), "--launcher", "slurm"]
    with monkeypatch.context() as patch:
        patch.setattr(launching.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        assert main(argv) == 128 + signal.SIGTERM
    assert main(argv) == 0
    assert starts(tmp_path / "slurm") == {"1": 1, "2": 1}
    same_weights(tmp_path / "out", alone)
