"""Peak memory of a step, measured at the allocator, and a limit under which a step that is too large fails.

What counts is *extra* bytes: the maximum allocated at one moment of the step, minus what was allocated before it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sape2.training.memory_errors import available_bytes

STATM = Path("/proc/self/statm")


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The extra bytes of `step()` at their highest, temporaries inside operators and autograd functions included.

    On a CPU every block that PyTorch's allocator gives out and takes back is recorded by the profiler; the highest
    running sum of these records is exact and the same in every run. Memory that BLAS and oneDNN take from the system
    for themselves is not in it, and memory from before that the step frees is not subtracted. On CUDA it is what
    `torch.cuda.max_memory_allocated` counts. Raises ValueError for other devices.
    """
    meter = PeakMeter(device)
    meter.start()
    try:
        step()
    finally:
        highest = meter.stop()
    return highest


class PeakMeter:
    """Measures `peak_bytes` of the code that runs between `start` and `stop`."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"peak memory can be measured on cpu and cuda; got {self.device.type}")
        self._profiler: Any = None
        self._before = 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line about every start and stop otherwise
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def stop(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        self._profiler.stop()
        return max(accumulate(_allocations(self._profiler), initial=0))


def _allocations(profiler: Any) -> list[int]:
    """Bytes given out (positive) and taken back (negative), in order of time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def within_available(device: torch.device) -> Iterator[None]:
    """On a CPU, an allocation beyond the available memory fails with an error instead of ending the process. Linux only."""
    if device.type != "cpu" or not STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(STATM.read_text().split()[5]) * resource.getpagesize()
    limit = used + available_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
