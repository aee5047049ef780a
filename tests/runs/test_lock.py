"""One folder, one process: locks under races, kills, sleeping holders, and folders that go away."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from sape2.runs.lock import NAME, Held, Holder, LockLost, hold

HOLD = """
import os, sys, time
from pathlib import Path
from sape2.runs.lock import Held, hold
try:
    lock = hold(Path(sys.argv[1]), "step 5")
except Held:
    print("held", flush=True)
else:
    if sys.argv[2] != "fork" or os.fork() == 0:  # as a process that prepares images; it outlives its parent for a while
        print("locked", flush=True)
    sys.stdin.read()
"""


def start_holder(folder, how=""):
    """A process that locks the folder and keeps it until it is ended; light, since locks need no torch."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    process = start_holder(tmp_path)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def leave_lock(folder, **values):
    """What a process that was killed left behind."""
    (folder / NAME).write_text(json.dumps(asdict(Holder(7, "here", "2020-01-01", **values))))


def is_free(folder):
    try:
        with hold(folder):
            return True
    except Held:
        return False


# --- one holder ------------------------------------------------------------------------------------------------------


def test_a_held_folder_is_refused_and_the_line_says_who_holds_it_since_when(tmp_path, holder):
    with pytest.raises(Held, match=f"{tmp_path} is in use by process {holder.pid} on .* since 20"):
        hold(tmp_path)


def test_a_lock_is_given_back_at_the_end_and_after_an_exception(tmp_path):
    for error in (None, KeyError):
        try:
            with hold(tmp_path):
                assert not is_free(tmp_path)
                if error:
                    raise error
        except KeyError:
            pass
        assert list(tmp_path.iterdir()) == []
        assert is_free(tmp_path)


def test_folders_made_for_a_lock_go_with_it_unless_something_came_into_them(tmp_path):
    with hold(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_of_several_processes_one_holds(tmp_path):
    processes = [start_holder(tmp_path) for _ in range(3)]
    assert sorted(process.stdout.readline() for process in processes) == ["held\n", "held\n", "locked\n"]
    for process in processes:
        process.communicate("")
    assert is_free(tmp_path)


def test_two_never_hold_at_once_while_many_take_and_give_back(tmp_path):
    """Each gives back by removing the file that the next may have opened already."""
    inside, most, done = [], [], []

    def take():
        while len(done) < 60:
            with contextlib.suppress(Held), hold(tmp_path) as lock:
                inside.append(1)
                most.append(len(inside))
                lock.check()
                inside.pop()
                done.append(1)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_is_given_back(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            hold(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert is_free(tmp_path)


def test_a_file_system_without_locks_is_refused_rather_than_locked_in_another_way(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="Function not implemented"):
        hold(tmp_path)


# --- holders that are gone -------------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_process_is_free_at_once_and_its_death_is_counted(tmp_path, holder):
    holder.kill()
    holder.wait()
    with hold(tmp_path, "step 5") as lock:
        assert lock.holder.deaths == 1
    leave_lock(tmp_path, note="step 5", deaths=2)
    with hold(tmp_path, "step 6") as lock:  # there was progress in between
        assert lock.holder.deaths == 0


def test_a_zombie_is_gone(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert is_free(tmp_path)


def test_what_a_killed_process_forked_does_not_keep_its_lock(tmp_path):
    process = start_holder(tmp_path, "fork")
    assert process.stdout.readline() == "locked\n"
    process.kill()
    process.wait()
    assert is_free(tmp_path)
    process.stdin.close()  # ends the other one
    process.stdout.close()


def test_a_process_that_sleeps_keeps_its_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    assert not is_free(tmp_path)
    os.kill(holder.pid, signal.SIGCONT)


def test_another_process_with_the_number_of_a_killed_one_does_not_keep_its_lock(tmp_path):
    (tmp_path / NAME).write_text(json.dumps(asdict(Holder(os.getpid()))))
    assert is_free(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tok": 3}'])
def test_a_file_that_cannot_be_read_is_of_someone_unknown_and_does_not_keep_the_folder(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    other = FileLock(tmp_path / NAME)
    with other, pytest.raises(Held, match="by process 0 on an unknown machine"):
        hold(tmp_path)
    assert is_free(tmp_path)


def test_of_several_takers_one_wins(tmp_path):
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave_lock(folder)
        won, start = [], threading.Barrier(6)

        def take(folder=folder, won=won, start=start):
            start.wait()
            with contextlib.suppress(Held):
                won.append(hold(folder))

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        won[0].release()
        assert list(folder.iterdir()) == []


# --- holders that lost -----------------------------------------------------------------------------------------------


def test_a_holder_learns_that_its_lock_was_replaced_and_leaves_the_new_one_alone(tmp_path):
    lock = hold(tmp_path)
    lock.check()
    (tmp_path / NAME).rename(tmp_path / "old")
    with hold(tmp_path) as new:
        with pytest.raises(LockLost, match="was removed or replaced"):
            lock.check()
        lock.release()
        new.check()


def test_a_holder_learns_that_its_folder_is_gone_and_does_not_make_it_again(tmp_path):
    lock = hold(tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    with pytest.raises(LockLost, match="was removed"):
        lock.check()
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError, match="run was removed"):
        lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []
