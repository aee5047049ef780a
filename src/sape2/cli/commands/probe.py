"""`sape2 probe`: trains and measures small models on a controlled task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.cli.options import add_json, split_encodings, whole_number
from sape2.cli.output import Row, drawn, say
from sape2.progress import bars
from sape2.runs.files import check_writable
from sape2.tables import print_json, print_table

if TYPE_CHECKING:
    from sape2.studies.probing import Cell

HELP = "train small models on a controlled task, measure on changed scenes"
ENCODINGS = "none,ape,rope,rpe,cope,sape2,ape+sape2"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="see: sape2 list probes")
    parser.add_argument("--encodings", default=ENCODINGS, metavar="A,B", help=f"(default {ENCODINGS})")
    parser.add_argument("--seeds", default="3", metavar="N", help="seeds 0 to N - 1 (default 3)")
    parser.add_argument("--layers", default="2", metavar="N,…", help="depths of the models (default 2)")
    parser.add_argument("--steps", metavar="N", help="updates of each model (default: what the task says)")
    parser.add_argument("--out", metavar="DIR", help="for results.jsonl and the figure (default runs/probe-TASK)")
    parser.add_argument("--examples", metavar="FILE", help="only draw some scenes of every split, into a picture")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sape2.studies.probes import find_task

    task = find_task(arguments.task)
    if arguments.examples is not None:
        return _draw_examples(arguments.task, Path(arguments.examples))
    from sape2.runs.settings import check_own_results
    from sape2.studies.probing import draw_results, table

    cells, folder = _probe_cells(arguments), Path(arguments.out or Path("runs") / f"probe-{arguments.task}")
    check_own_results(folder, "task")
    check_writable(folder)
    rows = _run_probes(cells, folder)
    figures = drawn(lambda: draw_results(rows, task, folder / "figures" / "probe.png"))
    if arguments.json:
        print_json(rows)
        return 0
    lines, (encoding, layers, seeds, *splits) = table(rows, task)
    title = f"{arguments.task}, {cells[0].steps} updates: accuracy by split (chance), mean ± standard deviation over seeds"
    for start in range(0, len(splits), 4):  # what a terminal is wide enough for
        print_table(lines, [encoding, layers, seeds, *splits[start : start + 4]], title)
    print(f"in {folder}: {', '.join(['results.jsonl', *(f'figures/{path.name}' for path in figures)])}")
    return 0


def _draw_examples(task: str, path: Path) -> int:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--examples needs a file that ends in .png, .svg or .pdf; got {str(path)!r}")
    from sape2.studies.probing import draw_examples

    draw_examples(task, path)
    print(f"written: {path}")
    return 0


def _probe_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The cells, seed by seed, so that an interrupted command leaves complete comparisons."""
    from sape2.studies.probing import Cell

    steps = None if arguments.steps is None else whole_number("--steps", arguments.steps)
    return [
        Cell(arguments.task, encoding, seed, layers, steps)
        for layers in dict.fromkeys(whole_number("--layers", text) for text in arguments.layers.split(","))
        for seed in range(whole_number("--seeds", arguments.seeds))
        for encoding in split_encodings(arguments.encodings)
    ]


def _run_probes(cells: list[Cell], folder: Path) -> list[Row]:
    """All rows, with a progress bar on standard error; where there is no terminal, a line for each cell."""
    from sape2.studies.probing import run_cells

    rows: list[Row] = []
    with bars() as progress:
        bar = progress.add_task("training", total=sum(cell.key["steps"] for cell in cells))
        done = 0
        for number, (cell, found) in enumerate(run_cells(cells, folder, lambda: progress.advance(bar)), start=1):
            rows += found
            done += cell.key["steps"]
            text = f"{number}/{len(cells)} {cell.encoding}, seed {cell.seed}, {cell.layers} layers: {found[0]['value']:.3f}"
            progress.update(bar, completed=done, description=text)
            if progress.disable:
                say(text)
    return rows
