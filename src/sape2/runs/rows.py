"""Rows in .jsonl files, and which rows of a run's results.jsonl replace which.

A measurement is the rows of one measure on one split, set of weights and set of images. A measurement on few images never
replaces one on more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType

from sape2.runs.files import read_text, write_text
from sape2.tables import Row, json_text

NUMBER, TEXT = (int, float, NoneType), (str, NoneType)
RESULT = {"measure": str, "name": str} | dict.fromkeys(("value", "n", "limit"), NUMBER)
RESULT |= dict.fromkeys(("unit", "split", "weights"), TEXT)
EPOCH = dict.fromkeys(("epoch", "step", "seconds", "images_per_s", "processes"), NUMBER)
EPOCH |= dict.fromkeys(("precision", "device"), TEXT)


def read_rows(path: Path, form: Mapping[str, type | tuple[type, ...]] | None = None) -> list[Row]:
    """The objects of a .jsonl file; [] if there is none. Raises ValueError for a line that is neither one nor empty.

    Also for a value of another type than `form` has for its key, as other programs and editors leave it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():  # an editor ends a file so, or `cat` where it joins several
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)  # NaN and Infinity are not measured, as in `json_text`
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object: {line[:50]}")
        for key, kinds in (form or {}).items():
            if not isinstance(row.get(key), kinds):
                raise ValueError(
                    f"{path} line {number} was changed: its {key} is {row.get(key)!r:.50}; put back what was there"
                )
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def with_new(before: list[Row], new: list[Row]) -> list[Row]:
    """The rows with `new` in place of what the same measures gave on as many images or fewer."""
    reach = _reaches(new)
    return [row for row in before if _reach(row) > reach.get(_measurement(row), -1)] + new


def shown(rows: list[Row]) -> list[Row]:
    """The rows on the run's own images, not on --other-data; of each measurement those over most images."""
    own = [row for row in rows if row.get("other_data") is None]
    reach = _reaches(own)
    return [row for row in own if _reach(row) == reach[_measurement(row)]]


def _measurement(row: Row) -> tuple:
    return row.get("measure"), row.get("split"), row.get("weights"), row.get("other_data")


def _reach(row: Row) -> float:
    """Number of images that a measurement was limited to; infinite for all images."""
    limit = row.get("limit")
    return math.inf if limit is None else limit


def _reaches(rows: list[Row]) -> dict[tuple, float]:
    """The widest reach of each measurement."""
    found: dict[tuple, float] = {}
    for row in rows:
        found[_measurement(row)] = max(_reach(row), found.get(_measurement(row), -1))
    return found
