"""Ranks, small CPU collectives and error propagation for several processes that train one run.

A launcher (torchrun) starts the same command several times and says so in the environment. Gradients go through
accelerate; this module exchanges numbers and small objects on the CPU, in a process group of its own, so they never mix
with gradients. Every exchange carries the state of each process, so none waits for one that failed or left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sape2.machine import find_device

IN_ONE = "To train in one process, unset WORLD_SIZE"
ALONE_OR_LONGER = f"{IN_ONE}; to wait longer, set SAPE2_JOIN_SECONDS"
TOLD_AFTER_S = 5.0  # that the others have not come yet
HEARD_WITHIN_S = 10.0  # how long a process that failed waits for the others to come and hear why
WORKING, LEAVING, FAILED = 0, 1, 2


class Elsewhere(ValueError):
    """Another process failed; the text is what it said."""


class Dismissed(Exception):
    """Another process has left normally: there is no more work to do together."""


class Processes:
    """The processes that work on one run, `size` of them; this one is number `rank`. Without a group it is alone."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank()
        self.size = 1 if group is None else dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """True for the process that reads and writes the run folder and prints."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give. All of them must call it.

        Raises Elsewhere if one of them failed, Dismissed if one has left, ConnectionError if one is gone.
        """
        return number if self._group is None else self._exchange(WORKING, number)

    def barrier(self) -> None:
        """Waits until all processes have come here. Raises what `largest` raises."""
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """Collects the values of all processes, by rank. All of them must call it; raises what `largest` raises."""
        if self._group is None:
            return [value]
        self._exchange(WORKING)
        return self._gather(value)

    def from_main(self, value: Any) -> Any:
        """Broadcasts the value of the main process. All of them must call it; raises what `largest` raises."""
        if self._group is None:
            return value
        self._exchange(WORKING)
        box = [value]
        with lost_is_an_os_error():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def leave(self) -> None:
        """Waits until all are done, and closes the connections. Raises Elsewhere if another one failed before that."""
        if self._group is None:
            return
        self._exchange(LEAVING)
        self._close()

    def fail(self, error: BaseException) -> None:
        """Sends the reason to the others, waits ten seconds at most for them, and closes the connections."""
        if self._group is None:
            return
        with contextlib.suppress(RuntimeError, OSError):
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            options.timeout = timedelta(seconds=HEARD_WITHIN_S)  # of the operation: closing waits for one that goes on
            self._group.allreduce([torch.tensor([FAILED, 0])], options).wait()
            self._gather(str(error) or type(error).__name__)
        self._close()

    def _exchange(self, state: int, number: int = 0) -> int:
        values = torch.tensor([state, number])
        with lost_is_an_os_error():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        highest, number = values.tolist()
        if highest > state:
            reasons = [reason for reason in self._gather(None) if reason is not None] if highest == FAILED else []
            self._close()
            raise Elsewhere(reasons[0]) if reasons else Dismissed
        return number

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with lost_is_an_os_error():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _close(self) -> None:
        self._group = None
        dist.destroy_process_group()


ALONE = Processes()


@contextmanager
def lost_is_an_os_error() -> Iterator[None]:
    """Turns the RuntimeError that torch raises for a broken connection into a ConnectionError with a one-line message."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ConnectionError(
            "another process of this run is gone (its own message says why); the same command goes on from the last checkpoint"
        ) from error


def is_lost(error: RuntimeError) -> bool:
    """True if the error is about the connection to another process; only some backends raise a type of their own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def launched() -> int:
    """The number of processes that a launcher says it started. Raises ValueError for what is no number of processes."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"WORLD_SIZE must be the number of processes that a launcher started; got {text!r}; unset it")
    return int(text)


def refuse_launcher(command: str) -> None:
    """Raises ValueError if a launcher started several processes; `command` runs in one."""
    if launched() > 1:
        raise ValueError(
            f"{command} runs in one process, but WORLD_SIZE says that {launched()} were started; start it without torchrun, "
            "or unset WORLD_SIZE (of several processes only `sape2 train` makes use)"
        )


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes that the launcher started, from here to the end of the block; `ALONE` if it is this one only.

    An error in one process ends the block in all: the others raise Elsewhere at their next exchange.
    """
    if launched() == 1:
        yield ALONE
        return
    processes = connect()
    try:
        with lost_is_an_os_error():
            yield processes
    except BaseException as error:
        processes.fail(error)
        raise
    processes.leave()


def connect() -> Processes:
    """Connects the processes: gloo for CPUs, and the accelerator's backend (NCCL on CUDA); addresses come from the environment.

    Raises ConnectionError if the others have not come within a minute (`SAPE2_JOIN_SECONDS`), and says after a few seconds
    that it waits for them: a WORLD_SIZE that is left over from something else has no partners. Raises ValueError where such
    a one stands alone.
    """
    place = find_device()
    beside = "" if place.type == "cpu" else f",{place.type}:{dist.get_default_backend_for_device(place)}"
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of patches of one channel; harmless
    seconds = join_seconds()
    told = threading.Timer(TOLD_AFTER_S, _tell_that_it_waits, [seconds])
    told.daemon = True
    told.start()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        store.set_timeout(dist.default_pg_timeout)
        dist.init_process_group(f"cpu:gloo{beside}", store=store, rank=rank, world_size=size)
        return Processes(dist.new_group(backend="gloo"))
    except ValueError as error:  # of torch, about what a launcher sets beside WORLD_SIZE
        raise ValueError(f"WORLD_SIZE says that {launched()} processes were started, but: {error}. {IN_ONE}") from error
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"the {launched()} processes of this run did not come together within {seconds:g} s: {reason} {ALONE_OR_LONGER}"
        ) from error
    finally:
        told.cancel()


def join_seconds() -> float:
    """Seconds that a process waits for the others at the start."""
    text = os.environ.get("SAPE2_JOIN_SECONDS", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"SAPE2_JOIN_SECONDS must be a number above 0 and below a million; got {text!r}")
    return seconds


def _tell_that_it_waits(seconds: float) -> None:
    print(
        f"waiting for the other processes, {seconds:g} s at most: WORLD_SIZE says that {launched()} were started. "
        f"{ALONE_OR_LONGER}",
        file=sys.stderr,
        flush=True,
    )
