"""Times the steps of a comparison in turn, as wall time with spread."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from sape2.machine import synchronize


def alternate(
    steps: dict[str, Callable[[], object]], repeats: int, warmup: int = 2, on_round: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step in each of `repeats` rounds. A round runs every step once, so what slows the machine for a
    while meets all of them; `warmup` rounds before are not kept. Synchronised with an accelerator if there is one.
    `on_round` is called after every round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warmup + repeats):
        for name, step in steps.items():
            seconds = time_once(step)
            if round_ >= warmup:
                times[name].append(seconds)
        on_round()
    return times


def time_once(step: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile, linear between order statistics; of one value, that value twice."""
    low, high = np.percentile(values, (10, 90)).tolist()
    return low, high
