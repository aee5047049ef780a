"""Measurements by name: each is a function from (model, data) to rows (name, value, unit, n, protocol)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import Row
from sape2.evaluation.grouping import grouping
from sape2.evaluation.health import health

MEASURES: dict[str, Callable[..., Iterable[Row]]] = {
    "accuracy": accuracy,
    "grouping": grouping,
    "health": health,
}
