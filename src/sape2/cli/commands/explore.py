"""`sape2 explore`: serves a local page to explore what a run does with images."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from sape2.cli.options import whole_number
from sape2.cli.output import say

HELP = "explore a finished run in the browser, patch by patch"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", nargs="?", help="run folder (default a small model that comes with sape2)")
    parser.add_argument("--against", metavar="RUN2", help="another run on the same images, to compare with")
    parser.add_argument("--port", metavar="N", help="(default the first free one from 7860)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default 127.0.0.1: this machine alone)")
    parser.add_argument("--data", metavar="DIR", help="folder of the images, if they were moved")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="(default last)")


def run(arguments: argparse.Namespace) -> int:
    port = None if arguments.port is None else whole_number("--port", arguments.port)
    folder, against = (None if text is None else Path(text) for text in (arguments.folder, arguments.against))
    from sape2.inspect.explore import explore

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        explore(folder, against, arguments.host, port, arguments.data, arguments.weights, say)
    return 0
