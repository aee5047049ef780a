"""The tables of the docs come from the rows that are kept, digit by digit."""

import re
from pathlib import Path

import pytest
import tables

from sape2.checkpoint import read_rows

PAGE = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
KEPT = [name for name in tables.TABLES if (tables.RESULTS / f"{name}.jsonl").exists()]


def table_lines(text: str) -> list[list[str]]:
    """The cells of every line of a table, headings and rules apart."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if re.search(r"\d", " ".join(cells[1:]))]


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_row_makes_a_table(name):
    rows = read_rows(tables.RESULTS / f"{name}.jsonl")
    assert len(table_lines(tables.TABLES[name](rows))) >= 2


@pytest.mark.parametrize("name", ["digits_encodings", "digits_ladder", "cifar10_budget", "cifar10_short", "cifar10_measures"])
def test_the_page_shows_what_the_rows_say(name):
    rows = read_rows(tables.RESULTS / f"{name}.jsonl")
    shown = table_lines(PAGE)
    assert [line for line in table_lines(tables.TABLES[name](rows)) if line not in shown] == []


def test_a_changed_number_would_be_noticed():
    rows = read_rows(tables.RESULTS / "digits_encodings.jsonl")
    changed = [row | {"value": row["value"] + 0.01} if row["encoding"] == "sape2" else row for row in rows]
    shown = table_lines(PAGE)
    assert any(line not in shown for line in table_lines(tables.TABLES["digits_encodings"](changed)))


def test_an_unknown_table_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tables.py", "nothing"])
    with pytest.raises(SystemExit, match="no table 'nothing'; known: digits_encodings"):
        tables.main()
