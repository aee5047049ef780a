"""`sape2 report`: shows many runs in one table and one set of figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from sape2.cli.options import add_json, chosen_measures, one_name
from sape2.cli.output import say, show_comparison
from sape2.runs.files import check_writable

HELP = "show many runs in one table and one set of figures"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        metavar="RUN",
        nargs="+",
        help="run folders (those that differ in the seed only share a line), or the rows.jsonl of sape2 compare",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="encoding to compare with (default of rows.jsonl: the first; of run folders: none)"
    )
    parser.add_argument("--measures", metavar="A,B", help="measures to show (default all that any run has)")
    parser.add_argument("--split", choices=["test", "validation"], help="(default test)")
    parser.add_argument("--weights", choices=["last", "best"], help="(default last)")
    parser.add_argument("--out", default="runs/report", metavar="DIR", help="for tables and figures (default runs/report)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    check_writable(Path(arguments.out))
    if any(name.endswith(".jsonl") for name in arguments.folders):
        return _report_raw(arguments)
    measures = None if arguments.measures is None else chosen_measures(arguments.measures)
    from sape2.studies.compare.headlines import read_runs
    from sape2.studies.compare.report import compare

    split, weights = arguments.split or "test", arguments.weights or "last"
    runs, unfinished = read_runs(map(Path, arguments.folders), split, weights)
    comparison = compare(runs, measures, split, weights, arguments.baseline)
    for folder in unfinished:
        say(f"left out: the run in {folder} is not finished")
    show_comparison(comparison, Path(arguments.out), arguments.json)
    return 0


def _report_raw(arguments: argparse.Namespace) -> int:
    """The tables of sape2 compare from raw rows alone."""
    from sape2.runs.settings import check_own_results
    from sape2.studies.compare.outcome import outcome
    from sape2.studies.compare.rawrows import each_once, read_raw

    if not all(name.endswith(".jsonl") for name in arguments.folders):
        raise ValueError("give run folders, or files of raw rows, not both")
    for option in ("measures", "split", "weights"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for run folders: raw rows hold the accuracy on the test set, with both weights")
    check_own_results(Path(arguments.out), "mean", "reason")
    rows = each_once(row for name in arguments.folders for row in read_raw(Path(name)))
    if not rows:
        raise ValueError(f"there are no rows in {', '.join(arguments.folders)}")
    baseline = None if arguments.baseline is None else one_name(arguments.baseline)
    show_comparison(outcome(rows, baseline), Path(arguments.out), arguments.json)
    return 0
