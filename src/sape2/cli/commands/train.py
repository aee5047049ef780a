"""`sape2 train`: trains a model by a recipe, or resumes a run that stopped."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.cli.options import add_json, default_name, resolve
from sape2.cli.output import Row, drawn, say, show_results
from sape2.config import RunConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.runs.files import check_writable
from sape2.tables import print_json, print_table

if TYPE_CHECKING:
    from sape2.training.processes import Processes

TEST_PASSES = 3  # over the test images at the end: the last weights, the best ones, and the confusion in the figures
HELP = "train a model by a recipe, or resume a stopped run"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="see: sape2 list recipes")
    parser.add_argument("--data", metavar="DIR", help="folder (images, parquet, webdataset, torchvision) or hub id")
    parser.add_argument("--encoding", metavar="NAME", help="for example ape+sape2:count=cyclic; see: sape2 list encodings")
    parser.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs (warm-up scales with it)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights, order and augmentation (default 0)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default runs/RECIPE-MODEL-ENCODING-sSEED)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.lr=1e-3")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, size, MACs, steps, expected time; write nothing"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    config = resolve(arguments)
    from sape2.training.processes import joined, refuse_launcher

    if arguments.dry_run:
        refuse_launcher("sape2 train --dry-run")
        return _dry_run(config, arguments.json, began)
    with joined() as processes:
        if processes.is_main:
            return _train(config, arguments, processes)
        from sape2.studies.run import help_to_train

        return help_to_train(config, processes)


def _train(config: RunConfig, arguments: argparse.Namespace, processes: Processes) -> int:
    from sape2.runs.run import Run

    run = Run(Path(arguments.out or Path("runs") / default_name(config)), config)
    run.check_settings()
    if run.state != "finished":
        check_writable(run.folder)
    from sape2.data import fingerprint, load_data, open_sources
    from sape2.inspect.pictures import pictures
    from sape2.models.trained import build_model

    load = cache(lambda: load_data(config.data, config.model))
    if run.is_measured:
        if arguments.data is not None:
            run.check_images(fingerprint(open_sources(config.data, config.model)))
        say(f"{run.folder} is finished; choose another --out or --seed for a new run")
        missing = [draw for path, draw in pictures(run, load).items() if not path.exists()]
        drawn(*missing)
        figures = sorted((run.folder / "figures").glob("*.png"))
        return show_results(run.results(), run, arguments.json, figures)
    model = build_model(config)
    splits = load()
    from sape2.studies.run import run_to_end
    from sape2.training.interruption import Stopped

    with run.hold():
        try:
            rows = run_to_end(model, splits, run, processes=processes)
        except Stopped as stopped:
            say(f"sape2: {stopped}")
            return 128 + stopped.signal_number
    return show_results(rows, run, arguments.json, drawn(*pictures(run, load).values()))


def _dry_run(config: RunConfig, as_json: bool, began: float) -> int:
    from sape2.data import load_data
    from sape2.evaluation.accuracy import quick_accuracy
    from sape2.evaluation.cost.measure import count_parameters
    from sape2.evaluation.cost.operations import count_model_macs
    from sape2.evaluation.cost.timing import alternate
    from sape2.machine import precision_of
    from sape2.models.trained import build_model
    from sape2.training.steps import ImageSteps

    model, splits = build_model(config), load_data(config.data, config.model)
    setup_s = time.perf_counter() - began  # for libraries, images, model
    macs = count_model_macs(model, config.model.in_channels, config.model.image_size)
    steps = ImageSteps(model, splits.train, config)
    stream, batch = steps.stream, steps.stream[0]
    step_s = statistics.median(alternate({"step": lambda: steps.take(batch)}, repeats=5)["step"])
    start = time.perf_counter()
    quick_accuracy(model, splits.validation)
    validation_s = time.perf_counter() - start
    test_s = TEST_PASSES * validation_s * len(splits.test) / len(splits.validation)
    evaluation_s = config.train.epochs * validation_s + test_s
    summary: Row = {
        "parameters": count_parameters(model),
        "macs_per_image": macs,
        "training_images": len(splits.train),
        "validation_images": len(splits.validation),
        "test_images": len(splits.test),
        "steps_per_epoch": stream.steps_per_epoch,
        "steps": stream.total_steps,
        "precision": precision_of(config.train.precision),
        "device": str(steps.accelerator.device),
        "augmentation": stream.where_augmented(),
        "seconds_per_step": step_s,
        "images_per_s": config.train.batch_size / step_s,
        "expected_training_minutes": stream.total_steps * step_s / 60,
        "expected_evaluation_minutes": evaluation_s / 60,  # of the validation set after every epoch, and of the test set
        "expected_minutes": (setup_s + stream.total_steps * step_s + evaluation_s) / 60,  # all, from the command on
    }
    if as_json:
        print_json([{"config": config.to_dict()} | summary])
    else:
        print(config.to_json())
        title = "dry run" + (f": {words}" if (words := changed_in_words(config)) else "")
        print_table(({"what": name, "value": value} for name, value in summary.items()), ["what", "value"], title)
    return 0
