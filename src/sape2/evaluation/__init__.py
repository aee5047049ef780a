"""Measurements of a model on data: each is a function from (model, data) to rows (name, value, unit, n, protocol).

What trains a model, or sets several beside each other, is in `training` and `studies`. Imports nothing until `MEASURES` is
asked for, so that tables (`report`) can be written without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sape2.evaluation.measures import MEASURES

__all__ = ["MEASURES"]


def __getattr__(name: str) -> Any:
    if name == "MEASURES":
        from sape2.evaluation.measures import MEASURES

        return MEASURES
    raise AttributeError(f"module 'sape2.evaluation' has no attribute {name!r}")
