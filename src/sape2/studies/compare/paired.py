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
    error = std / math.sqrt(n)
    half = student_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    return Paired(n, mean, std, mean - half, mean + half, student_p(mean / error, n - 1))


def student_p(t: float, degrees: int) -> float:
    """Two-sided tail 1 - A(t | ν) of Student's t for whole degrees of freedom ν; Abramowitz and Stegun 26.7.3, 26.7.4.

    With θ = arctan(t/√ν): A = 2/π (θ + sin θ (cos θ + 2/3 cos³ θ + …)) for odd ν, sin θ (1 + 1/2 cos² θ + …) for even ν.
    """
    theta = math.atan2(abs(t), math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(theta), 0.0) if odd else (1.0, 0.0)
    for index in range(degrees // 2):  # 1 or cos, then cos² times (k-1)/k more
        total += term
        step = 2 * index + (2 if odd else 1)
        term *= step / (step + 1) * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which `probability` (0.5 to 1) of Student's distribution lies, by bisection."""
    low, high = 0.0, 1.0
    while 1 - student_p(high, degrees) / 2 < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - student_p(middle, degrees) / 2 < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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
