"""The accelerator of a run: device, precision and the averaging of gradients between processes, all set by the config.

accelerate reads arguments that it is not given from the environment, where a launcher or another project may have set them.
So its variables are removed from the environment while accelerate is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sape2.config.extras import from_extra
from sape2.machine import find_device, precision_of
from sape2.training.processes import ALONE, Processes, refuse_launcher

PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")  # of what accelerate reads
LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of what starts several
DECIDING = (
    "GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "USE_CPU", "TORCH_DEVICE", "DYNAMO_BACKEND", "FP8_BACKEND",
    "USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG",
)  # fmt: skip
NEUTRAL = ("", "0", "no", "none", "false")
STEPS_OF_ONE = ("GRADIENT_ACCUMULATION_STEPS", "1")


def make_accelerator(precision: str, processes: Processes = ALONE, command: str = "this training") -> Any:
    accelerate = from_extra("train", "accelerate", "training needs accelerate")
    if processes.size == 1:
        refuse_launcher(command)
    # One precision is held for the whole process, which may train several runs.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    mixed, on_cpu = precision_of(precision).replace("fp32", "no"), find_device().type == "cpu"
    with config_alone(hide=LAUNCHED if processes.size == 1 else ()):
        accelerator = accelerate.Accelerator(mixed_precision=mixed, cpu=on_cpu)
    if accelerator.num_processes != processes.size:
        raise ValueError(f"training in several processes does not work on {accelerator.device}; start it without torchrun")
    return accelerator


def prepare(accelerator: Any, *objects: Any) -> Any:
    """`accelerator.prepare`, which looks into the environment again."""
    with config_alone():
        return accelerator.prepare(*objects)


@contextmanager
def config_alone(hide: tuple[str, ...] = ()) -> Iterator[None]:
    """Hides the environment variables that accelerate reads, and those in `hide`."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) or name in hide}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def passed_over() -> list[str]:
    """A line for each variable by which other programs of accelerate are decided, and this one is not."""
    values = {name: os.environ.get(f"ACCELERATE_{name}", "") for name in DECIDING}
    set_to = {name: value for name, value in values.items() if value.lower() not in NEUTRAL and (name, value) != STEPS_OF_ONE}
    return [f"ACCELERATE_{name}={value} has no effect: a run is decided by its config alone" for name, value in set_to.items()]
