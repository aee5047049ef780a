"""What a model costs: parameters, multiply-accumulates, time of a training step."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, channels: int, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image's forward pass in matrix products, attention included.

    Counted on the meta device, where no attention kernel hides its products from the counter. Element-wise work
    (gates, sums, distances, softmax, norms) is not in it.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shadow(torch.empty(1, channels, *image_size, device="meta"))
    return counter.get_total_flops() // 2


def median_seconds(step: Callable[[], object], warmup: int = 2, repeats: int = 5) -> float:
    """Median wall time of `step`, synchronised with an accelerator if there is one."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        step()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])
