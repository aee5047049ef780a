"""docs/no_silent_wrong_answers.md: every row names tests, and every test that is named exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "no_silent_wrong_answers.md"


def faults(text: str) -> list[str]:
    """Rows without a test, and tests that are not there."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what was found,")]
    found = [f"no test: {row}" for row in rows if "::" not in row]
    named = sorted(set(re.findall(r"`([\w/.]+\.py)::(\w+)`", text)))
    found += [f"{file}::{name}" for file, name in named if name not in functions(ROOT / file)]
    return found if named else ["no test is named"]


@cache
def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    assert faults(PAGE.read_text(encoding="utf-8")) == []
    assert faults("| a kind |\n") == ["no test is named"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| a kind | `tests/data/test_labels.py::test_no_such_thing` |", "tests/data/test_labels.py::test_no_such_thing"),
        ("| a kind | `tests/data/test_nowhere.py::test_it` |", "tests/data/test_nowhere.py::test_it"),
        ("| a kind | somewhere |", "no test: | a kind | somewhere |"),
    ],
)
def test_a_row_without_a_test_that_exists_is_found(row, fault):
    assert faults(PAGE.read_text(encoding="utf-8") + row + "\n") == [fault]
