"""`sape2 train`: a model by a recipe, or further from where that stopped."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.cli.options import add_json, default_name, resolve
from sape2.cli.output import Row, drawn, say, show_results
from sape2.config import RunConfig

if TYPE_CHECKING:
    from sape2.data import Splits
    from sape2.models.vit import ViT
    from sape2.training.processes import Processes

HELP = "train a model by a recipe, or resume a stopped run"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="see: sape2 list recipes")
    parser.add_argument("--data", metavar="DIR", help="folder (images, parquet, webdataset, torchvision) or hub id")
    parser.add_argument("--encoding", metavar="NAME", help="for example ape+sape2:count=cyclic; see: sape2 list encodings")
    parser.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    parser.add_argument("--epochs", type=int, metavar="N", help="the warm-up keeps its share of them")
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (default 0)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default runs/RECIPE-MODEL-ENCODING-sSEED)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.lr=1e-3")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, size, MACs, steps, expected time; write nothing"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    config = resolve(arguments)
    from sape2.training.processes import joined, refuse_launcher

    if arguments.dry_run:
        refuse_launcher("sape2 train --dry-run")
    with joined() as processes:
        if processes.is_main:
            return _train(config, arguments, processes)
        from sape2.studies.run import help_to_train

        return help_to_train(config, processes)


def _train(config: RunConfig, arguments: argparse.Namespace, processes: Processes) -> int:
    folder = Path(arguments.out or Path("runs") / default_name(config))
    from sape2.training.checkpoint import standing
    from sape2.training.lock import hold
    from sape2.training.run_folder import check_images, check_run, is_finished, own_results

    if not arguments.dry_run:
        check_run(folder, config)
    from sape2.data import fingerprint, load_data, open_sources
    from sape2.evaluation.runs import draw, is_measured
    from sape2.models.trained import build_model

    if not arguments.dry_run and is_finished(folder) and is_measured(folder):
        if arguments.data is not None:
            check_images(folder, fingerprint(open_sources(config.data, config.model)))
        say(f"{folder} is finished; choose another --out or --seed for a new run")
        figures = sorted((folder / "figures").glob("*.png"))
        return show_results(own_results(folder), folder, arguments.json, figures)
    model = build_model(config)
    splits = load_data(config.data, config.model)
    if arguments.dry_run:
        return _dry_run(model, splits, config, arguments.json)
    from sape2.studies.run import run_to_end
    from sape2.training.loop import TrainingStopped

    with hold(folder, standing(folder)) as lock:
        try:
            rows = run_to_end(model, splits, config, lock, processes=processes)
        except TrainingStopped as stopped:
            say(f"sape2: {stopped}")
            return 128 + stopped.signal_number
    return show_results(rows, folder, arguments.json, drawn(lambda: draw(folder, splits)))


def _dry_run(model: ViT, splits: Splits, config: RunConfig, as_json: bool) -> int:
    from sape2.data.augment import TrainStream
    from sape2.evaluation.accuracy import quick_accuracy
    from sape2.evaluation.cost.measure import count_macs, count_parameters
    from sape2.evaluation.cost.timing import median_seconds
    from sape2.training.loop import Trainer
    from sape2.training.optimisation import mixed_precision

    stream = TrainStream(splits.train, config.augment, config.train, config.seed)
    images, labels = stream[0]
    macs = count_macs(model, config.model.in_channels, config.model.image_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(model, splits.train, lambda _: (0.0, 0.0), config, Path(scratch), quiet=True)
        device = trainer.accelerator.device
        step_s = median_seconds(lambda: trainer._step(images.to(device), labels.to(device)))
        start = time.perf_counter()
        quick_accuracy(trainer.model, splits.validation)
        evaluation_s = time.perf_counter() - start
    summary: Row = {
        "parameters": count_parameters(model),
        "macs_per_image": macs,
        "training_images": len(splits.train),
        "validation_images": len(splits.validation),
        "test_images": len(splits.test),
        "steps_per_epoch": stream.steps_per_epoch,
        "steps": stream.total_steps,
        "precision": mixed_precision(config.train.precision).replace("no", "fp32"),
        "device": str(device),
        "seconds_per_step": step_s,
        "images_per_s": config.train.batch_size / step_s,
        "expected_minutes": (stream.total_steps * step_s + config.train.epochs * evaluation_s) / 60,
    }
    from sape2.evaluation.report import print_json, print_table

    if as_json:
        print_json([{"config": config.to_dict()} | summary])
    else:
        print(config.to_json())
        print_table(({"what": name, "value": value} for name, value in summary.items()), ["what", "value"], "dry run")
    return 0
