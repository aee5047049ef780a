"""Available memory, and errors of one line when memory runs out: what did not fit, and which settings reduce it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sape2.config import ModelConfig, RunConfig

MESSAGES = re.compile(r"out of memory|can't allocate memory|not enough memory|unable to allocate", re.IGNORECASE)

MEMORY_INFO = Path("/proc/meminfo")
GROUP_LIMIT, GROUP_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class OutOfMemory(ValueError):
    """A computation did not fit in memory; the message says what the user can change."""


@contextmanager
def told_in_one_line(what: Callable[[], str]) -> Iterator[None]:
    """Turns out-of-memory errors of PyTorch and NumPy into OutOfMemory with the message `what()`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(what()) from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError is an accelerator's; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(MESSAGES.search(str(error)))


ON_CPU = 'the CPU (CUDA_VISIBLE_DEVICES="")'
RESUMABLE = "the last checkpoint is kept. Try, with another --out,"


def memory_message(what: str, model: ModelConfig, ways: Iterable[str], then: str = "try") -> str:
    """The one line: what did not fit and of how many tokens, what is kept, and the ways out, those of attention last."""
    height, width = model.grid
    tokens = height * width + model.num_registers + (model.pool == "class")
    return f"out of memory {what}, {tokens} tokens each; {then} {', '.join([*ways, _of_attention(model)])}"


def training_message(config: RunConfig, size: int) -> str:
    """Message for out-of-memory errors in training: batch and tokens of each of `size` processes, and how to reduce them."""
    train, model = config.train, config.model
    share = train.batch_size // size
    part = share // train.accumulation
    more = next((n for n in range(train.accumulation + 1, share + 1) if share % n == 0), None)  # those TrainStream takes
    where = f" in each of {size} processes" if size > 1 else ""
    ways = [f"--set train.accumulation={more} (the same batch in {more} parts)"] if more else []
    if train.batch_size > 1:
        ways.append(f"a smaller --set train.batch_size (now {train.batch_size})")
    if not model.gradient_checkpointing:
        ways.append("--set model.gradient_checkpointing=true")
    return memory_message(f"in training with {part} images at a time{where}", model, ways, RESUMABLE)


def _of_attention(model: ModelConfig) -> str:
    """The lean path, attention in blocks, is chosen by itself (`attention.choose_path`), but not with dropout."""
    if model.attention_dropout:
        return "--set model.attention_dropout=0, without which attention cannot take its lean path (in blocks)"
    if "sape2" in model.encoding and "readout" not in model.encoding:
        return "an encoding without a map of all pairs (sape2:readout=direct; the lean path, attention in blocks, is automatic)"
    return "a coarser grid (the lean path, attention in blocks, is automatic)"


# --- how much there is ------------------------------------------------------------------------------------------------


def available_bytes() -> int:
    """Bytes of the machine's memory that can still be allocated, by the system and by the container's limit."""
    limits = [_system_available()]
    if GROUP_LIMIT.exists() and GROUP_USE.exists() and (limit := GROUP_LIMIT.read_text().strip()) != "max":
        limits.append(max(0, int(limit) - int(GROUP_USE.read_text())))
    return min(limits)


def _system_available() -> int:
    """Available memory including reclaimable caches if the system reports it; else the free pages."""
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
