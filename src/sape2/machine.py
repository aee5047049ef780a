"""The machine: its accelerator, its name, its memory, the precision in which it trains, and models in evaluation on it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
GIB = 2**30


def find_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the device of the model and puts every module back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module, mode in modes.items():
            module.training = mode


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside one that `torch.compile` or peft has wrapped, whose weights have other names; any other as it is."""
    compiled: Any = getattr(model, "_orig_mod", model)
    return compiled.get_base_model() if hasattr(compiled, "get_base_model") else compiled


def uncompiled_name(name: str) -> str:
    """The name that a part or a weight has where no part of its model is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def drawn_seed() -> int:
    """A seed for a generator of its own, which follows from PyTorch's alone."""
    return int(torch.randint(2**62, (), device="cpu"))


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of the model."""
    tensor = next(_tensors(model), None)
    return torch.device("cpu") if tensor is None else tensor.device


def placed(images: Tensor, model: nn.Module) -> Tensor:
    """The images on the device of a model and in the precision of its first weights."""
    like = next((t for t in _tensors(model) if t.is_floating_point()), None)
    return images if like is None else images.to(like)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, for its next step, where glibc gives it out.

    By default glibc maps every large tensor afresh, and the system fills each of its pages with zeros again in every step. On
    an AMD EPYC with bf16 that was a seventh of a training step. Returns whether the allocator has taken the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([mallopt(M_MMAP_THRESHOLD, GIB), mallopt(M_TRIM_THRESHOLD, 2 * GIB - 1)])


def hardware() -> str:
    """What result rows call this machine: the name of its GPU, or the kind and number of its CPU cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU x{os.cpu_count()}"


def precision_of(setting: str) -> str:
    """fp32, bf16 or fp16 for a `train.precision`; auto is bf16 if the machine computes in it, else fp32.

    Raises ValueError for fp16 without an accelerator.
    """
    if setting == "fp16" and not torch.accelerator.is_available():
        raise ValueError("train.precision=fp16 needs an accelerator, and there is none; choose bf16, fp32 or auto")
    if setting == "auto":
        return "bf16" if _has_bf16() else "fp32"
    return setting


def autocast(device: torch.device) -> torch.autocast:
    """Computes in the precision that a training with `train.precision=auto` would take."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of("auto") == "bf16")


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.accelerator.is_available() and torch.cpu._is_avx512_bf16_supported()
