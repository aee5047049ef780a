"""Paired comparison of encodings under the same seeds: difference, interval and test, and corrections for many tests.

Imports nothing else of this package.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The differences over the `n` seeds that both have: mean, sample standard deviation, Student's interval and p.

    What these differences cannot tell is None: everything but the mean for one pair, interval and p where all
    differences are the same number.
    """

    n: int
    difference: float
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """`values` minus `baseline`, by seed; None if no seed is in both.

    With d the differences, m their mean, s their standard deviation: m ± t(0.975, n - 1) s/√n, and the two-sided p of
    m √n/s under Student's t with n - 1 degrees of freedom.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not differences:
        return None
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return Paired(n, mean)
    std = statistics.stdev(differences)
    if std <= 1e-12 * max(map(abs, differences)):  # rounding of equal differences
        return Paired(n, mean, std)
    from scipy.special import stdtr, stdtrit  # a second of import; scipy.stats takes two

    error = std / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Paired(n, mean, std, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean / error))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p: the k-th smallest of m times m - k + 1, made non-decreasing, at most 1. None stays and counts not.

    An encoding whose adjusted p is below α differs from the baseline with a chance of at most α that any such claim is wrong.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted
