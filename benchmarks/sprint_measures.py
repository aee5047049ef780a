"""Shift, resolution, grouping and health of the models of the sprint, as tables over seeds.

Command:  python benchmarks/sprint_measures.py STAGE [STAGE ...] --data DIR --out DIR   measures the runs of these stages
          whose folders are in DIR (as `benchmarks/sprint.py run` left them) and that are not measured yet; rows go to
          benchmarks/results/sprint_measures.jsonl as they come;
          python benchmarks/sprint_measures.py                                          prints the tables.

What has a value for each layer is its mean over the layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from cifar10_measures import SCALED, Number
from glance_measures import COLUMNS, means_of_columns, seed_tables
from sprint import ROWS as RUNS
from sprint import STAGES, Trial, keep, run_of
from timing import RESULTS, Row, conditions

from sape2.data import load_data
from sape2.evaluation.runs import measure
from sape2.runs.rows import read_rows

ROWS = RESULTS / "sprint_measures.jsonl"
MEASURES = ["shift", "resolution", "grouping", "health"]
SIZES = ("16x16", "24x24", "32x32", "48x48", "64x64")


def accuracy_at(size: str) -> list[Number]:
    return [Number(size, "resolution", "accuracy_at_size", SCALED | {"size": size})]


SIZE_COLUMNS = {size: accuracy_at(size) for size in SIZES}


def left(stages: list[str], out: Path) -> Iterator[Trial]:
    """The kept runs of these stages that have a folder and no rows here."""
    runs, done = read_rows(RUNS), {row["digest"] for row in read_rows(ROWS)}
    kept = {row["digest"] for row in runs} - done
    for stage in stages:
        yield from (trial for trial in STAGES[stage](runs) if trial.digest in kept and (out / trial.digest).is_dir())


def measured(trial: Trial, data: Path | None, out: Path) -> Iterator[Row]:
    """A row for each column that has a value for this model."""
    run = run_of(trial, data, out / trial.digest)
    found = measure(run, load_data(run.config.data, run.config.model), MEASURES, "test", ["last"])
    about, model = conditions(), run.config.model
    mark = {"digest": trial.digest, "encoding": model.encoding, "seed": trial.seed, "epochs": run.config.train.epochs}
    for row in means_of_columns(found, COLUMNS | SIZE_COLUMNS):
        yield mark | row | {"commit": about["commit"], "date": about["date"], "processor": about["hardware"]}


def tables(rows: list[Row]) -> str:
    return f"{seed_tables(rows, COLUMNS)}\naccuracy at other sizes, scaled\n\n{seed_tables(rows, SIZE_COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", choices=list(STAGES), metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sprint")
    given = parser.parse_args()
    if given.stages and not given.data:
        parser.error("measuring needs --data DIR")
    for trial in left(given.stages, given.out):
        for row in measured(trial, given.data, given.out):
            keep(row, ROWS)
    if not given.stages:
        print(tables(read_rows(ROWS)))


if __name__ == "__main__":
    main()
