"""Does an encoding help a ViT that is already trained? Fine-tuning with it against the same fine-tuning without it.

Command:  python examples/attach_to_a_trained_vit.py RUN [RUN ...] --data DIR [--encoding sape2] [--epochs 5] [--seeds 3]
          [--images N]
          RUN is a finished run folder, for example of `sape2 train cifar10_budget --data DIR --encoding ape`; N is the
          number of training images to fine-tune on, all by default.

For every run and seed there are three arms, which see the same images in the same order:

    without    everything is trained on, nothing attached: what more training alone gives
    encoding   the encoding is attached, and it alone is trained
    all        the encoding is attached, and everything is trained

The learning rates of each arm are fixed beforehand (LR, rates) and the test set is looked at once, after the last epoch. A seed
decides the order and the augmentation; the spread over seeds says nothing about other trained models, for which give
several runs. Each arm writes its own run folder and one row in OUT/results.jsonl when it is done; the same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sape2 import attach, save_adapter
from sape2.config import RunConfig, TrainConfig
from sape2.data import Splits, load_data
from sape2.evaluation.accuracy import quick_accuracy
from sape2.models.vit import ViT
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.studies.compare.paired import paired_difference
from sape2.studies.compare.summary import grouped, summarize
from sape2.tables import print_table
from sape2.training.interruption import Stopped
from sape2.training.loop import train

LR = {"without": 2e-4, "encoding": 5e-3, "all": 2e-4}  # a tenth of cifar10_budget's for weights that are trained already


def rates(arm: str, train: TrainConfig) -> dict[str, float | None]:
    """A tenth of the other rates of a run, too, where it has them; what is new learns alone at its own."""
    tenths = {name: rate and rate / 10 for name, rate in (("muon_lr", train.muon_lr), ("encoding_lr", train.encoding_lr))}
    return {"lr": LR[arm]} | (tenths if arm != "encoding" else tenths | {"encoding_lr": None})


def fine_tune(run: Run[RunConfig], arm: str, tuned: Run[RunConfig], encoding: str, splits: Splits) -> ViT:
    """The model of a run, trained on in one arm; taken up from the folder of that if it has been done."""
    model = ViT(run.config.model)
    run.load(model)
    torch.manual_seed(tuned.config.seed)  # of the new tables
    if arm != "without":
        attach(model, encoding, trainable="encoding" if arm == "encoding" else "all")
    if tuned.state == "finished":
        tuned.load(model)
    else:
        train(model, splits.train, lambda trained: quick_accuracy(trained, splits.validation), tuned)
    if arm != "without":
        save_adapter(model, tuned.folder / "adapter")
    return model


def measure(run: Run[RunConfig], arm: str, seed: int, options: argparse.Namespace) -> dict:
    """One row: test accuracy after fine-tuning, and before."""
    config, name = run.config, run.folder.name
    data = replace(
        config.data, source=options.data or config.data.source, train_limit=options.images or config.data.train_limit
    )
    splits, before = trained(run, replace(config, data=data))
    warmup = min(1.0, options.epochs / 5)
    schedule = replace(config.train, epochs=options.epochs, min_lr=1e-5, warmup_epochs=warmup, **rates(arm, config.train))
    tuned = replace(config, recipe=f"attach_{arm}", seed=seed, train=schedule, data=data)
    model = fine_tune(run, arm, Run(options.out / f"{name}-{arm}-s{seed}", tuned), options.encoding, splits)
    accuracy, loss = quick_accuracy(model, splits.test)
    return {
        "name": "accuracy",
        "value": accuracy,
        "unit": "fraction",
        "n": len(splits.test),
        "protocol": "top-1, one view, last epoch of fine-tuning",
        "loss": loss,
        "before": before,
        "run": name,
        "arm": arm,
        "seed": seed,
        "encoding": options.encoding,
        "trained_with": config.model.encoding,
        "model": config.model.label,
        "data": config.data.name,
        "epochs": options.epochs,
        "images": len(splits.train),
        "lr": LR[arm],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "torch": torch.__version__,
    }


@functools.cache
def trained(run: Run[RunConfig], config: RunConfig) -> tuple[Splits, float]:
    """The images, and the test accuracy of the run before any fine-tuning."""
    splits = load_data(config.data, config.model)
    model = ViT(config.model)
    run.load(model)
    return splits, quick_accuracy(model, splits.test)[0]


def show(rows: list[dict]) -> None:
    """Each arm, and its difference to `without` in pairs of the same run and seed."""
    arms = grouped(rows, by=["arm"], pair=["run", "seed"])
    table = []
    for arm, found in summarize(arms).items():
        line = {"arm": arm, "test accuracy": found.mean, "std": found.std}
        if pair := paired_difference(arms[arm], arms.get("without", {})):
            table.append(line | {"difference to without": pair.difference, "std of it": pair.std, "pairs": pair.n})
    before = statistics.mean(row["before"] for row in rows)
    print_table(table, list(table[0]), f"{rows[0]['encoding']} in a trained {rows[0]['model']}; before: {before:.4f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", metavar="DIR", help="where the images lie now, if not where they were")
    parser.add_argument("--encoding", default="sape2", metavar="NAME")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--images", type=int, metavar="N", help="training images to fine-tune on (default all)")
    parser.add_argument("--out", type=Path, default=Path("runs/attach"), metavar="DIR")
    options = parser.parse_args(arguments)
    path = options.out / "results.jsonl"
    for run in map(Run.open_finished, options.runs):
        for seed in range(options.seeds):
            for arm in LR:
                rows = read_rows(path)
                if any((row["run"], row["seed"], row["arm"]) == (run.folder.name, seed, arm) for row in rows):
                    continue
                try:
                    write_rows(path, [*rows, measure(run, arm, seed, options)])
                except Stopped as stopped:
                    print(stopped, file=sys.stderr)
                    return 128 + stopped.signal_number
    show(read_rows(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
