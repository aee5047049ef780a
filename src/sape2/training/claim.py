"""Who works on a folder: a lease that several processes, on one machine or on many that share the folder, can rely on.

The lease is the file `.claim` in the folder. It is created with O_EXCL, so one of several wins; its holder touches it
every BEAT_S seconds. It is stale

- at once, when its process was on this machine and is gone (same boot, same process table, and no process with that
  number and start time), and never while that process lives, however long it sleeps;
- for a holder elsewhere, when a watcher has looked at it for STALE_S seconds of its own monotonic clock and nothing
  has changed. Time in which it did not look counts little, and no clock is compared with another one.

A stale lease is taken over by one taker: the successor of a lease is a file named after it, created with O_EXCL and renamed
onto it. A holder that lost its lease all the same (it slept, on another machine, longer than STALE_S) learns it from `check`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

BEAT_S = 15.0
STALE_S = 180.0  # a shared folder may show a file as it was a minute ago
NAME = ".claim"


@dataclass(frozen=True)
class Holder:
    """Who made a claim. `since` is for people; `machine` and `started` say where and which process `pid` is (None: unknown).

    `note` is the caller's; `deaths` counts the holders before this one that vanished with the same note.
    """

    token: str
    host: str = "an unknown machine"
    pid: int = 0
    since: str = "an unknown time"
    machine: str | None = None
    started: str | None = None
    note: str = ""
    deaths: int = 0

    def here(self) -> bool:
        return self.machine is not None and self.machine == this_machine()

    def gone(self) -> bool:
        """Whether it was on this machine, and its process is no more."""
        return self.here() and start_of(self.pid) != self.started

    def alive(self) -> bool:
        """Whether it is on this machine, and its process lives."""
        return self.here() and not self.gone()


class Held(ValueError):
    """Someone else holds the folder; `live` if it is known to be at work, not only to have been."""

    def __init__(self, folder: Path, holder: Holder, live: bool) -> None:
        super().__init__(
            f"{folder} is in use by process {holder.pid} on {holder.host} since {holder.since}; "
            "wait for it, stop it, or choose another --out"
        )
        self.holder, self.live = holder, live


class ClaimLost(OSError):
    """The folder was taken over by another process."""


class Claim:
    """A folder held until the `with` block ends. Touches its file from a thread of its own; `check` says if it still holds."""

    def __init__(self, folder: Path, holder: Holder, made: list[Path], beat_s: float) -> None:
        self.folder, self.holder, self._made, self._beat_s = folder, holder, made, beat_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises FileNotFoundError if the folder is gone, ClaimLost if it is someone else's now."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was removed while it was being written to; nothing more is written there")
        found = _read(self.folder / NAME)
        if found is None or found.token != self.holder.token:
            by = f"taken over by process {found.pid} on {found.host}" if found else "removed"
            raise ClaimLost(f"the claim of this process on {self.folder} was {by}; nothing more is written there")

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a folder that is away for a while comes back; check() tells the rest
                self.check()
                os.utime(self.folder / NAME)

    def release(self) -> None:
        """Gives the folder back, and removes what was made for the claim alone if nothing has come into it."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.check()
            (self.folder / NAME).unlink()
            for folder in reversed(self._made):
                folder.rmdir()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


class Watcher:
    """Claims folders, and remembers for those that others hold how long it has seen no sign of life."""

    def __init__(self, stale_s: float = STALE_S, beat_s: float = BEAT_S) -> None:
        self.stale_s, self.beat_s = stale_s, beat_s
        self._seen: dict[Path, _Look] = {}

    def claim(self, folder: Path, note: str = "") -> Claim:
        """The claim on the folder, which is made if need be. Raises Held, OSError if it cannot be written."""
        made = _make(folder)
        mine = _myself(note)
        path = folder / NAME
        while not _create(path, mine):
            found = _read(path)
            if found is None:  # given back in between
                continue
            if not self._is_stale(path, found):
                raise Held(folder, found, self._is_live(path, found))
            deaths = found.deaths + 1 if found.note == note else 0
            mine = _myself(note, deaths)
            if self._take_over(path, found, mine):
                break
        self._seen.pop(path, None)
        return Claim(folder, mine, made, self.beat_s)

    def wait(self, folder: Path, note: str = "", look_s: float = 1.0, say: object = None) -> Claim:
        """The claim, after as long as it takes to see whether its holder elsewhere is alive. Raises Held if it is."""
        while True:
            try:
                return self.claim(folder, note)
            except Held as held:
                if held.live:
                    raise
                if callable(say):
                    say(f"{held.holder.host} claimed {folder}; looking for a sign of life, up to {self.stale_s:.0f} s")
                    say = None
                time.sleep(look_s)

    def _is_stale(self, path: Path, holder: Holder) -> bool:
        look = self._look(path, holder)
        return holder.gone() or (not holder.alive() and look.unchanged_s >= self.stale_s)

    def _is_live(self, path: Path, holder: Holder) -> bool:
        return holder.alive() or self._seen[path].has_changed

    def _look(self, path: Path, holder: Holder) -> _Look:
        now, sign = time.monotonic(), (holder.token, _touched(path))
        last = self._seen.get(path)
        if last is None or last.sign != sign:
            look = _Look(sign, now, 0.0, last is not None and last.sign[0] == holder.token)
        else:
            look = _Look(sign, now, last.unchanged_s + min(now - last.at, self.beat_s), last.has_changed)
        self._seen[path] = look
        return look

    def _take_over(self, path: Path, stale: Holder, mine: Holder) -> bool:
        """One taker creates the successor of this very claim; it wins if the claim is then still the stale one."""
        successor = path.with_name(f"{NAME}-after-{stale.token}")
        if not _create(successor, mine):
            taker = _read(successor)
            if taker is None or self._is_stale(successor, taker):  # it died between two lines of this function
                successor.unlink(missing_ok=True)
            else:
                time.sleep(0.01)
            return False
        now = _read(path)
        if now is None or now.token != stale.token:
            successor.unlink(missing_ok=True)
            return False
        os.replace(successor, path)
        return True


@dataclass(frozen=True)
class _Look:
    """A claim as last seen: its token and when it was touched, when that was, how long nothing had changed, if it ever did."""

    sign: tuple[str, int]
    at: float
    unchanged_s: float
    has_changed: bool


# --- files -----------------------------------------------------------------------------------------------------------


def _make(folder: Path) -> list[Path]:
    """Makes the folder; returns those that were not there, from the outermost."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{folder} cannot be made: {error.strerror}; choose another --out") from error
    return missing[::-1]


def _create(path: Path, holder: Holder) -> bool:
    """Whether this call created the file."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(asdict(holder)).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _read(path: Path) -> Holder | None:
    """Who made the file; None if there is none. What is not written yet, or damaged, is of an unknown holder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder("unknown")


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# --- processes -------------------------------------------------------------------------------------------------------


def _myself(note: str, deaths: int = 0) -> Holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(
        uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, this_machine(), start_of(os.getpid()), note, deaths
    )


def this_machine() -> str | None:
    """This boot of this machine and its table of processes (containers have their own); None where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def start_of(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None if there is none or it is a zombie. A number is used again, a
    number with its start is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # field 3, the state, comes first
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
