"""`sape2 cost`: measures operations, time and memory of encodings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.cli.options import add_json, split_encodings, whole_number
from sape2.cli.output import Row, drawn, say
from sape2.progress import bars
from sape2.runs.files import check_writable, holds_files, write_text
from sape2.tables import print_json, print_table

if TYPE_CHECKING:
    from sape2.evaluation.cost.sweep import Point, Sweep

HELP = "measure operations, time and memory of encodings, and growth with the grid"
ENCODINGS = "none,rope,rpe,rpe_decomposed,cope,sape2,sape2:readout=squared_distance,sape2:readout=direct"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encodings", default=ENCODINGS, metavar="A,B", help=f"(default {ENCODINGS})")
    parser.add_argument("--grids", default="8x8,14x14,24x24", metavar="HxW,…", help="token grids (default 8x8,14x14,24x24)")
    parser.add_argument("--batches", default="4", metavar="N,…", help="images at once (default 4)")
    parser.add_argument(
        "--dtypes", default="fp32", metavar="A,B", help="fp32, bf16, fp16; the last two are autocast (default fp32)"
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--model", default="vit_small", metavar="NAME", help="see: sape2 list models (default vit_small)")
    scope.add_argument("--attention-only", action="store_true", help="q, k, v to output only, with the heads of vit_small")
    parser.add_argument("--repeats", default="7", metavar="N", help="rounds of timing after two of warm-up (default 7)")
    parser.add_argument("--threads", metavar="N", help="processor threads (default: what PyTorch chooses)")
    parser.add_argument("--out", default="runs/cost", metavar="DIR", help="for results.jsonl and figures (default runs/cost)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sape2.evaluation.cost.rows import count_table, time_table

    sweep, folder = _sweep(arguments), Path(arguments.out)
    _take_up(folder, sweep)
    rows, tables = [], {}
    for point, found in _with_progress(sweep, folder / "results.jsonl"):
        rows += found
        if point is not None:
            tables[f"{point}: for one image"] = count_table(found)
            tables[f"{point}: measured"] = time_table(found)
    files = drawn(
        partial(_figure, rows, folder / "cost_time.png", "ms", "time (ms)"),
        partial(_figure, rows, folder / "cost_memory.png", "memory", "peak extra memory (MiB)"),
    )
    if arguments.json:
        print_json(rows)
        return 0
    for title, lines in tables.items():
        print_table(lines, list(lines[0]), title)
    growth = [row for row in rows if row["name"].endswith("_growth") and row["timed_as"] == row["encoding"]]
    if growth:
        columns = ["name", "encoding", "level", "dtype", "batch", "grid", "value"]
        print_table(growth, columns, "growth: exponent of the number of tokens")
    print(f"in {folder}: {', '.join(['results.jsonl', *(path.name for path in files)])}")
    return 0


def _sweep(arguments: argparse.Namespace) -> Sweep:
    import torch

    from sape2.evaluation.cost.sweep import LEVELS, Sweep, parse_grid
    from sape2.machine import find_device

    if arguments.threads is not None:
        torch.set_num_threads(whole_number("--threads", arguments.threads))
    return Sweep(
        encodings=split_encodings(arguments.encodings),
        grids=tuple(parse_grid(text) for text in arguments.grids.split(",")),
        batches=tuple(whole_number("--batches", text) for text in arguments.batches.split(",")),
        dtypes=tuple(text.strip() for text in arguments.dtypes.split(",")),
        model=arguments.model,
        levels=LEVELS[:1] if arguments.attention_only else LEVELS,
        repeats=whole_number("--repeats", arguments.repeats),
        device=find_device(),
    )


def _take_up(folder: Path, sweep: Sweep) -> None:
    """Writes sweep.json; raises ValueError, before anything is measured, if the folder holds another sweep or other files."""
    import torch

    from sape2.runs.settings import difference

    settings, path = sweep.settings() | {"threads": torch.get_num_threads()}, folder / "sweep.json"
    check_writable(folder)
    if not holds_files(folder):
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = {key: json.loads(path.read_text(encoding="utf-8"))[key] for key in settings}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no sweep of sape2 cost: no sweep.json that can be read; choose another --out"
        ) from error
    if before != settings:
        raise ValueError(
            f"{folder} holds another sweep, which differs in {difference(before, settings)}; choose another --out for this "
            f"one, give the same options to measure again, or remove {folder}"
        )


def _with_progress(sweep: Sweep, path: Path) -> Iterator[tuple[Point | None, list[Row]]]:
    """The rows of the sweep as they come, with a progress bar on standard error; without a terminal, a line for each point."""
    import torch

    from sape2.evaluation.cost.sweep import run_sweep
    from sape2.machine import hardware

    conditions = {"torch": torch.__version__, "hardware": hardware(), "threads": torch.get_num_threads()}
    with bars() as progress:
        task = progress.add_task("measuring", total=sweep.rounds)
        for point, rows in run_sweep(sweep, path, conditions, lambda: progress.advance(task)):
            progress.update(task, description=f"measured {point}" if point else "done")
            if point is not None and progress.disable:
                say(f"measured {point}")
            yield point, rows


def _figure(rows: list[Row], path: Path, quantity: str, label: str) -> Path:
    from sape2.evaluation.cost.rows import lines_of_growth
    from sape2.viz import plot_growth

    plot_growth(lines_of_growth(rows, quantity), path, label)
    return path
