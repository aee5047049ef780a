"""The tables of the docs come from the rows that are kept, digit by digit."""

import re
from pathlib import Path

import pytest
import tables

from sape2.checkpoint import read_rows

DOCS = Path(__file__).parent.parent / "docs"
KEPT = [name for name in tables.TABLES if (tables.RESULTS / f"{name}.jsonl").exists()]


def table_lines(text: str) -> list[list[str]]:
    """The cells of every line of a table, headings and rules apart."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if re.search(r"\d", " ".join(cells[1:]))]


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_row_makes_a_table(name):
    rows = read_rows(tables.RESULTS / f"{name}.jsonl")
    assert len(table_lines(tables.TABLES[name](rows))) >= 2


def lines_of(page: str) -> list[list[str]]:
    return table_lines((DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("digits_encodings", "results.md"),
        ("digits_ladder", "results.md"),
        ("digits_equations", "results.md"),
        ("digits_layerscale", "results.md"),
        ("probes", "probes.md"),
        ("cifar10_budget", "results.md"),
        ("cifar10_glance", "results.md"),
        ("cifar10_glance_layerscale", "results.md"),
        ("cifar10_short", "results.md"),
        ("cifar10_measures", "results.md"),
        ("detection_digits", "detection.md"),
    ],
)
def test_the_page_shows_what_the_rows_say(name, page):
    rows, shown = read_rows(tables.RESULTS / f"{name}.jsonl"), lines_of(page)
    assert [line for line in table_lines(tables.TABLES[name](rows)) if line not in shown] == []


def test_a_changed_number_would_be_noticed():
    rows = read_rows(tables.RESULTS / "digits_encodings.jsonl")
    changed = [row for row in rows if (row["encoding"], row["seed"]) != ("sape2", 2)]
    shown = lines_of("results.md")
    assert any(line not in shown for line in table_lines(tables.TABLES["digits_encodings"](changed)))


def test_an_unknown_table_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tables.py", "nothing"])
    with pytest.raises(SystemExit, match="no table 'nothing'; known: digits_encodings"):
        tables.main()
