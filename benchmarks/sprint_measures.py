"""Shift, grouping and health of the models of the sprint, and their accuracy at half to four times the training size.

Command:  python benchmarks/sprint_measures.py STAGE [STAGE ...] --data DIR --out DIR [--only sizes] [--train]
                 [--seeds N ...] [--encodings NAME ...]
          python benchmarks/sprint_measures.py          prints the tables

The first measures the runs of these stages whose folders are in DIR (as `benchmarks/sprint.py run` left them) and that are
not measured yet. With --train it first trains those that have no folder, also those whose rows are kept: the weights are
not. Rows go to benchmarks/results/sprint_measures.jsonl as they come. Several processes may share one --out.

Images are resized for another size, and the patch stays, so the grid changes: 4x4 to 32x32 patches. Each encoding keeps its
own rule for places beyond its tables. What has a value for each layer is its mean over the layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sprint_plan
from glance_measures import COLUMNS, Columns, means_of_columns, seed_tables
from kept import six_digits
from sprint import hold_if_free, keep, run_of, splits_of, train, trained, wanted
from sprint_plan import STAGES, WHOLE, Trial, rows_of
from timing import RESULTS, Row, conditions

from sape2.config import RunConfig
from sape2.evaluation.base import drawn
from sape2.evaluation.resolution import predict_view
from sape2.evaluation.runs import measure
from sape2.evaluation.views import View
from sape2.models.trained import load_run_model
from sape2.runs.rows import read_rows
from sape2.runs.run import Run

ROWS = RESULTS / "sprint_measures.jsonl"
SIDES = (16, 24, 32, 48, 64, 96, 128)
IMAGES = 1000  # of the test set, for accuracy at other sizes


def at_other_sizes(run: Run[RunConfig]) -> Iterator[Row]:
    """Accuracy of the last weights on resized test images."""
    model, data = load_run_model(run, "last"), splits_of(run).test
    labels = drawn(data, IMAGES).labels.cpu()
    for side in SIDES:
        found = predict_view(model, data, View((side, side), "scaled"), IMAGES)
        yield {"name": f"{side}x{side}", "value": six_digits((found == labels).float().mean().item()), "n": IMAGES}


def by_measures(run: Run[RunConfig]) -> Iterator[Row]:
    """The columns of the tables of shift, grouping and health."""
    found = measure(run, splits_of(run), ["shift", "grouping", "health"], "test", ["last"])
    return means_of_columns(found, COLUMNS)


PARTS: dict[str, Callable[[Run[RunConfig]], Iterator[Row]]] = {"sizes": at_other_sizes, "measures": by_measures}


def train_again(stage: str, trial: Trial, data: Path | None, out: Path) -> None:
    """Trains a run to its end in its folder, also if its row is kept; does nothing if another process has it."""
    train(trial, stage, data, out)
    run = run_of(trial, data, out / trial.digest)
    if run.state != "finished" and (lock := hold_if_free(run)):
        with lock:
            trained(trial, run)


def measure_trial(trial: Trial, part: str, data: Path | None, out: Path) -> None:
    """Does nothing without a finished run, nor if the part is kept, or another process has the run."""
    run = run_of(trial, data, out / trial.digest)
    if run.state == "finished" and (lock := hold_if_free(run)):
        with lock:
            rows = [] if is_kept(trial, part) else list(measured(trial, part, data, out))
            for row in rows:
                keep(row, ROWS)


def is_kept(trial: Trial, part: str) -> bool:
    return any(row["digest"] == trial.digest and row["part"] == part for row in read_rows(ROWS))


def measured(trial: Trial, part: str, data: Path | None, out: Path) -> Iterator[Row]:
    run, about = run_of(trial, data, out / trial.digest), conditions()
    mark = {"digest": trial.digest, "encoding": run.config.model.encoding, "seed": trial.seed, "part": part}
    for row in PARTS[part](run):
        yield mark | row | {"commit": about["commit"], "date": about["date"], "processor": about["hardware"]}


def _table(part: str, columns: Columns, whole: bool, rows: list[Row]) -> str:
    """Of the runs of the whole length, or of the others."""
    long = {row["digest"] for row in rows_of(read_rows(sprint_plan.ROWS), *WHOLE)}
    return seed_tables([row for row in rows if row["part"] == part and (row["digest"] in long) == whole], columns)


AT_SIZES: Columns = {f"{side}x{side}": [] for side in SIDES}
TABLES: dict[str, Callable[[list[Row]], str]] = {
    "measures": partial(_table, "measures", COLUMNS, False),
    "sizes": partial(_table, "sizes", AT_SIZES, False),
    "measures of the whole": partial(_table, "measures", COLUMNS, True),
    "sizes of the whole": partial(_table, "sizes", AT_SIZES, True),
}


def tables(rows: list[Row]) -> str:
    return "\n".join(f"### {name}\n\n{table(rows)}" for name, table in TABLES.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sprint")
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--train", action="store_true", help="also those that have no folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only these")
    parser.add_argument("--encodings", nargs="+", default=[], metavar="NAME", help="only these")
    given = parser.parse_args()
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown or (given.stages and not given.data):
        parser.error(f"measuring needs --data DIR and stages out of {', '.join(STAGES)}; got {', '.join(given.stages)}")
    for part in [given.only] if given.only else list(PARTS):
        for stage, trial in wanted(given.stages, given.seeds, given.encodings):
            if given.train and not is_kept(trial, part):
                train_again(stage, trial, given.data, given.out)
            measure_trial(trial, part, given.data, given.out)
    if not given.stages:
        print(tables(read_rows(ROWS)))


if __name__ == "__main__":
    main()
