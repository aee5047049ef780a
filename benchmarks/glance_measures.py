"""Shift, grouping and health of the runs of `sape2 compare cifar10_glance`, over seeds; and whether a strong bias costs.

Command:  python benchmarks/glance_measures.py RUN [RUN ...]   keeps what `sape2 evaluate` left in them in
          benchmarks/results/cifar10_glance_measures.jsonl, and prints the tables;
          python benchmarks/glance_measures.py                 prints them from the rows that are kept.

What has a value for each layer is its mean over the layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from cifar10_measures import AUROC, BIAS_TO_CONTENT, FEATURES, LIE_DERIVATIVE, LIFT, WHOLE_PATCHES, WITHIN_A_PATCH, Number
from kept import keep_and_print, last_test_rows, ranked_table, six_digits
from timing import RESULTS, Row

from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.compare.outcome import outcome
from sape2.studies.compare.summary import Summary, difference, grouped, summarize
from sape2.tables import markdown_table

ROWS = RESULTS / "cifar10_glance_measures.jsonl"
BASELINE = "ape"
STRENGTH = "bias to content"
Columns = dict[str, list[Number]]  # heading -> what its value is the mean of
COLUMNS: Columns = {
    "consistency, within a patch": [WITHIN_A_PATCH],
    "whole patches": [WHOLE_PATCHES],
    "Lie derivative": [LIE_DERIVATIVE],
    "features": [FEATURES],
    "AUROC": AUROC,
    "lift": LIFT,
    STRENGTH: BIAS_TO_CONTENT,
}


def collect(folders: list[Path]) -> list[Row]:
    """A row for each run and column: what was measured on the test set with the last weights, to six digits."""
    kept = []
    for folder in folders:
        config = Run.open(folder).config
        found = last_test_rows(folder)
        about = {"encoding": config.model.encoding, "seed": config.seed, "recipe": config.recipe}
        kept += [about | row for row in means_of_columns(found, COLUMNS)]
    return kept


def means_of_columns(found: list[Row], columns: Columns) -> Iterator[Row]:
    """One row for each column that has values: their mean."""
    for name, numbers in columns.items():
        rows = [row for number in numbers if (row := number.row(found))]
        if rows:
            value = six_digits(statistics.mean(row["value"] for row in rows))
            yield {"name": name, "value": value, "n": rows[0]["n"], "torch": rows[0]["torch"]}


def tables(rows: list[Row]) -> str:
    """Means and spread over seeds; differences to the baseline in pairs of a seed; strength of the bias and what is lost."""
    strength = strength_table(rows, read_rows(RESULTS / "cifar10_glance.jsonl"))
    return f"{seed_tables(rows, COLUMNS)}\nstrength of the bias\n\n{strength}"


def seed_tables(rows: list[Row], columns: Columns) -> str:
    """Mean and spread of each column over seeds; differences to the baseline in pairs of a seed."""
    found = _summaries(rows, columns)
    names = list(dict.fromkeys(name for column, some in found.items() if column != STRENGTH for name in some))
    means = [{"encoding": name} | {column: _mean(found[column].get(name), column) for column in columns} for name in names]
    others = [name for name in names if name != BASELINE]
    differences = [
        {"encoding": name} | {column: _difference(found[column].get(name), column) for column in columns} for name in others
    ]
    shown = [column for column in columns if any(line[column] for line in differences)]
    return "\n".join(
        [
            "mean over seeds\n\n" + markdown_table(means, ["encoding", *columns]),
            f"minus {BASELINE}\n\n" + markdown_table(differences, ["encoding", *shown]),
        ]
    )


def strength_table(rows: list[Row], accuracies: list[Row]) -> str:
    """Forms of SaPE2 from the weakest bias to the strongest, with what they lose or gain, and the rank correlation of both."""
    found = _summaries(rows, COLUMNS)[STRENGTH]
    strength = {name: summary.mean for name, summary in found.items()}
    gains = outcome(accuracies, BASELINE).paired("accuracy", "last")
    names = sorted((name for name in strength if "sape2" in name), key=lambda name: strength[name])
    gained = f"accuracy minus {BASELINE}"
    lines = [
        {"encoding": name, STRENGTH: _mean(found[name], STRENGTH), gained: f"{gains[name].difference:+.4f}"} for name in names
    ]
    return ranked_table(lines, [strength[name] for name in names], [gains[name].difference for name in names])


def _summaries(rows: list[Row], columns: Columns) -> dict[str, dict[str, Summary]]:
    """column -> encoding -> mean and spread over seeds, in pairs with the baseline."""
    return {column: summarize(grouped(row for row in rows if row["name"] == column), BASELINE) for column in columns}


def _mean(summary: Summary | None, name: str) -> str:
    return summary.spread(_digits(name)) if summary else ""


def _difference(summary: Summary | None, name: str) -> str:
    return difference(summary.pair, _digits(name)) if summary and summary.pair else ""


def _digits(name: str) -> int:
    return 4 if name == "Lie derivative" else 3


if __name__ == "__main__":
    keep_and_print(ROWS, collect, tables)
