"""Prints and writes rows (flat JSON objects) for people and programs. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from sape2.config.names import cell
from sape2.progress import one_line

Row = dict[str, Any]
Table = tuple[str, list[Row], list[str]]  # title, lines, columns


def format_value(value: Any) -> str:
    """Formats numbers with a sensible number of digits, everything else as text."""
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def format_spread(mean: float, std: float | None, digits: int) -> str:
    """ "0.8121 ± 0.0031"; the mean alone where there is no standard deviation.

    Values that are all the same tell no spread: "0.8121 (all alike)". A small one is "± <0.0001".
    """
    text = f"{mean:.{digits}f}"
    if std is None:
        return text
    if std <= 1e-12 * abs(mean):  # rounding of equal values
        return f"{text} (all alike)"
    return f"{text} ± {std:.{digits}f}" if std >= 0.5 * 10**-digits else f"{text} ± <{10**-digits:.{digits}f}"


def print_table(rows: Iterable[Row], columns: list[str], title: str, file: Any = None) -> None:
    """A table of the given columns; numbers stand to the right."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=one_line(title), title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(one_line(format_value(row[column])) if column in row else "" for column in columns))
    console = Console(file=file, markup=False, emoji=False)  # names of files and classes are shown as they are
    if not console.is_terminal:
        console.width = max(console.width, 120)
    with console.capture() as text:  # rich would end the process when the reader of a pipe has gone
        console.print(table)
    print(text.get(), end="", file=file)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of a row or of rows. A number that is not finite, which JSON does not have, is null: not measured."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(rows: Iterable[Row]) -> None:
    """One object a line on standard output."""
    for row in rows:
        print(json_text(row))


def markdown_table(rows: Iterable[Row], columns: list[str]) -> str:
    """The table of `print_table` in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(format_value(row[c])) if c in row else "" for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


FORMULA = re.compile(r"[=+\-@\t\n\uFF1D\uFF0B\uFF0D\uFF20]")


def text_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula (=1+2, @name, -x, a tab) with an apostrophe before it; else as it is.

    Numbers are no text, and stay. A carriage return, at which readers would begin a new line, is written as \\r.
    """
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\\r")
    return f"'{value}" if FORMULA.match(value.lstrip(" ")) else value


def csv_table(rows: Iterable[Row]) -> str:
    """Comma-separated, all digits; the columns are those of the rows in the order they come, None is an empty cell.

    Names stay text in a spreadsheet (`text_cell`).
    """
    rows = [{text_cell(key): text_cell(value) for key, value in row.items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
