"""`sape2 export`: writes a trained model in a format that other programs read."""

from __future__ import annotations

import argparse
from pathlib import Path

from sape2.cli.options import add_json, pixel_size
from sape2.cli.output import Row, say
from sape2.config import check_image_size
from sape2.runs.files import check_writable
from sape2.tables import print_json, print_table

HELP = "write a trained model for other programs, and check the file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    formats = ["onnx", "pt2", "safetensors", "hub"]
    parser.add_argument("--format", choices=formats, required=True, help="hub is a folder with a model card")
    parser.add_argument("--out", metavar="FILE", help="(default RUN/export/NAME.FORMAT)")
    parser.add_argument("--size", metavar="HxW", help="a graph for this image size alone, positions as constants (default any)")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="(default last)")
    parser.add_argument("--normalize", action="store_true", help="normalise inside the graph, which takes pixels / 255")
    parser.add_argument("--license", metavar="ID", help="licence of the model, e.g. cc-by-4.0 (default: none is written)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sape2.runs.run import Run

    size = None if arguments.size is None else pixel_size(arguments.size)
    run = Run.open_finished(arguments.folder)
    if size is not None:
        check_image_size(size, run.config.model.patch_size)
    from sape2.models.export import ParityError, export_run, needed

    needed(arguments.format)
    out = None if arguments.out is None else Path(arguments.out)
    check_writable(run.folder / "export" if out is None else out.parent)
    options = {"size": size, "weights": arguments.weights, "normalize": arguments.normalize, "license": arguments.license}
    try:
        path, rows = export_run(run, arguments.format, out, **options)
    except ParityError as error:
        _show_parity(error.rows, arguments)
        say(f"sape2: {error}")
        return 1
    _show_parity([row | {"file": str(path)} for row in rows], arguments)
    if not arguments.json:
        print(f"written: {path}")
    return 0


def _show_parity(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Prints how far the logits of the file differ from those of the model, for each number and size of images."""
    if arguments.json:
        print_json(row | {"format": arguments.format} for row in rows)
        return
    table = [row | {key: f"{row[key]:.1e}" for key in ("max_abs_difference", "tolerance")} for row in rows]
    columns = ["batch", "height", "width", "max_abs_difference", "tolerance", "largest_logit", "agrees"]
    print_table(table, columns, f"{arguments.format} against the model")
