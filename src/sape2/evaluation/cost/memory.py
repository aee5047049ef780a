"""Peak memory of a step: measured at the allocator, or predicted without allocating anything.

Both count *extra* bytes: the maximum allocated at one moment of the step, minus what was allocated before it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# --- measured --------------------------------------------------------------------------------------------------------


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
        return highest_sum(_allocations(self._profiler))


def _allocations(profiler: Any) -> list[int]:
    """Bytes given out (positive) and taken back (negative), in order of time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def highest_sum(changes: list[int]) -> int:
    """The highest running sum, 0 if it never rises above."""
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


# --- predicted -------------------------------------------------------------------------------------------------------


def predicted_peak(
    step: Callable[[Any, list[Tensor]], object], module: nn.Module, inputs: list[Tensor], device: torch.device | str = "cpu"
) -> int | None:
    """The extra bytes of `step(module, inputs)` on `device`, counted on tensors that have a shape there but no memory.

    Every storage that an operator returns counts from then until nothing holds it, autograd included. Temporaries
    inside an operator are not seen, so this is a little below `peak_bytes`. The module, taken in eval mode, and the
    inputs may themselves be on the device "meta". None if what the step does depends on values.
    """
    parts = [*module.parameters(), *module.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        memo = {id(part): _without_memory(part, device) for part in parts}
        shadow = copy.deepcopy(module, memo).eval()
        fakes = [_without_memory(tensor, device) for tensor in inputs]
        with LiveStorages() as live:
            try:
                result = step(shadow, fakes)
            except (DataDependentOutputException, DynamicOutputShapeException):
                return None
            del result
    return live.highest


def _without_memory(like: Tensor, device: torch.device | str) -> Tensor:
    """A fake tensor of this shape that reports `device`; for use inside a FakeTensorMode."""
    fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return nn.Parameter(fake, like.requires_grad) if isinstance(like, nn.Parameter) else fake.requires_grad_(like.requires_grad)


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of the storages that operators return, for as long as anything holds them.

    `highest` is the most there was after any operator. What an operator is given and did not come from one counts 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, 0)
        output = func(*args, **(kwargs or {}))
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        for tensor in _tensors(output):
            self._add(tensor, tensor.untyped_storage().nbytes())
        self.highest = max(self.highest, sum(size for _, size in self._storages.values()))
        return output

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (StorageWeakRef(storage), size)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


# --- available -------------------------------------------------------------------------------------------------------
