"""Libraries that come with an extra of the package: imported where they are used, and named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any


def from_extra(extra: str, module: str, need: str) -> Any:
    """The module. Raises ImportError in one line: `need`, such as "the digits need scikit-learn", and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{need}: pip install 'sape2[{extra}]'") from error
