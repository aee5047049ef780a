"""`sape2 explain`: writes one page about how a finished run classifies an image."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sape2.cli.options import add_json
from sape2.cli.output import say
from sape2.progress import one_line
from sape2.runs.files import check_writable
from sape2.tables import print_json, print_table

HELP = "explain a finished run's prediction for one image, as an HTML page"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    parser.add_argument("image", metavar="IMAGE", help="any image file")
    parser.add_argument("--out", metavar="FILE", help=".html page or .png figure (default RUN/figures/explain-IMAGE.html)")
    parser.add_argument("--layer", type=int, metavar="N", help="one layer, from 1 (default all that have a bias)")
    parser.add_argument("--head", type=int, metavar="N", help="one head, from 1 (default their mean)")
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="Y,X",
        help="row and column, from 0; may be repeated (default centre, corner)",
    )
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="last epoch, or best on the validation set")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    patches = tuple(_patch(text) for text in arguments.patch)
    from sape2.inspect.explain import explain
    from sape2.inspect.explanation import Choice
    from sape2.runs.run import Run

    choice = Choice(arguments.layer, arguments.head, patches)
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None:
        check_writable(out.parent)
    run = Run.open_finished(arguments.folder)
    written, rows = explain(run, Path(arguments.image), out, choice, arguments.weights)
    if run.note_of_rule:
        say(run.note_of_rule)
    if arguments.json:
        print_json(rows)
        return 0
    likely = [{"class": row["class"], "probability": row["value"]} for row in rows if row["name"] == "probability"]
    print_table(likely, ["class", "probability"], arguments.image)
    for row in rows:
        if "message" in row:
            print("note: unlike the training images: " * row["name"].startswith("unlike_") + row["message"])
    print(one_line(f"written: {written}"))
    return 0


def _patch(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"--patch must be ROW,COLUMN, whole numbers from 0, such as 3,5; got {text!r}")
    return int(match[1]), int(match[2])
