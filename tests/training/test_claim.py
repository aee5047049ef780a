"""One folder, one process: claims under races, kills, sleeping holders, wrong clocks, and folders that go away."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest

from sape2.training import claim as claims
from sape2.training.claim import NAME, ClaimLost, Held, Holder, Watcher, start_of, this_machine

HOLD = """
import sys, time
from pathlib import Path
from sape2.training.claim import Held, Watcher
try:
    claim = Watcher().claim(Path(sys.argv[1]), "step 5")
except Held:
    print("held", flush=True)
else:
    print("claimed", flush=True)
    sys.stdin.read()
"""
needs_proc = pytest.mark.skipif(this_machine() is None, reason="no /proc: only signs of life tell")


def start_holder(folder):
    """A process that claims the folder and keeps it until it is ended; light, since claims need no torch."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    process = start_holder(tmp_path)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def clock(monkeypatch):
    """The watcher's own clock, turned by hand."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

        strftime = staticmethod(claims.time.strftime)

    made = Clock()
    monkeypatch.setattr(claims, "time", made)
    return made


def leave_claim(folder, **changes):
    """A claim that someone elsewhere left behind."""
    holder = replace(Holder("abc", "elsewhere", 7, "2020-01-01", "another boot", "5"), **changes)
    (folder / NAME).write_text(json.dumps(asdict(holder)))
    return holder


def is_free(watcher, folder):
    try:
        with watcher.claim(folder):
            return True
    except Held:
        return False


# --- one holder ------------------------------------------------------------------------------------------------------


def test_a_held_folder_is_refused_and_the_line_says_who_holds_it_since_when(tmp_path, holder):
    with pytest.raises(
        Held, match=f"{tmp_path} is in use by process {holder.pid} on .* since 20.*; wait for it, stop it"
    ) as held:
        Watcher().claim(tmp_path)
    assert held.value.live


def test_a_claim_is_given_back_at_the_end_and_after_an_exception(tmp_path):
    for error in (None, KeyError):
        try:
            with Watcher().claim(tmp_path):
                assert not is_free(Watcher(), tmp_path)
                if error:
                    raise error
        except KeyError:
            pass
        assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_claim_go_with_it_unless_something_came_into_them(tmp_path):
    with Watcher().claim(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with Watcher().claim(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_of_several_processes_one_claims(tmp_path):
    processes = [start_holder(tmp_path) for _ in range(3)]
    assert sorted(process.stdout.readline() for process in processes) == ["claimed\n", "held\n", "held\n"]
    for process in processes:
        process.communicate("")
    assert is_free(Watcher(), tmp_path)


# --- holders that are gone -------------------------------------------------------------------------------------------


@needs_proc
def test_the_claim_of_a_killed_process_is_free_at_once_and_its_death_is_counted(tmp_path, holder):
    holder.kill()
    holder.wait()
    with Watcher().claim(tmp_path, "step 5") as claim:
        assert claim.holder.deaths == 1
    leave_claim(tmp_path, machine=this_machine(), note="step 5", deaths=2)
    with Watcher().claim(tmp_path, "step 6") as claim:  # there was progress in between
        assert claim.holder.deaths == 0


@needs_proc
def test_a_zombie_is_gone(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert is_free(Watcher(), tmp_path)


@needs_proc
def test_a_process_that_sleeps_on_this_machine_keeps_its_claim(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    assert not is_free(Watcher(stale_s=0.0), tmp_path)
    os.kill(holder.pid, signal.SIGCONT)


@needs_proc
def test_another_process_with_the_same_number_does_not_keep_a_claim(tmp_path):
    leave_claim(tmp_path, machine=this_machine(), pid=os.getpid(), started=start_of(os.getpid()))
    assert not is_free(Watcher(), tmp_path)
    leave_claim(tmp_path, machine=this_machine(), pid=os.getpid(), started="1")
    assert is_free(Watcher(), tmp_path)


def test_a_holder_elsewhere_is_gone_after_a_time_without_a_sign_of_life(tmp_path, clock):
    leave_claim(tmp_path)
    watcher = Watcher(stale_s=60.0, beat_s=10.0)
    for _ in range(6):
        assert not is_free(watcher, tmp_path)
        clock.now += 10
    assert is_free(watcher, tmp_path)


def test_a_sign_of_life_counts_whatever_time_it_says_it_is(tmp_path, clock):
    leave_claim(tmp_path)
    watcher = Watcher(stale_s=60.0, beat_s=10.0)
    for look in range(20):
        clock.now += 10
        if look % 5 == 0:
            os.utime(tmp_path / NAME, (10**6 - look, 10**6 - look))  # a clock of 1970 that runs backwards
        assert not is_free(watcher, tmp_path)
    with pytest.raises(Held) as held:
        watcher.claim(tmp_path)
    assert held.value.live


def test_time_in_which_the_watcher_did_not_look_counts_little(tmp_path, clock):
    """It may have slept, or its folder may have been away, while the holder could not touch its claim either."""
    leave_claim(tmp_path)
    watcher = Watcher(stale_s=60.0, beat_s=10.0)
    assert not is_free(watcher, tmp_path)
    clock.now += 10**6
    assert not is_free(watcher, tmp_path)


def test_waiting_ends_with_a_claim_or_with_the_sign_of_life(tmp_path, clock):
    leave_claim(tmp_path)
    said = []
    with Watcher(stale_s=60.0, beat_s=10.0).wait(tmp_path, say=said.append) as claim:
        assert claim.holder.deaths == 1
    assert len(said) == 1
    assert "elsewhere claimed" in said[0]
    leave_claim(tmp_path)
    sleep = clock.sleep

    def beat(seconds):
        sleep(seconds)
        os.utime(tmp_path / NAME, (clock.now, clock.now))

    clock.sleep = beat
    with pytest.raises(Held, match="process 7 on elsewhere"):
        Watcher(stale_s=60.0, beat_s=10.0).wait(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tok": 3}'])
def test_a_claim_that_cannot_be_read_is_of_someone_unknown(tmp_path, clock, text):
    (tmp_path / NAME).write_text(text)
    watcher = Watcher(stale_s=20.0, beat_s=10.0)
    assert not is_free(watcher, tmp_path)
    clock.now += 10
    assert not is_free(watcher, tmp_path)
    clock.now += 10
    assert is_free(watcher, tmp_path)


@needs_proc
def test_of_several_takers_one_wins(tmp_path):
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave_claim(folder, machine=this_machine(), token=f"t{attempt}")
        won, start = [], threading.Barrier(6)

        def take(folder=folder, won=won, start=start):
            start.wait()
            with contextlib.suppress(Held):
                won.append(Watcher().claim(folder))

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        won[0].release()
        assert list(folder.iterdir()) == []


@needs_proc
def test_a_late_taker_does_not_take_the_claim_of_the_one_before(tmp_path):
    """Both saw the same stale claim; the second comes when the first has taken it."""
    stale = leave_claim(tmp_path, machine=this_machine())
    late = claims._myself("")
    with Watcher().claim(tmp_path) as claim:
        assert not Watcher()._take_over(tmp_path / NAME, stale, late)
        claim.check()
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


@needs_proc
def test_a_taker_that_died_in_the_middle_blocks_nobody(tmp_path):
    stale = leave_claim(tmp_path, machine=this_machine())
    (tmp_path / f"{NAME}-after-{stale.token}").write_text(json.dumps(asdict(replace(stale, token="taker"))))
    assert is_free(Watcher(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- holders that lost -----------------------------------------------------------------------------------------------


def test_a_holder_learns_that_it_lost_its_claim_and_leaves_the_new_one_alone(tmp_path):
    claim = Watcher().claim(tmp_path)
    claim.check()
    leave_claim(tmp_path)
    with pytest.raises(ClaimLost, match="taken over by process 7 on elsewhere; nothing more is written"):
        claim.check()
    claim.release()
    assert (tmp_path / NAME).exists()


def test_a_holder_learns_that_its_folder_is_gone_and_does_not_make_it_again(tmp_path):
    claim = Watcher().claim(tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    with pytest.raises(ClaimLost, match="was removed"):
        claim.check()
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError, match="run was removed while it was being written to"):
        claim.check()
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_the_holder_touches_its_claim(tmp_path):
    with Watcher(beat_s=0.01).claim(tmp_path):
        os.utime(tmp_path / NAME, (1, 1))
        deadline = threading.Event()
        for _ in range(500):
            if (tmp_path / NAME).stat().st_mtime > 1:
                return
            deadline.wait(0.01)
    raise AssertionError("no sign of life within 5 s")
