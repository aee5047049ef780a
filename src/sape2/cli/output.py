"""Output that several commands share: tables, JSON rows, figures and messages on standard error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.progress import say
from sape2.tables import Row, print_json, print_table

if TYPE_CHECKING:
    from sape2.config import RunConfig
    from sape2.runs.run import Run
    from sape2.studies.compare.outcome import Outcome
    from sape2.studies.compare.report import Comparison

CONDITIONS = {"measure", "name", "value", "unit", "n", "protocol", "ci_low", "ci_high", "split", "weights", "encoding", "model",
              "data", "recipe", "epochs", "seed", "changed", "limit", "other_data", "precision", "torch",
              "hardware"}  # fmt: skip
MANY = 40  # rows of one measure that are not printed unless asked for
COLUMNS = {"last": "last epoch", "best": "best on validation"}  # heading of a column of results


def drawn(*draws: Callable[[], Path | Iterable[Path]]) -> list[Path]:
    """Draws figures independently of each other and returns their files; prints a line for each failure or missing matplotlib.

    Figures come last, so a failed figure does not make the command fail; it is drawn again when the command is repeated.
    """
    files: list[Path] = []
    for draw in draws:
        try:
            found = draw()
            files += [found] if isinstance(found, Path) else found
        except ImportError as error:
            say(f"no figures: {error}")
            break
        except Exception as error:
            if os.environ.get("SAPE2_DEBUG"):
                raise
            reason = " ".join(str(error).split())[:200]
            say(f"a figure is missing: {type(error).__name__}: {reason}; the results are whole, and the same command draws it")
    return files


def show_results(rows: list[Row], run: Run[RunConfig], as_json: bool, figures: list[Path], everything: bool = False) -> int:
    """Tables, or JSON; of a measure of many rows its headline numbers and warnings, unless `everything` is asked for."""
    if as_json:
        print_json(rows)
        return 0
    for measure in dict.fromkeys(row["measure"] for row in rows):
        some = [row for row in rows if row["measure"] == measure]
        if everything or len(some) <= MANY or not _print_headlines(measure, some, run):
            _print_measure(some)
    print(f"in {run.folder}: {', '.join(['results.jsonl', 'metrics.jsonl', *(f'figures/{path.name}' for path in figures)])}")
    return 0


def _print_headlines(measure: str, rows: list[Row], run: Run[RunConfig]) -> bool:
    """Prints the numbers that `sape2 report` compares and the warnings in words; False if the measure has none."""
    from sape2.studies.compare.groups import Group
    from sape2.studies.compare.headlines import MeasuredRun
    from sape2.studies.compare.report import Comparison

    group = Group(run.folder.name, run.folder.name, [MeasuredRun(run, rows, [])])
    compared = Comparison([group], [measure], rows[0]["split"], rows[0]["weights"])
    (line,) = compared.table()
    table = [
        {"name": column.heading, "value": line[column.heading], "unit": column.unit, "meaning": column.meaning}
        for column in compared.columns()
    ]
    if not table:
        return False
    print_table(table, list(table[0]), f"{measure}, {_title(rows[0])}")
    for row in rows:
        if "message" in row:
            print(f"warning: {row['message']}")
    print(f"{len(rows)} rows of {measure} in results.jsonl; with --all they are printed\n")
    return True


def _title(row: Row) -> str:
    changed = f", {row['changed']}" if row.get("changed") else ""
    limit = "" if row.get("limit") is None else f"; {row['limit']:,} images drawn by class"
    return f"{row['data']}, {row['model']}, {row['encoding']}, {row['epochs']} epochs, seed {row['seed']}{changed}{limit}"


def _print_measure(rows: list[Row]) -> None:
    """One line a number with what it was measured at, one column for the weights it was measured with."""
    details = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in CONDITIONS]
    table: dict[tuple, Row] = {}
    for row in rows:
        line = {key: row.get(key, "") for key in ("name", *details, "split")}
        line_of = table.setdefault(tuple(line.values()), line | {"n": row["n"], "unit": row["unit"]})
        line_of[COLUMNS[row["weights"]]] = row["value"]
    used = [heading for weights, heading in COLUMNS.items() if any(row["weights"] == weights for row in rows)]
    print_table(table.values(), ["name", *details, *used, "unit", "n", "split"], _title(rows[0]))


def show_comparison(found: Outcome | Comparison, folder: Path, as_json: bool) -> None:
    """Tables and figures of many runs, into the folder and for the reader."""
    files = found.write(folder)
    files += drawn(lambda: found.draw(folder))
    if as_json:
        print_json(found.rows())
        return
    for title, lines, columns in found.tables():
        print_table(lines, columns, title)
    for note in found.notes():
        print(note)
    for row in found.rows():
        if row["name"] == "failed":
            print(f"failed: {row['encoding']} seed {row['seed']}: {row['reason']}")
    print(f"in {folder}: {', '.join(path.name for path in files)}")
