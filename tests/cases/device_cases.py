"""Devices: those that are here, and a check that work on one waits for nothing, on "meta" where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


class Waits(Exception):
    """A device is waited for."""


class _Transfers(TorchDispatchMode):
    """Raises at a copy between the device and the CPU that is not asynchronous; at reading a value "meta" raises itself."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, tensors = func.overloadpacket.__name__, [t for t in args if isinstance(t, torch.Tensor)]
        if name == "_to_copy":
            crosses, asynchronous = tensors[0].device != result.device, kwargs.get("non_blocking", False)
        elif name == "copy_":
            crosses, asynchronous = tensors[0].device != tensors[1].device, len(args) > 2 and args[2]
        else:
            return result
        if crosses and not asynchronous and self.device in (tensors[0].device, result.device):
            raise Waits(f"{name} from {tensors[-1].device} to {result.device}")
        return result


class _Makes(TorchFunctionMode):
    """Raises where a tensor is made of numbers on the device, which sends them and waits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = ("tensor", "as_tensor", "new_tensor", "nonzero", "masked_select", "unique", "tolist", "item")
        if getattr(func, "__name__", "") in names and self.device == getattr(result, "device", None):
            raise Waits(func.__name__)
        return result


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    with _Makes(device), _Transfers(device):
        yield
