"""The tables of the docs come from the rows that are kept, digit by digit."""

import re
import sys
from pathlib import Path

import glance_measures
import kept
import pytest
import tables

from sape2.config.recipes import get_recipe
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.studies.compare.outcome import outcome

DOCS = Path(__file__).parents[2] / "docs"
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
        ("cifar10_glance_measures", "results.md"),
        ("detection_digits", "detection.md"),
        ("kernel_resources", "gpu.md"),
    ],
)
def test_the_page_shows_what_the_rows_say(name, page):
    rows, shown = read_rows(tables.RESULTS / f"{name}.jsonl"), lines_of(page)
    assert [line for line in table_lines(tables.TABLES[name](rows)) if line not in shown] == []


PAGES = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if kept.MARKED.search(text)])
def test_a_page_shows_its_marked_tables_as_they_would_be_made_again(page):
    assert tables.written(PAGES[page]) == PAGES[page]


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if kept.MARKED.search(text)])
def test_between_marks_stands_a_table_and_not_the_reason_why_there_is_none(page):
    parts = PAGES[page].split("<!-- table: ")[1:]
    assert parts
    assert [part.splitlines()[0] for part in parts if "\n| " not in part.split("<!-- end -->")[0]] == []


def test_a_marked_table_is_made_from_the_rows_and_all_else_is_left():
    page = "before\n<!-- table: sprint, one_rate -->\nold\n<!-- end -->\nafter\n"
    made = tables.written(page)
    assert made.startswith("before\n<!-- table: sprint, one_rate -->\n\n| encoding | accuracy |")
    assert made.endswith("|\n\n<!-- end -->\nafter\n")
    assert "old" not in made


def test_a_changed_number_would_be_noticed():
    rows = read_rows(tables.RESULTS / "digits_encodings.jsonl")
    changed = [row for row in rows if (row["encoding"], row["seed"]) != ("sape2", 2)]
    shown = lines_of("results.md")
    assert any(line not in shown for line in table_lines(tables.TABLES["digits_encodings"](changed)))


def test_an_unknown_table_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "nothing"])
    with pytest.raises(SystemExit, match=r"'nothing'.* digits_encodings"):
        tables.main()


def test_a_measure_of_layers_is_their_mean_on_the_test_set_with_the_last_weights(tmp_path):
    Run(tmp_path, get_recipe("cifar10_glance")).start()
    row = {"measure": "health", "name": "bias_to_content", "n": 9, "torch": "2", "split": "test", "weights": "last"}
    rows = [row | {"layer": layer, "value": float(layer)} for layer in (1, 2, 3, 4)]
    write_rows(tmp_path / "results.jsonl", [row | {"layer": 1, "value": 100.0, "weights": "best"}, *rows])
    (kept,) = glance_measures.collect([tmp_path])
    assert (kept["name"], kept["value"], kept["n"], kept["seed"]) == ("bias to content", 2.5, 9, 0)


def test_differences_of_a_measure_are_paired_by_seed():
    rows = [
        {"encoding": encoding, "seed": seed, "name": "lift", "value": value}
        for encoding, values in (("ape", (1.0, 2.0)), ("sape2", (1.5, 2.7)))
        for seed, value in enumerate(values)
    ]
    _, differences = glance_measures.tables(rows + _biases(1)).split("minus ape\n", 1)
    (line,) = [cells for cells in table_lines(differences.split("strength")[0]) if cells[0] == "sape2"]
    assert line[1] == "+0.600 (-0.671 to +1.871)"  # 0.6 -+ 12.706 * 0.1


def _biases(sign):
    """For every form of SaPE2 with a bias, a strength that goes up (1) or down (-1) with what the form gains."""
    gains = outcome(read_rows(tables.RESULTS / "cifar10_glance.jsonl"), "ape").paired("accuracy", "last")
    return [
        {"encoding": name, "seed": 0, "name": glance_measures.STRENGTH, "value": sign * paired.difference}
        for name, paired in gains.items()
        if paired and "sape2" in name
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_rank_correlation_of_strength_and_gain_has_the_sign_of_what_was_put_in(sign):
    text = glance_measures.strength_table(_biases(sign), read_rows(tables.RESULTS / "cifar10_glance.jsonl"))
    assert f"Rank correlation (Spearman): {sign:.2f}" in text
    assert len(table_lines(text)) == 16
