"""`sape2 evaluate`: measures a finished run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sape2.cli.options import add_json, chosen_measures, whole_number
from sape2.cli.output import drawn, say, show_results
from sape2.config import RunConfig

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
    from sape2.training.files import check_writable
    from sape2.training.run_folder import read_config
    from sape2.training.standing import check_finished

    folder = Path(arguments.folder)
    config = read_config(folder)
    measures = chosen_measures(arguments.measures)
    limit = None if arguments.limit is None else whole_number("--limit", arguments.limit)
    check_finished(folder)
    check_writable(folder, "rows go into its results.jsonl; measure a copy of the folder")
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=arguments.data))
    other: str | None = arguments.other_data
    if other is not None:
        config = _for_others(config, arguments.data, other)
    from sape2.data import load_data
    from sape2.evaluation.runs import measure, notes_of_others
    from sape2.inspect.pictures import draw_measures, pictures
    from sape2.models.trained import names_of_classes, note_of_rule

    if note := note_of_rule(folder):
        say(note)
    classes = names_of_classes(folder) if other is not None else ()
    splits = load_data(config.data, config.model, classes)
    if other is not None:
        for note in notes_of_others(getattr(splits, arguments.split), classes, other):
            say(note)
    with _watching() as watch:
        rows = measure(folder, splits, measures, arguments.split, [arguments.weights], limit, watch, other)
    _tell_of_few(rows, folder)
    whole = "accuracy" in measures and limit is None and other is None  # confusion is of all images, and the run's own
    by_measure = [[row for row in rows if row["measure"] == name] for name in dict.fromkeys(row["measure"] for row in rows)]
    files = drawn(
        *(partial(draw_measures, folder, some) for some in by_measure),
        *(pictures(folder, lambda: splits).values() if whole else ()),
    )
    return show_results(rows, folder, arguments.json, files, arguments.all)


def _tell_of_few(rows: list[dict[str, Any]], folder: Path) -> None:
    """Says which of the new measurements the run does not show, because it already has them over more images."""
    from sape2.training.run_folder import own_results

    shown = {(row["measure"], row["split"], row["weights"], row.get("limit")) for row in own_results(folder)}
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

    data = replace(config.data, source=folder, layout=None)
    if is_hub_id(folder):
        return replace(config, data=replace(data, name=folder, test_fraction=None))
    return replace(config, data=find_data(data))


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[str, int, bool], None]]:
    """Progress on standard error: in a terminal a line a measure that counts its rows, elsewhere one when it is done."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from sape2.progress import bars

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
