"""`sape2 predict`: classifies image files with a finished run."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from sape2.cli.options import add_json, whole_number
from sape2.cli.output import MANY, Row, say
from sape2.progress import progress_bar
from sape2.runs.files import check_writable, write_text
from sape2.tables import csv_table, json_text, print_json, print_table

HELP = "classify images with a finished run"
NAMED = 10  # files that could not be read; of more, the number


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="image files, and folders with images at any depth")
    parser.add_argument("--top", default="1", metavar="K", help="the K most likely classes of each image (default 1)")
    parser.add_argument("--out", metavar="FILE", help=".csv or .json, all rows")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="last epoch, or best on the validation set")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    top = whole_number("--top", arguments.top)
    out = None if arguments.out is None else _checked(Path(arguments.out))
    from sape2.evaluation.predictions import find_images, predict_files
    from sape2.runs.run import Run, check_output

    run = Run.open_finished(arguments.folder)
    files = find_images(arguments.paths)
    if out is not None:
        check_output(out, *files)
        check_writable(out.parent)
    if run.note_of_rule:
        say(run.note_of_rule)
    with progress_bar("images", len(files)) as watch:
        found = predict_files(run, files, top, arguments.weights, watch)
    if not found.rows:
        raise ValueError(f"none of the {len(files)} files can be read; {next(iter(found.unreadable.values()))}")
    _show(found.rows, out, arguments.json)
    if found.unlike:
        kinds = ", ".join(f"{number} {kind}" for kind, number in found.kinds().items())
        say(
            f"{len(found.unlike)} of {len(files)} images are unlike the training images: {kinds}; sape2 explain has the numbers"
        )
    _tell_unreadable(list(found.unreadable.values()), len(files))
    return 2 if found.unreadable else 0


def _checked(out: Path) -> Path:
    if out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--out must end in .csv or .json; got {out}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; give a file")
    return out


def _show(rows: list[Row], out: Path | None, as_json: bool) -> None:
    if out is not None:
        text = csv_table(rows) if out.suffix.lower() == ".csv" else json_text(rows, indent=1) + "\n"
        write_text(out, text)
    if as_json:
        print_json(rows)
    elif len(rows) <= MANY:
        print_table(rows, list(rows[0]), "predictions")
    else:
        print_table(_by_class(rows), ["class", "images", "mean probability"], "most likely class")
        if out is None:
            print("every row: --out FILE.csv, or --json")
    if out is not None and not as_json:
        print(f"written: {out}")


def _by_class(rows: list[Row]) -> list[Row]:
    first: dict[str, list[float]] = {}
    for row in rows:
        if row.get("rank", 1) == 1:
            first.setdefault(row["class"], []).append(row["probability"])
    return [
        {"class": name, "images": len(values), "mean probability": statistics.mean(values)}
        for name, values in sorted(first.items(), key=lambda item: -len(item[1]))
    ]


def _tell_unreadable(reasons: list[str], tried: int) -> None:
    for reason in reasons[:NAMED]:
        say(f"sape2: {' '.join(reason.split())}")
    if reasons:
        more = f", {len(reasons) - NAMED} more than are named here" if len(reasons) > NAMED else ""
        say(f"sape2: {len(reasons)} of {tried} files cannot be read{more}; the others have their rows")
