"""Measurements by name: each is a function from (model, data) to rows (name, value, unit, n, protocol)."""

from __future__ import annotations

from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import Measure
from sape2.evaluation.grouping import grouping
from sape2.evaluation.health import health

MEASURES: dict[str, Measure] = {
    "accuracy": accuracy,
    "grouping": grouping,
    "health": health,
}
