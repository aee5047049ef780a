"""The command line, `sape2 ...`: the only file that joins everything.

Heavy libraries are imported inside the commands, so that `sape2 --help` answers at once. Exit status: 0 done, 2 for
what the user can put right (one line on standard error; SAPE2_DEBUG=1 shows the traceback), 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import sape2
from sape2.config import MODELS, ModelConfig, RunConfig, check_image_size, model_config, override, with_epochs

if TYPE_CHECKING:
    from sape2.claim import Claim
    from sape2.costing import Cell, Sweep
    from sape2.data import Splits
    from sape2.detection import DetectionConfig
    from sape2.probing import Cell as ProbeCell
    from sape2.processes import Processes
    from sape2.progress import StudyProgress
    from sape2.study import Cell as StudyCell
    from sape2.study import Run
    from sape2.vit import ViT

Row = dict[str, Any]
COST_ENCODINGS = "none,rope,rpe,rpe_decomposed,cope,sape2,sape2:readout=squared_distance,sape2:readout=direct"
PROBE_ENCODINGS = "none,ape,rope,rpe,cope,sape2,ape+sape2"
CONDITIONS = {"measure", "name", "value", "unit", "n", "protocol", "ci_low", "ci_high", "split", "weights", "encoding", "model",
              "data", "recipe", "epochs", "seed", "precision", "torch", "hardware"}  # fmt: skip
COLUMNS = {"last": "last epoch", "best": "best on validation"}  # heading of a column of results


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a line about the profiler at every measurement of memory
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SAPE2_DEBUG"):
            raise
        print(f"sape2: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sape2: interrupted", file=sys.stderr)
        return 130


# --- grammar ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> Parser:
    parser = Parser(prog="sape2", description="Position encodings for vision transformers: train, measure, compare.")
    parser.add_argument("--version", action="version", version=f"sape2 {sape2.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model by a recipe, or go on where that stopped")
    train.add_argument("recipe", metavar="RECIPE", help="see: sape2 list recipes")
    train.add_argument("--data", metavar="DIR", help="folder (images, parquet, webdataset, torchvision) or hub id")
    train.add_argument("--encoding", metavar="NAME", help="for example ape+sape2:count=cyclic; see: sape2 list encodings")
    train.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    train.add_argument("--epochs", type=int, metavar="N", help="the warm-up keeps its share of them")
    train.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (default 0)")
    train.add_argument("--out", metavar="DIR", help="run folder (default runs/RECIPE-MODEL-ENCODING-sSEED)")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.lr=1e-3")
    train.add_argument("--dry-run", action="store_true", help="print settings, size, MACs, steps, expected time; write nothing")
    _add_json(train)
    train.set_defaults(run=run_train)

    detect = commands.add_parser("detect", help="train a detector on images in COCO format and measure it")
    detect.add_argument("recipe", metavar="RECIPE", help="coco, or coco_digits, which composes its images")
    detect.add_argument("--data", metavar="DIR", help="folder in COCO format (coco_digits: where to compose it)")
    detect.add_argument("--encoding", metavar="NAME", help="see: sape2 list encodings")
    detect.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    detect.add_argument("--masks", action="store_true", help="Mask R-CNN instead of Faster R-CNN")
    detect.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (default 0)")
    detect.add_argument("--out", metavar="DIR", help="run folder (default runs/RECIPE-MODEL-ENCODING-sSEED)")
    detect.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. training.epochs=6")
    _add_json(detect)
    detect.set_defaults(run=run_detect)

    evaluate = commands.add_parser("evaluate", help="measure a finished run")
    evaluate.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    evaluate.add_argument("--measures", default="accuracy", metavar="A,B", help="see: sape2 list measures (default accuracy)")
    evaluate.add_argument("--data", metavar="DIR", help="where the images lie now, if not where they were")
    evaluate.add_argument("--limit", metavar="N", help="the first N images (default: what each measure takes)")
    evaluate.add_argument("--split", choices=["test", "validation"], default="test", help="(default test)")
    evaluate.add_argument(
        "--weights", choices=["last", "best"], default="last", help="last epoch, or best on the validation set"
    )
    _add_json(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    explain = commands.add_parser("explain", help="one page about what a finished run did with an image")
    explain.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    explain.add_argument("image", metavar="IMAGE", help="any image file")
    explain.add_argument("--out", metavar="FILE", help=".html page or .png figure (default RUN/figures/explain-IMAGE.html)")
    explain.add_argument("--layer", type=int, metavar="N", help="one layer, from 1 (default all that have a bias)")
    explain.add_argument("--head", type=int, metavar="N", help="one head, from 1 (default their mean)")
    explain.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="Y,X",
        help="row and column from 0, again for more (default centre, corner)",
    )
    explain.add_argument(
        "--weights", choices=["last", "best"], default="last", help="last epoch, or best on the validation set"
    )
    _add_json(explain)
    explain.set_defaults(run=run_explain)

    compare = commands.add_parser("compare", help="encodings x seeds under one recipe, with paired differences")
    compare.add_argument("recipe", metavar="RECIPE", help="see: sape2 list recipes")
    compare.add_argument("--encodings", required=True, metavar="A,B", help="see: sape2 list encodings")
    compare.add_argument("--seeds", required=True, metavar="N", help="seeds 0 to N - 1 of every encoding")
    compare.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default the first encoding)")
    compare.add_argument("--data", metavar="DIR", help="folder (parquet, or torchvision's files) or hub id")
    compare.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    compare.add_argument("--epochs", type=int, metavar="N", help="the warm-up keeps its share of them")
    compare.add_argument("--out", metavar="DIR", help="for runs, rows and tables (default runs/compare-RECIPE-MODEL)")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.lr=1e-3")
    compare.add_argument("--retry-failed", action="store_true", help="try failed runs again, from their last checkpoint")
    _add_json(compare)
    compare.set_defaults(run=run_compare, encoding=None, seed=None)

    explore = commands.add_parser("explore", help="the same and more in the browser, patch by patch")
    explore.add_argument("folder", metavar="RUN", nargs="?", help="run folder (default a small model that comes with sape2)")
    explore.add_argument("--against", metavar="RUN2", help="another run on the same images, to set beside it")
    explore.add_argument("--port", metavar="N", help="(default the first free one from 7860)")
    explore.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default 127.0.0.1: this machine alone)")
    explore.add_argument("--data", metavar="DIR", help="where the images lie now, if not where they were")
    explore.add_argument("--weights", choices=["last", "best"], default="last", help="(default last)")
    explore.set_defaults(run=run_explore)

    report = commands.add_parser("report", help="many runs in one table and one set of figures")
    report.add_argument(
        "folders",
        metavar="RUN",
        nargs="+",
        help="run folders (those that differ in the seed only share a line), or the rows.jsonl of sape2 compare",
    )
    report.add_argument("--baseline", metavar="NAME", help="for rows.jsonl: what to compare with (default the first encoding)")
    report.add_argument("--measures", metavar="A,B", help="which to show (default all that any run has)")
    report.add_argument("--split", choices=["test", "validation"], default="test", help="(default test)")
    report.add_argument("--weights", choices=["last", "best"], default="last", help="(default last)")
    report.add_argument("--out", default="runs/report", metavar="DIR", help="for tables and figures (default runs/report)")
    _add_json(report)
    report.set_defaults(run=run_report)

    probe = commands.add_parser("probe", help="train small models on a controlled task, and measure where that holds")
    probe.add_argument("task", metavar="TASK", help="see: sape2 list probes")
    probe.add_argument("--encodings", default=PROBE_ENCODINGS, metavar="A,B", help=f"(default {PROBE_ENCODINGS})")
    probe.add_argument("--seeds", default="3", metavar="N", help="seeds 0 to N - 1 (default 3)")
    probe.add_argument("--layers", default="2", metavar="N,…", help="(default 2)")
    probe.add_argument("--steps", metavar="N", help="updates of each model (default: what the task says)")
    probe.add_argument("--out", metavar="DIR", help="for results.jsonl and the figure (default runs/probe-TASK)")
    probe.add_argument("--examples", metavar="FILE", help="only draw some scenes of every split, into a picture")
    _add_json(probe)
    probe.set_defaults(run=run_probe)

    cost = commands.add_parser("cost", help="what encodings cost: operations, time, memory, growth with the grid")
    cost.add_argument("--encodings", default=COST_ENCODINGS, metavar="A,B", help=f"(default {COST_ENCODINGS})")
    cost.add_argument("--grids", default="8x8,14x14,24x24", metavar="HxW,…", help="token grids (default 8x8,14x14,24x24)")
    cost.add_argument("--batches", default="4", metavar="N,…", help="images at once (default 4)")
    cost.add_argument(
        "--dtypes", default="fp32", metavar="A,B", help="fp32, bf16, fp16; the last two are autocast (default fp32)"
    )
    scope = cost.add_mutually_exclusive_group()
    scope.add_argument("--model", default="vit_small", metavar="NAME", help="see: sape2 list models (default vit_small)")
    scope.add_argument("--attention-only", action="store_true", help="q, k, v to output only, with the heads of vit_small")
    cost.add_argument("--repeats", default="7", metavar="N", help="rounds of timing after two of warm-up (default 7)")
    cost.add_argument("--threads", metavar="N", help="processor threads (default: what PyTorch chooses)")
    cost.add_argument("--out", default="runs/cost", metavar="DIR", help="for results.jsonl and figures (default runs/cost)")
    _add_json(cost)
    cost.set_defaults(run=run_cost)

    export = commands.add_parser("export", help="write a trained model for other programs, and check the file")
    export.add_argument("folder", metavar="RUN", help="run folder of sape2 train")
    formats = ["onnx", "pt2", "safetensors", "hub"]
    export.add_argument("--format", choices=formats, required=True, help="hub is a folder with a model card")
    export.add_argument("--out", metavar="FILE", help="(default RUN/export/NAME.FORMAT)")
    export.add_argument("--size", metavar="HxW", help="a graph for this image size alone, positions as constants (default any)")
    export.add_argument("--weights", choices=["last", "best"], default="last", help="(default last)")
    export.add_argument("--normalize", action="store_true", help="mean and std go into the graph: it takes pixels / 255")
    _add_json(export)
    export.set_defaults(run=run_export)

    list_ = commands.add_parser("list", help="what there is to choose from")
    list_.add_argument("what", choices=["encodings", "models", "recipes", "measures", "probes"])
    _add_json(list_)
    list_.set_defaults(run=run_list)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output instead of a table")


# --- train -----------------------------------------------------------------------------------------------------------


def run_train(arguments: argparse.Namespace) -> int:
    config = resolve(arguments)
    from sape2.processes import joined

    with joined() as processes:
        if processes.is_main:
            return _train(config, arguments, processes)
        from sape2.running import help_to_train

        return help_to_train(config, processes)


def _train(config: RunConfig, arguments: argparse.Namespace, processes: Processes) -> int:
    folder = Path(arguments.out or Path("runs") / default_name(config))
    from sape2.checkpoint import check_run, is_finished, read_rows, standing
    from sape2.claim import Watcher

    if not arguments.dry_run:
        check_run(folder, config)
    from sape2.data import load_data
    from sape2.runs import build_model, draw, is_measured

    if not arguments.dry_run and is_finished(folder) and is_measured(folder):
        _say(f"{folder} is finished; choose another --out or --seed for a new run")
        figures = sorted((folder / "figures").glob("*.png"))
        return _show_results(read_rows(folder / "results.jsonl"), folder, arguments.json, figures)
    model = build_model(config)
    splits = load_data(config.data, config.model)
    if arguments.dry_run:
        return _dry_run(model, splits, config, arguments.json)
    from sape2.running import run_to_end
    from sape2.train import TrainingStopped

    with Watcher().wait(folder, standing(folder), say=_say) as claim:
        try:
            rows = run_to_end(model, splits, config, claim, processes=processes)
        except TrainingStopped as stopped:
            _say(f"sape2: {stopped}")
            return 128 + stopped.signal_number
    return _show_results(rows, folder, arguments.json, _draw(lambda: draw(folder, splits)))


def resolve(arguments: argparse.Namespace) -> RunConfig:
    """The recipe with the options of the command applied, --set last."""
    from sape2.recipes import get_recipe

    config = get_recipe(arguments.recipe)
    if arguments.model is not None:
        config = replace(config, model=_resized(config.model, arguments.model))
    if arguments.encoding is not None:
        config = replace(config, model=replace(config.model, encoding=arguments.encoding))
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=arguments.data))
    if arguments.seed is not None:
        config = replace(config, seed=arguments.seed)
    if arguments.epochs is not None:
        config = with_epochs(config, arguments.epochs)
    return override(config, arguments.set)


def _resized(model: ModelConfig, name: str) -> ModelConfig:
    """The recipe's model in another size: only the name, width, depth, heads and MLP ratio change."""
    size = model_config(name)
    return replace(model, name=name, dim=size.dim, depth=size.depth, num_heads=size.num_heads, mlp_ratio=size.mlp_ratio)


def default_name(config: RunConfig | DetectionConfig) -> str:
    encoding = re.sub(r"[^\w+=.-]+", "_", config.model.encoding)
    return f"{config.recipe}-{config.model.name}-{encoding}-s{config.seed}"


def _dry_run(model: ViT, splits: Splits, config: RunConfig, as_json: bool) -> int:
    from sape2.augment import TrainStream
    from sape2.evaluation.accuracy import quick_accuracy
    from sape2.evaluation.cost import count_macs, count_parameters
    from sape2.evaluation.timing import median_seconds
    from sape2.train import Trainer, mixed_precision

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
    from sape2.report import print_json, print_table

    if as_json:
        print_json([{"config": config.to_dict()} | summary])
    else:
        print(config.to_json())
        print_table(({"what": name, "value": value} for name, value in summary.items()), ["what", "value"], "dry run")
    return 0


# --- compare ---------------------------------------------------------------------------------------------------------


def run_compare(arguments: argparse.Namespace) -> int:
    from sape2.costing import split_encodings
    from sape2.study import Stopped, Study, forget_failures, work

    config = resolve(arguments)
    folder = Path(arguments.out or Path("runs") / f"compare-{config.recipe}-{config.model.name}")
    seeds = _whole_number("--seeds", arguments.seeds)
    study = Study(config, split_encodings(arguments.encodings), seeds, folder)
    baseline = arguments.baseline or study.encodings[0]
    if baseline not in study.encodings:
        raise ValueError(f"--baseline must be one of the --encodings, {', '.join(study.encodings)}; got {baseline!r}")
    study.check()
    from sape2.data import load_data
    from sape2.progress import study_progress
    from sape2.runs import build_model
    from sape2.train import catch_signals

    for cell in study.cells()[: len(study.encodings)]:
        build_model(cell.config)  # a mistake in one of them is told before the first is trained
    splits = load_data(config.data, config.model)
    study.start()
    if arguments.retry_failed:
        forget_failures(study)
    with catch_signals() as caught, study_progress(study) as shown:
        try:
            rows = work(study, _run_cell(splits, shown), shown.tell, caught)
            status = int(any("failed" in row for row in rows))
        except Stopped as stopped:
            _say(f"sape2: {stopped}")
            rows, status = study.gather(), 128 + stopped.signal_number
    if any(row["encoding"] == baseline for row in rows):
        _show_outcome(rows, baseline, folder, arguments.json)
    return status


def _run_cell(splits: Splits, shown: StudyProgress) -> Run:
    """What `sape2 train` does with one cell, without a bar of its own."""
    from sape2.augment import TrainStream
    from sape2.running import run_to_end
    from sape2.runs import build_model
    from sape2.study import Stopped
    from sape2.train import TrainingStopped

    def run(cell: StudyCell, claim: Claim) -> None:
        config = cell.config
        total = TrainStream(splits.train, config.augment, config.train, config.seed).total_steps
        try:
            run_to_end(build_model(config), splits, config, claim, True, lambda progress: shown.step(progress, total))
        except TrainingStopped as stopped:
            raise Stopped(stopped.signal_number) from stopped

    return run


def _show_outcome(rows: list[Row], baseline: str | None, folder: Path, as_json: bool) -> None:
    """Tables and figures of raw rows, into the folder and for the reader."""
    from sape2.comparison import WEIGHTS
    from sape2.outcome import COST_HEADINGS, accuracy_columns, accuracy_table, cost_table, draw_outcome, outcome, write_outcome
    from sape2.report import print_json, print_table

    found = outcome(rows, baseline)
    files = write_outcome(found, folder)
    if found.finished:
        files += _draw(lambda: draw_outcome(found, folder))
    if as_json:
        print_json(found.rows())
        return
    for weights, title in WEIGHTS.items():
        print_table(accuracy_table(found, weights), accuracy_columns(found), f"test accuracy, {title}")
    print_table(cost_table(found), ["encoding", *COST_HEADINGS.values()], "cost")
    for row in found.failed:
        print(f"failed: {row['encoding']} seed {row['seed']}: {row['failed']}")
    print(f"in {folder}: {', '.join(path.name for path in files)}")


# --- detect ----------------------------------------------------------------------------------------------------------


def run_detect(arguments: argparse.Namespace) -> int:
    from sape2.recipes.coco import get_detection_recipe

    config = get_detection_recipe(arguments.recipe)
    model, detector, images = config.model, config.detector, config.images
    if arguments.model is not None:
        model = _resized(model, arguments.model)
    if arguments.encoding is not None:
        model = replace(model, encoding=arguments.encoding)
    if arguments.masks:
        detector = replace(detector, masks=True)
    if arguments.data is not None:
        images = replace(images, source=arguments.data)
    seed = config.seed if arguments.seed is None else arguments.seed
    config = override(replace(config, model=model, detector=detector, images=images, seed=seed), arguments.set)
    folder = Path(arguments.out or Path("runs") / default_name(config))
    from sape2.detection import run_detection
    from sape2.report import print_json, print_table

    rows = run_detection(config, folder)
    if arguments.json:
        print_json(rows)
    else:
        print_table(
            rows, ["name", "value", "unit", "n", "objects", "protocol"], f"{config.images.name}, {config.model.encoding}"
        )
        print(f"in {folder}: results.jsonl, metrics.jsonl")
    return 0


# --- evaluate --------------------------------------------------------------------------------------------------------


def run_evaluate(arguments: argparse.Namespace) -> int:
    from sape2.checkpoint import read_config

    folder = Path(arguments.folder)
    config = read_config(folder)
    measures = _chosen_measures(arguments.measures)
    limit = None if arguments.limit is None else _whole_number("--limit", arguments.limit)
    _check_finished(folder, config)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=arguments.data))
    from sape2.data import load_data
    from sape2.runs import draw, draw_measures, measure

    splits = load_data(config.data, config.model)
    with _watching() as watch:
        rows = measure(folder, splits, measures, arguments.split, [arguments.weights], limit, watch)
    whole = "accuracy" in measures and limit is None  # confusion is of all images
    files = _draw(lambda: [*draw_measures(folder, rows), *(draw(folder, splits) if whole else ())])
    return _show_results(rows, folder, arguments.json, files)


def _check_finished(folder: Path, config: RunConfig) -> None:
    from sape2.checkpoint import is_finished, last_checkpoint

    if not is_finished(folder):
        at = last_checkpoint(folder)
        raise ValueError(
            f"the run in {folder} is not finished ({at.name if at else 'no checkpoint yet'} of its "
            f"{config.train.epochs} epochs); give its sape2 train command again to go on"
        )


def _chosen_measures(text: str) -> list[str]:
    from sape2.evaluation import MEASURES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; known measures: {', '.join(MEASURES)}")
    return names


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[str, int, bool], None]]:
    """Progress on standard error: in a terminal a line a measure that counts its rows, elsewhere one when it is done."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def watch(name: str, rows: int, finished: bool) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None)
            progress.update(tasks[name], completed=rows, total=rows if finished else None)
            if finished and not console.is_terminal:
                _say(f"{name}: {rows} rows, {progress.tasks[tasks[name]].elapsed:.0f} s")

        yield watch


def _draw(draw: Callable[[], list[Path]]) -> list[Path]:
    """The files that `draw` wrote; none, and a line that says why, without matplotlib."""
    try:
        return draw()
    except ImportError as error:
        _say(f"no figures: {error}")
        return []


# --- explain ---------------------------------------------------------------------------------------------------------


def run_explain(arguments: argparse.Namespace) -> int:
    patches = tuple(_patch(text) for text in arguments.patch)
    from sape2.explain import Choice, explain

    choice = Choice(arguments.layer, arguments.head, patches)
    out = None if arguments.out is None else Path(arguments.out)
    written, rows = explain(Path(arguments.folder), Path(arguments.image), out, choice, arguments.weights)
    from sape2.report import print_json, print_table

    if arguments.json:
        print_json(rows)
        return 0
    likely = [row for row in rows if row["name"] == "probability"]
    print_table(
        ({"class": row["class"], "probability": row["value"]} for row in likely), ["class", "probability"], arguments.image
    )
    for row in rows:
        if "message" in row:
            print(row["message"])
    print(f"written: {written}")
    return 0


def _patch(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"--patch must be ROW,COLUMN, whole numbers from 0, such as 3,5; got {text!r}")
    return int(match[1]), int(match[2])


# --- explore ---------------------------------------------------------------------------------------------------------


def run_explore(arguments: argparse.Namespace) -> int:
    port = None if arguments.port is None else _whole_number("--port", arguments.port)
    folder, against = (None if text is None else Path(text) for text in (arguments.folder, arguments.against))
    from sape2.explore import explore

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        explore(folder, against, arguments.host, port, arguments.data, arguments.weights, _say)
    return 0


# --- report ----------------------------------------------------------------------------------------------------------


def run_report(arguments: argparse.Namespace) -> int:
    if any(name.endswith(".jsonl") for name in arguments.folders):
        return _report_raw(arguments)
    if arguments.baseline is not None:
        raise ValueError("--baseline is for the rows.jsonl of sape2 compare; run folders are not compared in pairs")
    measures = None if arguments.measures is None else _chosen_measures(arguments.measures)
    from sape2.comparison import compare, write_figures, write_tables
    from sape2.headlines import read_runs
    from sape2.report import print_json, print_table

    runs, unfinished = read_runs(map(Path, arguments.folders), arguments.split, arguments.weights)
    comparison = compare(runs, measures, arguments.split, arguments.weights)
    for folder in unfinished:
        _say(f"left out: the run in {folder} is not finished")
    folder = Path(arguments.out)
    files = write_tables(comparison, folder)
    files += _draw(lambda: write_figures(comparison, folder))
    if arguments.json:
        print_json(comparison.rows())
        return 0
    for part in comparison.headings(most=6):  # what a terminal is wide enough for
        print_table(comparison.table(), part, comparison.title)
    for note in comparison.notes():
        print(note)
    print(f"in {folder}: {', '.join(path.name for path in files)}")
    return 0


def _report_raw(arguments: argparse.Namespace) -> int:
    """The tables of sape2 compare from raw rows alone."""
    from sape2.rawrows import each_once, read_raw

    if not all(name.endswith(".jsonl") for name in arguments.folders):
        raise ValueError("give run folders, or files of raw rows, not both")
    rows = each_once(row for name in arguments.folders for row in read_raw(Path(name)))
    if not rows:
        raise ValueError(f"there are no rows in {', '.join(arguments.folders)}")
    _show_outcome(rows, arguments.baseline, Path(arguments.out), arguments.json)
    return 0


# --- probe -----------------------------------------------------------------------------------------------------------


def run_probe(arguments: argparse.Namespace) -> int:
    from sape2.probes import find_task

    task = find_task(arguments.task)
    if arguments.examples is not None:
        return _draw_examples(arguments.task, Path(arguments.examples))
    from sape2.probing import draw_results, table
    from sape2.report import print_json, print_table

    cells, folder = _probe_cells(arguments), Path(arguments.out or Path("runs") / f"probe-{arguments.task}")
    rows = _run_probes(cells, folder)
    figures = _draw(lambda: [draw_results(rows, task, folder / "figures" / "probe.png")])
    if arguments.json:
        print_json(rows)
        return 0
    lines, (encoding, layers, seeds, *splits) = table(rows, task)
    title = f"{arguments.task}: accuracy by split (chance), mean ± standard deviation over seeds"
    for start in range(0, len(splits), 4):  # what a terminal is wide enough for
        print_table(lines, [encoding, layers, seeds, *splits[start : start + 4]], title)
    print(f"in {folder}: {', '.join(['results.jsonl', *(f'figures/{path.name}' for path in figures)])}")
    return 0


def _draw_examples(task: str, path: Path) -> int:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--examples needs a file that ends in .png, .svg or .pdf; got {str(path)!r}")
    from sape2.probing import draw_examples

    draw_examples(task, path)
    print(f"written: {path}")
    return 0


def _probe_cells(arguments: argparse.Namespace) -> list[ProbeCell]:
    """Seed by seed, so that a stop leaves whole comparisons."""
    from sape2.costing import split_encodings
    from sape2.probing import Cell

    steps = None if arguments.steps is None else _whole_number("--steps", arguments.steps)
    return [
        Cell(arguments.task, encoding, seed, layers, steps)
        for layers in dict.fromkeys(_whole_number("--layers", text) for text in arguments.layers.split(","))
        for seed in range(_whole_number("--seeds", arguments.seeds))
        for encoding in split_encodings(arguments.encodings)
    ]


def _run_probes(cells: list[ProbeCell], folder: Path) -> list[Row]:
    """All rows, with a progress bar on standard error; where there is no terminal, a line for each cell."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from sape2.probing import run_cells

    console, rows = Console(stderr=True), []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=sum(cell.key["steps"] for cell in cells))
        done = 0
        for number, (cell, found) in enumerate(run_cells(cells, folder, lambda: progress.advance(bar)), start=1):
            rows += found
            done += cell.key["steps"]
            text = f"{number}/{len(cells)} {cell.encoding}, seed {cell.seed}, {cell.layers} layers: {found[0]['value']:.3f}"
            progress.update(bar, completed=done, description=text)
            if not console.is_terminal:
                _say(text)
    return rows


# --- cost ------------------------------------------------------------------------------------------------------------


def run_cost(arguments: argparse.Namespace) -> int:
    from sape2.cost_rows import count_table, time_table
    from sape2.report import print_json, print_table

    sweep, folder = _sweep(arguments), Path(arguments.out)
    rows, tables = [], {}
    for cell, found in _with_progress(sweep, folder / "results.jsonl"):
        rows += found
        if cell is not None:
            tables[f"{cell}: for one image"] = count_table(found)
            tables[f"{cell}: measured"] = time_table(found)
    _draw_cost(rows, folder)
    if arguments.json:
        print_json(rows)
        return 0
    for title, lines in tables.items():
        print_table(lines, list(lines[0]), title)
    growth = [row for row in rows if row["name"].endswith("_growth") and row["timed_as"] == row["encoding"]]
    if growth:
        columns = ["name", "encoding", "level", "dtype", "batch", "grid", "value"]
        print_table(growth, columns, "growth: exponent of the number of tokens")
    print(f"in {folder}: results.jsonl, cost_time.png, cost_memory.png")
    return 0


def _sweep(arguments: argparse.Namespace) -> Sweep:
    import torch

    from sape2.costing import LEVELS, Sweep, parse_grid, split_encodings

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if arguments.threads is not None:
        torch.set_num_threads(_whole_number("--threads", arguments.threads))
    return Sweep(
        encodings=split_encodings(arguments.encodings),
        grids=tuple(parse_grid(text) for text in arguments.grids.split(",")),
        batches=tuple(_whole_number("--batches", text) for text in arguments.batches.split(",")),
        dtypes=tuple(text.strip() for text in arguments.dtypes.split(",")),
        model=arguments.model,
        levels=LEVELS[:1] if arguments.attention_only else LEVELS,
        repeats=_whole_number("--repeats", arguments.repeats),
        device=accelerator or torch.device("cpu"),
    )


def _whole_number(option: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
        raise ValueError(f"{option} needs whole numbers from 1 on; got {text.strip()!r}")
    return int(text)


def _with_progress(sweep: Sweep, path: Path) -> Iterator[tuple[Cell | None, list[Row]]]:
    """The rows of the sweep as they come, with a progress bar on standard error."""
    import torch
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from sape2.costing import run_sweep
    from sape2.runs import hardware

    conditions = {"torch": torch.__version__, "hardware": hardware(), "threads": torch.get_num_threads()}
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=sweep.rounds)
        for cell, rows in run_sweep(sweep, path, conditions, lambda: progress.advance(task)):
            progress.update(task, description=f"measured {cell}" if cell else "done")
            yield cell, rows


def _draw_cost(rows: list[Row], folder: Path) -> None:
    from sape2.cost_rows import lines_of_growth

    try:
        from sape2.viz import plot_growth

        plot_growth(lines_of_growth(rows, "ms"), folder / "cost_time.png", "time (ms)")
        plot_growth(lines_of_growth(rows, "memory"), folder / "cost_memory.png", "peak extra memory (MiB)")
    except ImportError as error:
        _say(f"no figures: {error}")


# --- export ----------------------------------------------------------------------------------------------------------


def run_export(arguments: argparse.Namespace) -> int:
    from sape2.checkpoint import read_config

    folder, size = Path(arguments.folder), None if arguments.size is None else _image_size(arguments.size)
    config = read_config(folder)
    _check_finished(folder, config)
    if size is not None:
        check_image_size(size, config.model.patch_size)
    from sape2.export import ParityError, export_run, needed

    needed(arguments.format)
    out = None if arguments.out is None else Path(arguments.out)
    options = {"size": size, "weights": arguments.weights, "normalize": arguments.normalize}
    try:
        path, rows = export_run(folder, arguments.format, out, **options)
    except ParityError as error:
        _show_parity(error.rows, arguments)
        _say(f"sape2: {error}")
        return 1
    _show_parity([row | {"file": str(path)} for row in rows], arguments)
    if not arguments.json:
        print(f"written: {path}")
    return 0


def _image_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    if not found:
        raise ValueError(f"--size needs HxW in pixels, for example 32x48; got {text!r}")
    return int(found[1]), int(found[2])


def _show_parity(rows: list[Row], arguments: argparse.Namespace) -> None:
    """How the logits of the file differ from those of the model, for each number and size of images."""
    from sape2.report import print_json, print_table

    if arguments.json:
        print_json(row | {"format": arguments.format} for row in rows)
        return
    table = [row | {key: f"{row[key]:.1e}" for key in ("max_abs_difference", "tolerance")} for row in rows]
    columns = ["batch", "height", "width", "max_abs_difference", "tolerance", "largest_logit", "agrees"]
    print_table(table, columns, f"{arguments.format} against the model")


# --- list ------------------------------------------------------------------------------------------------------------


def run_list(arguments: argparse.Namespace) -> int:
    tables = {"encodings": _encodings, "models": _models, "recipes": _recipes, "measures": _measures, "probes": _probes}
    rows = tables[arguments.what]()
    from sape2.report import print_json, print_table

    if arguments.json:
        print_json(rows)
    elif arguments.what == "encodings":
        for title, table in _encoding_tables(rows).items():
            print_table(table, list(table[0]), title)
    else:
        print_table(rows, list(rows[0]), arguments.what)
    return 0


def _encodings() -> list[Row]:
    """One row an encoding, with its options (the default first), and one for each of its variants."""
    from sape2.encodings import Schedule, find_encoding, list_encodings
    from sape2.encodings.base import AttentionEncoding, describe_options

    rows = []
    for name in list_encodings():
        encoding = find_encoding(name)
        in_attention = issubclass(encoding, AttentionEncoding)
        about = {"slot": "attention" if in_attention else "tokens", "source": encoding.source}
        options = describe_options(encoding.Options) | (describe_options(Schedule) if in_attention else {})
        rows.append({"name": name, "summary": encoding.summary} | about | {"options": options})
        rows += [{"name": f"{name}:{variant}", "summary": text} | about for variant, text in encoding.variants.items()]
    return rows


def _encoding_tables(rows: list[Row]) -> dict[str, list[Row]]:
    """The same for people: encodings, variants, and options by encoding."""
    plain = [row for row in rows if "options" in row]
    return {
        "encodings": [{key: row[key] for key in ("name", "slot", "summary", "source")} for row in plain],
        "variants worth comparing": [{"name": row["name"], "summary": row["summary"]} for row in rows if row not in plain],
        "options": [
            {"name": row["name"], "option": option, "values, the default first": values}
            for row in plain
            for option, values in row["options"].items()
        ],
    }


def _models() -> list[Row]:
    columns = ("name", "dim", "depth", "num_heads", "mlp_ratio")
    return [dict(zip(columns, (name, *sizes), strict=True)) for name, sizes in MODELS.items()]


def _recipes() -> list[Row]:
    from sape2.recipes import RECIPES
    from sape2.recipes.coco import DETECTION_RECIPES

    found: list[tuple[Any, ModelConfig, str, int]] = []
    for recipe in RECIPES.values():
        config = recipe()
        found.append((recipe, config.model, config.data.name, config.train.epochs))
    for recipe in DETECTION_RECIPES.values():
        config = recipe()
        found.append((recipe, config.model, config.images.name, config.training.epochs))
    return [
        {
            "name": recipe.__name__,
            "model": model.name,
            "data": data,
            "epochs": epochs,
            "summary": " ".join((recipe.__doc__ or "").split("\n\n")[0].split()),
        }
        for recipe, model, data, epochs in found
    ]


def _measures() -> list[Row]:
    from sape2.evaluation import MEASURES

    return [{"name": name, "summary": (measure.__doc__ or "").split("\n")[0]} for name, measure in MEASURES.items()]


def _probes() -> list[Row]:
    from sape2.probes import TASKS

    return [{"name": name, "summary": task.summary, "splits": ", ".join(task.splits)} for name, task in TASKS.items()]


# --- output ----------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _show_results(rows: list[Row], folder: Path, as_json: bool, figures: list[Path]) -> int:
    from sape2.report import print_json

    if as_json:
        print_json(rows)
        return 0
    for measure in dict.fromkeys(row["measure"] for row in rows):
        _print_measure([row for row in rows if row["measure"] == measure])
    print(f"in {folder}: {', '.join(['results.jsonl', 'metrics.jsonl', *(f'figures/{path.name}' for path in figures)])}")
    return 0


def _print_measure(rows: list[Row]) -> None:
    """One line a number with what it was measured at, one column for the weights it was measured with."""
    from sape2.report import print_table

    first = rows[0]
    title = f"{first['data']}, {first['model']}, {first['encoding']}, {first['epochs']} epochs, seed {first['seed']}"
    details = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in CONDITIONS]
    table: dict[tuple, Row] = {}
    for row in rows:
        line = {key: row.get(key, "") for key in ("name", *details, "split")}
        line_of = table.setdefault(tuple(line.values()), line | {"n": row["n"], "unit": row["unit"]})
        line_of[COLUMNS[row["weights"]]] = row["value"]
    used = [heading for weights, heading in COLUMNS.items() if any(row["weights"] == weights for row in rows)]
    print_table(table.values(), ["name", *details, *used, "unit", "n", "split"], title)


if __name__ == "__main__":
    raise SystemExit(main())
