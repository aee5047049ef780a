"""The measures by name. To add one: a file with such a function, a line here, and a page in docs/evaluation."""

from __future__ import annotations

from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import Measure
from sape2.evaluation.cost.measure import LIMIT as COST_LIMIT
from sape2.evaluation.cost.measure import cost
from sape2.evaluation.grouping import LIMIT as GROUPING_LIMIT
from sape2.evaluation.grouping import grouping
from sape2.evaluation.health import LIMIT as HEALTH_LIMIT
from sape2.evaluation.health import health
from sape2.evaluation.resolution import LIMIT as RESOLUTION_LIMIT
from sape2.evaluation.resolution import resolution
from sape2.evaluation.shift import LIMIT as SHIFT_LIMIT
from sape2.evaluation.shift import shift

MEASURES: dict[str, Measure] = {
    "accuracy": accuracy,
    "shift": shift,
    "resolution": resolution,
    "grouping": grouping,
    "health": health,
    "cost": cost,
}
LIMITS: dict[str, int | None] = {  # images that a measure takes unless told otherwise; None: all
    "accuracy": None,
    "shift": SHIFT_LIMIT,
    "resolution": RESOLUTION_LIMIT,
    "grouping": GROUPING_LIMIT,
    "health": HEALTH_LIMIT,
    "cost": COST_LIMIT,
}


def images_taken(measure: str, limit: int | None, there: int) -> int:
    """Number of images that a measure takes, out of `there`, under a limit (None: the measure's own)."""
    wanted = LIMITS.get(measure) if limit is None else limit
    if measure == "cost":
        wanted = min(wanted or COST_LIMIT, COST_LIMIT)
    return there if wanted is None else min(wanted, there)
