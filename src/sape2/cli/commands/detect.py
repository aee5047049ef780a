"""`sape2 detect`: trains and evaluates a detector on images in COCO format."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sape2.cli.options import add_json, default_name, whole_path, with_options
from sape2.cli.output import say
from sape2.config.recipes import get_detection_recipe
from sape2.config.recipes.changed import changed_in_words
from sape2.runs.files import check_writable
from sape2.tables import print_json, print_table

SEE = "the config.json of a run has all keys"
HELP = "train a detector on images in COCO format and measure it"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="coco, or coco_digits, which composes its images")
    parser.add_argument("--data", metavar="DIR", help="folder in COCO format (coco_digits: where to compose it)")
    parser.add_argument("--encoding", metavar="NAME", help="see: sape2 list encodings")
    parser.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    parser.add_argument("--masks", action="store_true", help="Mask R-CNN instead of Faster R-CNN")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights, order and augmentation (default 0)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default runs/RECIPE-MODEL-ENCODING-sSEED)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. training.epochs=6")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sape2.training.processes import refuse_launcher

    refuse_launcher("sape2 detect")
    config = get_detection_recipe(arguments.recipe)
    if arguments.masks:
        config = replace(config, detector=replace(config.detector, masks=True))
    if arguments.data is not None:
        config = replace(config, images=replace(config.images, source=whole_path(arguments.data)))
    config = with_options(config, arguments, SEE)
    folder = Path(arguments.out or Path("runs") / default_name(config))
    from sape2.detection import run_detection
    from sape2.training.interruption import Stopped

    check_writable(folder)
    try:
        rows = run_detection(config, folder)
    except Stopped as stopped:
        say(f"sape2: {stopped}")
        return 128 + stopped.signal_number
    changed = f", {words}" if (words := changed_in_words(config)) else ""
    if arguments.json:
        print_json(rows)
    else:
        title = f"{config.images.name}, {config.model.encoding}{changed}"
        print_table(rows, ["name", "value", "unit", "n", "objects", "protocol"], title)
        print(f"in {folder}: results.jsonl, metrics.jsonl")
    return 0
