"""What the parts of `gpu.py` share: cases, their sizes, the kernel where it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import Row


class NotAvailable(Exception):
    """What a case needs is not here."""


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Size:
    """How large the cases are."""

    attention: dict[int, int]  # side of the grid: images
    head_dims: tuple[int, ...]
    models: dict[str, int]  # name: images
    pixels: int  # of a side
    rounds: int
    images: int  # in the set of the input path
    batches: int
    epochs: int  # of a run of the table


FULL = Size(
    attention={8: 512, 14: 256, 16: 128, 24: 64, 32: 32, 48: 16, 64: 8},
    head_dims=(32, 64, 80, 128),
    models={"vit_small": 256, "vit_base": 128},
    pixels=224,
    rounds=20,
    images=50_000,
    batches=200,
    epochs=10,
)
TINY = Size(
    attention={2: 2, 3: 1},
    head_dims=(32,),
    models={"vit_nano": 2},
    pixels=32,
    rounds=1,
    images=256,
    batches=2,
    epochs=1,
)


def distance_attention() -> Callable[..., Any]:
    """The fused kernel; raises NotAvailable where it is not there."""
    try:
        from sape2.attention.kernels import distance_attention
    except ImportError as error:
        raise NotAvailable(error) from error
    if not torch.cuda.is_available():
        raise NotAvailable("the kernel needs a CUDA device")
    return distance_attention


def autocast(device: torch.device) -> torch.autocast:
    """bf16, as in training on a GPU."""
    return torch.autocast(device.type, torch.bfloat16)
