"""The measures by name. To add one: a file with such a function, a line here and in `LIMITS`, and a page in docs/evaluation."""

from __future__ import annotations

from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import Measure
from sape2.evaluation.cost.measure import cost
from sape2.evaluation.grouping import grouping
from sape2.evaluation.health import health
from sape2.evaluation.resolution import resolution
from sape2.evaluation.shift import shift

MEASURES: dict[str, Measure] = {
    "accuracy": accuracy,
    "shift": shift,
    "resolution": resolution,
    "grouping": grouping,
    "health": health,
    "cost": cost,
}
