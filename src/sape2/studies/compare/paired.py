"""Paired comparison of encodings under the same seeds: difference, interval and test, and corrections for many tests.

Imports nothing else of this package.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def measured(values: Mapping[Any, float | None]) -> dict[Any, float]:
    """The values that are numbers: what is None, NaN or infinite was not measured."""
    return {seed: float(value) for seed, value in values.items() if value is not None and math.isfinite(value)}


def paired_difference(values: Mapping[Any, float | None], baseline: Mapping[Any, float | None]) -> Paired | None:
    """`values` minus `baseline`, by seed; None if no seed is in both. What is not finite counts as not there.

    With d the differences, m their mean, s their standard deviation: m ± t(0.975, n - 1) s/√n, and the two-sided p of
    m √n/s under Student's t with n - 1 degrees of freedom.
    """
    values, baseline = measured(values), measured(baseline)
    both = [(value, baseline[seed]) for seed, value in values.items() if seed in baseline]
    differences = [value - base for value, base in both]
    if not differences:
        return None
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return Paired(n, mean)
    std = statistics.stdev(differences)
    if std <= 1e-12 * max(abs(number) for pair in both for number in pair):
        return Paired(n, mean, std)  # equal differences: each is rounded by as much as its two values are
    from scipy.special import stdtr, stdtrit  # a second of import; scipy.stats takes two

    error = std / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Paired(n, mean, std, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean / error))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p: the k-th smallest of m times m - k + 1, made non-decreasing, at most 1.

    None and NaN give None, and do not count.

    An encoding whose adjusted p is below α differs from the baseline with a chance of at most α that any such claim is wrong.
    """
    order = sorted((p, index) for index, p in measured(dict(enumerate(p_values))).items())
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted
