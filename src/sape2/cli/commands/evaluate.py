"""`sape2 evaluate`: measures a finished run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sape2.cli.options import add_json, chosen_measures, whole_number
from sape2.cli.output import Row, drawn, say, show_results
from sape2.config import RunConfig
from sape2.progress import bars
from sape2.runs.files import check_writable

if TYPE_CHECKING:
    from sape2.data import Splits
    from sape2.runs.run import Run

HELP = "measure a finished run"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    parser.add_argument("--measures", default="accuracy", metavar="A,B", help="see: sape2 list measures (default accuracy)")
    parser.add_argument("--data", metavar="DIR", help="folder of the images, if they were moved; or a hub id")
    parser.add_argument("--other-data", metavar="NAME", help="name for a data set other than the run's own; needs --data")
    parser.add_argument(
        "--limit", metavar="N", help="N images, drawn by class with a fixed seed (default: what each measure takes)"
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="(default test)")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="last epoch, or best on the validation set")
    parser.add_argument("--all", action="store_true", help="print every row, not only the headline numbers")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sape2.runs.run import Run

    run = Run.open_finished(arguments.folder)
    config = run.config
    measures = chosen_measures(arguments.measures)
    limit = None if arguments.limit is None else whole_number("--limit", arguments.limit)
    check_writable(run.folder, "rows go into its results.jsonl; measure a copy of the folder")
    other: str | None = arguments.other_data
    from sape2.data import load_data, moved

    if other is not None:
        config = _for_others(config, arguments.data, other)
    elif arguments.data is not None:
        config = replace(config, data=moved(config.data, arguments.data))
    from sape2.evaluation.runs import measure, notes_of_others
    from sape2.inspect.pictures import draw_measures, pictures
    from sape2.models.trained import load_run_model

    if run.note_of_rule:
        say(run.note_of_rule)
    classes = run.classes if other is not None else ()
    load = cache(partial(load_run_model, run))
    splits = load_data(config.data, config.model, classes)
    if other is not None:
        for note in notes_of_others(getattr(splits, arguments.split), classes, other):
            say(note)
        if config.data.test_fraction is not None and arguments.split == "test":
            share = f"{config.data.test_fraction:.0%} of each class"
            say(f"{other} has no test set of its own: measured are {len(splits.test)} of its {_number(splits)} images, {share}")
    with _watching() as watch:
        rows = measure(run, splits, measures, arguments.split, [arguments.weights], limit, watch, other, load)
    _tell_of_few(rows, run)
    whole = "accuracy" in measures and limit is None and other is None  # confusion is of all images, and the run's own
    by_measure = [[row for row in rows if row["measure"] == name] for name in dict.fromkeys(row["measure"] for row in rows)]
    files = drawn(
        *(partial(draw_measures, run.folder, some) for some in by_measure),
        *(pictures(run, lambda: splits, load).values() if whole else ()),
    )
    return show_results(rows, run, arguments.json, files, arguments.all)


def _number(splits: Splits) -> int:
    return len(splits.train) + len(splits.validation) + len(splits.test)


def _tell_of_few(rows: list[Row], run: Run[RunConfig]) -> None:
    """Says which of the new measurements the run does not show, because it already has them over more images."""
    shown = {(row["measure"], row["split"], row["weights"], row.get("limit")) for row in run.results()}
    for measure in dict.fromkeys(row["measure"] for row in rows):
        row = next(row for row in rows if row["measure"] == measure)
        key = (measure, row["split"], row["weights"], row["limit"])
        if row.get("other_data") is None and key not in shown:
            say(
                f"{measure} of {row['limit']:,} images: what was measured on more images stays in results.jsonl, in sape2 "
                "report and on the model card"
            )


def _for_others(config: RunConfig, folder: str | None, name: str) -> RunConfig:
    """The run's settings for images that are not its own. Raises ValueError without a place or a name of their own."""
    if folder is None:
        raise ValueError("--other-data NAME needs --data, the folder or hub id of the other images")
    if not name.strip() or name == config.data.name:
        raise ValueError(f"--other-data needs a name that is not the run's own, {config.data.name!r}; got {name!r}")
    from sape2.data.own import find_data
    from sape2.data.parquet import is_hub_id

    data = replace(config.data, source=folder, layout=None, test_fraction=None)
    if is_hub_id(folder):
        return replace(config, data=replace(data, name=folder))
    return replace(config, data=find_data(data))


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[str, int, bool], None]]:
    """Progress on standard error: in a terminal a line a measure that counts its rows, elsewhere one when it is done."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with bars(*columns) as progress:
        tasks: dict[str, Any] = {}

        def watch(name: str, rows: int, finished: bool) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None)
            progress.update(tasks[name], completed=rows, total=rows if finished else None)
            if finished and progress.disable:
                say(f"{name}: {rows} rows, {progress.tasks[tasks[name]].elapsed:.0f} s")

        yield watch
