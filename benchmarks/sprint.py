"""The study of docs/decisions/0011-sprint.md: its runs in their order, and its tables from the rows that are kept.

Command:  python benchmarks/sprint.py run STAGE [STAGE ...] --data DIR --out DIR [--threads N]
                 [--seeds N ...] [--encodings NAME ...]
          python benchmarks/sprint.py list       how many runs of each stage are kept
          python benchmarks/sprint.py            prints the tables
          python benchmarks/sprint.py figure     draws docs/figures/sprint_quarter.png and sprint_budget.png

DIR holds the folders cifar10 and cifar100. Every finished run becomes a line of benchmarks/results/sprint.jsonl at once
and is not run again: stop the command whenever you like, and give it again, on another machine too. Several processes may
share one --out; each takes runs that no other has.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sprint_plan import ROWS, STAGES, Trial
from sprint_tables import figure, tables
from timing import Row, conditions

from sape2.config import DataConfig, ModelConfig, RunConfig
from sape2.encodings import canonical_name
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.tables import markdown_table

if TYPE_CHECKING:
    from sape2.data import Splits
    from sape2.runs.lock import Lock


def run(given: argparse.Namespace) -> None:
    """Trains what is left, a run at a time, and keeps each as soon as it is finished."""
    import torch

    torch.set_num_threads(given.threads)
    for stage, trial in wanted(given.stages, given.seeds, given.encodings):
        train(trial, stage, given.data, given.out)


def wanted(stages: Iterable[str], seeds: Sequence[int], encodings: Sequence[str]) -> Iterator[tuple[str, Trial]]:
    """The runs of these stages, each with its stage; of all seeds or encodings if none is given."""
    names = [canonical_name(name) for name in encodings]
    for stage in stages:
        for trial in STAGES[stage](read_rows(ROWS)):
            if (not seeds or trial.seed in seeds) and (not names or canonical_name(trial.encoding) in names):
                yield stage, trial


def train(trial: Trial, stage: str, data: Path | None, out: Path, rows: Path = ROWS) -> None:
    """Does nothing if the run is kept, or if another process has it. Without `data` the recipe's own images are used."""
    if trial.digest in {row["digest"] for row in read_rows(rows)}:
        return
    run = run_of(trial, data, out / trial.digest)
    if lock := hold_if_free(run):
        with lock:
            keep(trained(trial, run) | {"stage": stage}, rows)


def hold_if_free(run: Run[RunConfig]) -> Lock | None:
    """The lock of its folder, or None if another process has it."""
    from sape2.runs.lock import Held

    try:
        return run.hold()
    except Held:
        return None


def run_of(trial: Trial, data: Path | None, folder: Path) -> Run[RunConfig]:
    source = None if data is None else str(data / trial.config.data.name)
    return Run(folder, replace(trial.config, data=replace(trial.config.data, source=source)))


def trained(trial: Trial, run: Run[RunConfig]) -> Row:
    """Trains a run that is held to its end; its raw row without its classes, and the conditions."""
    from sape2.models.trained import build_model
    from sape2.studies.compare.rawrows import raw_row
    from sape2.studies.run import run_to_end

    run_to_end(build_model(run.config), splits_of(run), run)
    row, about = raw_row(run), conditions()
    row["rows"] = [kept for kept in row["rows"] if "class" not in kept]
    return (
        row | {"command": trial.command, "processor": about["hardware"]} | {k: about[k] for k in ("date", "threads", "commit")}
    )


def splits_of(run: Run[RunConfig]) -> Splits:
    """The images of a run, which do not depend on its encoding."""
    return _splits(run.config.data, replace(run.config.model, encoding="none"))


@functools.lru_cache(maxsize=1)
def _splits(data: DataConfig, model: ModelConfig) -> Splits:
    """Decoded once for all runs of a process on the same images."""
    from sape2.data import load_data

    return load_data(data, model)


def keep(row: Row, rows: Path) -> None:
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def progress(rows: list[Row]) -> str:
    """How many runs of each stage are kept; a stage whose rates are not chosen yet says so."""
    kept, lines = {row["digest"] for row in rows}, []
    for stage, trials in STAGES.items():
        try:
            digests = [trial.digest for trial in trials(rows)]
        except ValueError as error:
            lines.append({"stage": stage, "runs": str(error)})
        else:
            lines.append({"stage": stage, "runs": f"{len(kept & set(digests))} of {len(digests)}"})
    return markdown_table(lines, ["stage", "runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=["run", "list", "tables", "figure"], default="tables")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sprint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of the stages' runs those with these seeds")
    parser.add_argument("--encodings", nargs="+", default=[], metavar="NAME", help="and those of these encodings")
    given = parser.parse_args()
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown or (given.command == "run" and not (given.stages and given.data)):
        parser.error(f"run needs --data DIR and stages out of {', '.join(STAGES)}; got {', '.join(given.stages) or 'none'}")
    if given.command == "run":
        run(given)
    else:
        print({"list": progress, "tables": tables, "figure": figure}[given.command](read_rows(ROWS)))


if __name__ == "__main__":
    main()
