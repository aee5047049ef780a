"""A run folder taken up again: its model, the rows measured on it, its figures. What the commands share."""

from __future__ import annotations

import filecmp
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sape2 import viz
from sape2.data import ImageData, ImageFiles, Splits
from sape2.data.labels import first_of
from sape2.evaluation import MEASURES
from sape2.evaluation.accuracy import confusion, predict
from sape2.models.trained import WEIGHTS, load_run_model
from sape2.training.files import safe_name
from sape2.training.memory_errors import in_evaluation, told_in_one_line
from sape2.training.run_folder import check_images, own_results, read_config, read_rows, update_results

Row = dict[str, Any]
MEASURE_OTHERS = "measure these with sape2 evaluate RUN --data DIR --other-data NAME"


def measure(
    folder: Path,
    splits: Splits,
    measures: list[str],
    split: str,
    weights: list[str],
    limit: int | None = None,
    watch: Callable[[str, int, bool], None] = lambda name, rows, finished: None,
    other_data: str | None = None,
) -> list[Row]:
    """Rows of the named measures, each with the conditions it was measured under; also put into results.jsonl.

    Weights that lie in two files (the last epoch was the best one) are measured once, and have rows under both names.
    `limit` images (None: what each measure takes by default). `watch` is told the measure, how many rows it has given so
    far, and whether it has finished. `other_data` names images that are not the run's own: their rows say so. Raises
    PermissionError before it measures if rows could not be written, ValueError for other images without a name, OutOfMemory.
    """
    if other_data is None:
        check_images(folder, splits.train.fingerprint, MEASURE_OTHERS)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{folder} cannot be written to, and rows go into its results.jsonl; measure a copy of the folder"
        )
    data: ImageData | ImageFiles = getattr(splits, split)
    images = len(data) if limit is None else min(limit, len(data))
    rows: list[Row] = []
    for which in weights:
        twin = next((name for name in weights[: weights.index(which)] if _same_file(folder, name, which)), None)
        if twin is not None:
            found = [row | {"weights": which} for row in rows if row["weights"] == twin]
            update_results(folder, found)
            rows += found
            continue
        model = load_run_model(folder, which)
        conditions = describe(folder) | {"split": split, "weights": which}
        conditions |= {} if other_data is None else {"data": other_data, "other_data": other_data}
        for name in measures:
            watch(name, 0, False)
            found = []
            with told_in_one_line(partial(in_evaluation, name, model.config, images)):
                for row in MEASURES[name](model, data, limit):
                    found.append(row | conditions)
                    watch(name, len(found), False)
            update_results(folder, found)  # at once, so that a later measure cannot lose it
            watch(name, len(found), True)
            rows += found
    return rows


def notes_of_others(data: ImageData | ImageFiles, classes: Sequence[str], name: str) -> list[str]:
    """What to tell those who measure other images: whether classes go by number, and which of the run's are not among them."""
    notes = [] if data.classes == tuple(classes) else [f"{name} has no names of classes: its labels go by number"]
    there = set(data.labels.tolist())
    missing = [known for number, known in enumerate(classes) if number not in there]
    if missing:
        found = f"{len(classes) - len(missing)} of the {len(classes)} classes of the run"
        notes.append(f"{name} has {found}, and none of {first_of(missing)}")
    return notes


def _same_file(folder: Path, *weights: str) -> bool:
    paths = [folder / WEIGHTS[name] for name in weights]
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def is_measured(folder: Path) -> bool:
    """Whether results.jsonl holds what `train` ends with: the test set with both weights."""
    rows = own_results(folder)
    return set(WEIGHTS) <= {row.get("weights") for row in rows if row.get("split") == "test"}


def describe(folder: Path) -> Row:
    """What a number was measured on, for every result row; precision is that of the training."""
    config = read_config(folder)
    epochs = read_rows(folder / "metrics.jsonl")
    return {
        "encoding": config.model.encoding,
        "model": config.model.label,
        "data": config.data.name,
        "recipe": config.recipe,
        "epochs": config.train.epochs,
        "seed": config.seed,
        "precision": epochs[-1].get("precision") if epochs else None,
        "torch": torch.__version__,
        "hardware": hardware(),
    }


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU x{os.cpu_count()}"


def draw(folder: Path, splits: Splits) -> list[Path]:
    """figures/: training curves, confusion of the test set, and the bias of one patch in every layer that has one."""
    config, figures, model = read_config(folder), folder / "figures", load_run_model(folder)
    written = [figures / "curves.png", figures / "confusion.png"]
    viz.plot_curves({config.model.encoding: read_rows(folder / "metrics.jsonl")}, written[0], _about(describe(folder)))
    logits = predict(model, splits.test, 500)
    counts = confusion(logits, splits.test.labels)
    viz.plot_confusion(counts, splits.test.classes, written[1])
    image = splits.test[:1]
    device = next(model.parameters()).device
    layers = model.maps(next(image.batches(1))[0].to(device))
    biased = {f"layer {i + 1}": maps["bias"][0].detach().float().cpu() for i, maps in enumerate(layers) if "bias" in maps}
    if biased:
        height, width = config.model.grid
        patch = (height // 2, width // 2)
        written.append(figures / "bias.png")
        true, answer = (image.classes[int(label)] for label in (image.labels[0], logits[0].argmax()))
        about = f"first test image: class {true}, predicted {answer}"
        viz.plot_bias(image.images[0], list(biased.values()), (height, width), patch, written[2], list(biased), about)
    return written


def draw_measures(folder: Path, rows: list[Row]) -> list[Path]:
    """figures/: the curves of the rows just measured; names say which split, weights and images if not test, last, own."""
    usual = {"split": "test", "weights": "last", "other_data": None}
    ending = "".join(f"-{safe_name(rows[0][key])}" for key in usual if rows[0].get(key) != usual[key])
    measures = dict.fromkeys(row["measure"] for row in rows)
    about = f"{_about(rows[0])}; {rows[0]['split']} set, {rows[0]['weights']} weights"
    return viz.plot_measures({rows[0]["encoding"]: rows}, measures, folder / "figures", ending, viz.Notes(about=about))


def _about(row: Row) -> str:
    return f"{row['model']}, {row['data']}, {row['epochs']} epoch{'s' * (row['epochs'] != 1)}"
