"""`sape2 compare`: trains every encoding with every seed under one recipe and compares them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sape2.cli.options import add_json, one_name, recipe_name, resolve, split_encodings, whole_number
from sape2.cli.output import Row, say, show_comparison
from sape2.runs.files import check_writable

if TYPE_CHECKING:
    from sape2.data import Splits
    from sape2.studies.compare.launch import Slurm
    from sape2.studies.compare.plan import Study

HELP = "train encodings x seeds under one recipe, with paired differences"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="see: sape2 list recipes")
    parser.add_argument("--encodings", required=True, metavar="A,B", help="see: sape2 list encodings")
    parser.add_argument("--seeds", default="3", metavar="N", help="seeds 0 to N - 1 of every encoding (default 3)")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default the first encoding)")
    parser.add_argument("--data", metavar="DIR", help="folder (parquet, or torchvision's files) or hub id")
    parser.add_argument("--model", metavar="NAME", help="see: sape2 list models")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs (warm-up scales with it)")
    parser.add_argument("--out", metavar="DIR", help="for runs, rows and tables (default runs/compare-RECIPE-MODEL)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.lr=1e-3")
    parser.add_argument("--retry-failed", action="store_true", help="try failed runs again, from their last checkpoint")
    parser.add_argument("--launcher", choices=["slurm"], help="submit each run as a job (needs the extra cluster)")
    parser.add_argument("--jobs", metavar="N", help="number of jobs at a time (default all)")
    parser.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="e.g. partition=gpu, timeout_min=60")
    add_json(parser)
    parser.set_defaults(encoding=None, seed=None)


def run(arguments: argparse.Namespace) -> int:
    from sape2.training.processes import refuse_launcher

    refuse_launcher("sape2 compare")
    study, baseline = _study(arguments)
    check_writable(study.folder)
    jobs = whole_number("--jobs", arguments.jobs) if arguments.jobs else None
    launcher = _launcher(arguments)
    from sape2.studies.compare.outcome import outcome
    from sape2.studies.compare.work import forget_failures

    splits = _images(study)
    study.start()
    if arguments.retry_failed:
        forget_failures(study)
    rows, status = _work(study, splits, launcher, jobs)
    if any(row["encoding"] == baseline for row in rows):
        show_comparison(outcome(rows, baseline), study.folder, arguments.json)
    return status


def _study(arguments: argparse.Namespace) -> tuple[Study, str]:
    """What is trained, and the encoding that the others are compared with. Raises ValueError for what cannot be."""
    from sape2.studies.compare.plan import Study

    if any(setting.partition("=")[0].strip() in ("model.encoding", "encoding") for setting in arguments.set):
        raise ValueError("--set cannot choose the encoding of sape2 compare: every run has one of the --encodings")
    config = resolve(arguments)
    if config.train.parallel == "fsdp":
        raise ValueError(
            "train.parallel=fsdp divides the weights among several processes, and sape2 compare trains every run in one; "
            "leave it out, which changes no result"
        )
    folder = Path(arguments.out or Path("runs") / f"compare-{recipe_name(config)}-{config.model.name}")
    seeds = whole_number("--seeds", arguments.seeds)
    study = Study(config, split_encodings(arguments.encodings), seeds, folder)
    baseline = one_name(arguments.baseline) if arguments.baseline else study.encodings[0]
    if baseline not in study.encodings:
        raise ValueError(f"--baseline must be one of the --encodings, {', '.join(study.encodings)}; got {baseline!r}")
    study.check()
    return study, baseline


def _images(study: Study) -> Splits:
    """The images of all runs. A mistake in a model, or other images than before, is told before the first is trained."""
    from sape2.data import load_data
    from sape2.models.trained import build_model

    for cell in study.cells[: len(study.encodings)]:
        build_model(cell.config)
    splits = load_data(study.config.data, study.config.model)
    for cell in study.cells:
        cell.run.check_images(splits.train.fingerprint, "choose another --out for a new study")
    return splits


def _work(study: Study, splits: Splits, launcher: Slurm | None, jobs: int | None) -> tuple[list[Row], int]:
    """The rows of the runs, trained here or by jobs, and the exit status."""
    from sape2.studies.compare.progress import study_progress
    from sape2.studies.compare.work import runner, work
    from sape2.training.interruption import Stopped, catch_signals

    with catch_signals() as caught, study_progress(study) as shown:
        try:
            if launcher is None:
                rows = work(study, runner(splits, shown.step), shown.tell, caught)
            else:
                from sape2.studies.compare.launch import launch

                rows = launch(study, launcher, jobs, shown.tell, caught)
            return rows, int(any("failed" in row for row in rows))
        except Stopped as stopped:
            say(f"sape2: {stopped}")
            return study.gather(), 128 + stopped.signal_number


def _launcher(arguments: argparse.Namespace) -> Slurm | None:
    """The launcher of jobs, or None if this process does the work. Raises ValueError for options that need one."""
    if arguments.launcher is None:
        for option, value in (("--jobs", arguments.jobs), ("--slurm", arguments.slurm)):
            if value:
                raise ValueError(f"{option} needs --launcher slurm")
        return None
    from sape2.studies.compare.launch import Slurm

    return Slurm(dict(_parameter(text) for text in arguments.slurm))


def _parameter(text: str) -> tuple[str, int | str]:
    """ "timeout_min=60" -> ("timeout_min", 60)."""
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise ValueError(f"--slurm needs KEY=VALUE, e.g. --slurm partition=gpu; got {text!r}")
    return key, int(value) if value.isdecimal() else value
