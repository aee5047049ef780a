"""Measurements by name: each is a function from (model, data) to rows (name, value, unit, n, protocol)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sape2.evaluation.accuracy import accuracy
from sape2.evaluation.base import LabelledImages
from sape2.evaluation.cost import cost

MEASURES: dict[str, Callable[[nn.Module, LabelledImages], list[dict[str, Any]]]] = {
    "accuracy": accuracy,
    "cost": cost,
}
