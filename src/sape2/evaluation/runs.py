"""Loads a finished run to measure it: its model and the rows measured on it, for several commands."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sape2.config import RunConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.data import ImageData, ImageFiles, Splits
from sape2.data.labels import first_of
from sape2.evaluation.base import images_taken
from sape2.evaluation.measures import MEASURES
from sape2.machine import hardware
from sape2.models.trained import Load, load_run_model
from sape2.runs.run import Run, trained_in
from sape2.tables import Row
from sape2.training.memory_errors import ON_CPU, memory_message, told_in_one_line

MEASURE_OTHERS = "measure these with sape2 evaluate RUN --data DIR --other-data NAME"


def measure(
    run: Run[RunConfig],
    splits: Splits,
    measures: list[str],
    split: str,
    weights: list[str],
    limit: int | None = None,
    watch: Callable[[str, int, bool], None] = lambda name, rows, finished: None,
    other_data: str | None = None,
    load: Load | None = None,
) -> list[Row]:
    """Rows of the named measures, each with the conditions it was measured under; also put into results.jsonl.

    Weights that lie in two files (the last epoch was the best one) are measured once, and have rows under both names.
    `limit` images (None: what each measure takes by default), drawn by class; rows carry it where there are more, and never
    take the place of rows over more images. `watch` is told the measure, how many rows it has given so
    far, and whether it has finished. `other_data` names images that are not the run's own: their rows say so. `load` gives the
    models to a caller that uses them again. Raises ValueError for other images without a name, OutOfMemory.
    """
    if other_data is None:
        run.check_images(splits.train.fingerprint, MEASURE_OTHERS)
    data: ImageData | ImageFiles = getattr(splits, split)
    rows: list[Row] = []
    for which in weights:
        twin = next((name for name in weights[: weights.index(which)] if _same_file(run, name, which)), None)
        if twin is not None:
            found = [row | {"weights": which} for row in rows if row["weights"] == twin]
            run.add_results(found)
            rows += found
            continue
        model = load(which) if load else load_run_model(run, which)
        conditions = describe(run) | {"split": split, "weights": which}
        conditions |= {} if other_data is None else {"data": other_data, "other_data": other_data}
        for name in measures:
            watch(name, 0, False)
            found, taken = [], images_taken(name, limit, len(data))
            reach = {"limit": taken if taken < len(data) else None}
            what = f"in the measure {name} of {taken} images at the training size"
            ways, then = ("--limit with fewer images", ON_CPU), "what was measured before is kept. Try"
            with told_in_one_line(partial(memory_message, what, model.config, ways, then)):
                for row in MEASURES[name](model, data, limit):
                    found.append(row | conditions | reach)
                    watch(name, len(found), False)
            run.add_results(found)  # at once, so that a later measure cannot lose it
            watch(name, len(found), True)
            rows += found
    return rows


def notes_of_others(data: ImageData | ImageFiles, classes: Sequence[str], name: str) -> list[str]:
    """Notes for measuring other images: labels that go by number, and classes of the run that are missing from them."""
    notes = [] if data.classes == tuple(classes) else [f"{name} has no names of classes: its labels go by number"]
    there = set(data.labels.tolist())
    missing = [known for number, known in enumerate(classes) if number not in there]
    if missing:
        found = f"{len(classes) - len(missing)} of the {len(classes)} classes of the run"
        notes.append(f"{name} has {found}, and none of {first_of(missing)}")
    return notes


def _same_file(run: Run[RunConfig], *weights: str) -> bool:
    paths = [run.weights(name) for name in weights]
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def describe(run: Run[RunConfig]) -> Row:
    """The description of a run that every result row carries; precision is that of the training."""
    config = run.config
    return {
        "encoding": config.model.encoding,
        "model": config.model.label,
        "data": config.data.name,
        "recipe": config.recipe,
        "epochs": config.train.epochs,
        "seed": config.seed,
        "changed": changed_in_words(config),
        "precision": trained_in(run.epochs()),
        "torch": torch.__version__,
        "hardware": hardware(),
    }


def in_words(row: Row) -> str:
    """Model, data, epochs and changed settings of a row, for a title."""
    changed = f", {row['changed']}" if row.get("changed") else ""
    return f"{row['model']}, {row['data']}, {row['epochs']} epoch{'s' * (row['epochs'] != 1)}{changed}"
