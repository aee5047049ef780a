"""Measurements of a trained model on data, and the format of their rows.

Each is a function from (model, data) to rows (name, value, unit, n, protocol). Modules are imported when `MEASURES` is first
read, so that tables (`report`) can be written without torch.
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
