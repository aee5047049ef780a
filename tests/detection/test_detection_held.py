"""A detection run holds its folder, and stops at a signal between two steps, from where it goes on exactly."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from coco_cases import SETTINGS, write_coco
from safetensors.torch import load_file

from sape2.cli import main
from sape2.detection.train import DetectionSteps
from sape2.runs.checkpoint import last_checkpoint
from sape2.runs.lock import NAME, hold
from sape2.runs.rows import read_rows

pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"))


def command(data, folder, *more):
    """Two epochs of four steps."""
    sets = [text for setting in [*SETTINGS, "training.epochs=2", "training.batch_size=2", *more] for text in ("--set", setting)]
    return ["detect", "coco", "--data", str(data), "--encoding", "ape", "--model", "vit_nano", "--out", str(folder), *sets]


@pytest.fixture
def after_step(monkeypatch):
    """Calls what is given once that many steps are done."""
    take = DetectionSteps.take

    def given(number, act):
        def stepping(self, batch):
            take(self, batch)
            if self.progress.step + 1 == number:
                act()

        monkeypatch.setattr(DetectionSteps, "take", stepping)

    return given


def test_a_second_process_in_the_folder_is_refused_with_the_first_one_named(tmp_path, data, capfd):
    with hold(tmp_path / "run"):
        assert main(command(data, tmp_path / "run")) == 2
        assert f"in use by process {os.getpid()}" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_held_while_it_trains_and_free_afterwards(tmp_path, data, after_step, capfd):
    statuses = []
    after_step(1, lambda: statuses.append(main(command(data, tmp_path / "run"))))
    assert main(command(data, tmp_path / "run")) == 0
    assert statuses == [2]
    assert "in use by process" in capfd.readouterr().err
    assert not (tmp_path / "run" / NAME).exists()


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_whose_lock_is_lost_writes_nothing_more(tmp_path, data, after_step, capfd, taken):
    def lose():
        (tmp_path / "run" / NAME).unlink()
        if taken:
            (tmp_path / "run" / NAME).write_text("{}")

    after_step(3, lose)
    assert main(command(data, tmp_path / "run")) == 2
    assert "the lock of this process" in capfd.readouterr().err
    assert last_checkpoint(tmp_path / "run") is None
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on_exactly(tmp_path, data, after_step, capfd, number, step):
    before = signal.getsignal(number)
    after_step(step, lambda: os.kill(os.getpid(), number))
    assert main(command(data, tmp_path / "run")) == 128 + number
    assert f"stopped at step {step}; " in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert last_checkpoint(tmp_path / "run").name == f"step-{step:08d}"
    assert not (tmp_path / "run" / NAME).exists()
    after_step(0, lambda: None)
    assert main(command(data, tmp_path / "run")) == 0
    assert main(command(data, tmp_path / "whole")) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    for key in ("epoch", "step", "lr", "loss", "loss_classifier"):
        first, second = ([row[key] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("run", "whole"))
        assert first == pytest.approx(second, rel=1e-12)


def test_a_signal_after_the_last_step_lets_the_run_finish(tmp_path, data, after_step):
    after_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(data, tmp_path / "run")) == 0
    assert read_rows(tmp_path / "run" / "results.jsonl")


def test_what_a_killed_writer_left_is_swept(tmp_path, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".model.safetensors.4711-0123abcd").write_text("")
    assert main(command(data, tmp_path / "run")) == 0
    assert list((tmp_path / "run").glob(".*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_saves_a_checkpoint_though_data_workers_get_it_too(tmp_path, data, number):
    argv = command(data, tmp_path / "run", "training.epochs=400", "training.workers=1")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sape2", *argv], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 600  # a busy machine may need minutes to import everything
    while last_checkpoint(tmp_path / "run") is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, errors
    stopped = int(errors.split("stopped at step ")[1].split(";")[0])
    assert last_checkpoint(tmp_path / "run").name == f"step-{stopped:08d}"
