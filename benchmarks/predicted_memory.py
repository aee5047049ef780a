"""Peak memory of a step, predicted on tensors that have a shape but no memory.

What counts is *extra* bytes, as in `sape2.evaluation.cost.memory`. torch.distributed._tools.MemTracker gives the same bytes; it
is private, and takes seconds to import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
