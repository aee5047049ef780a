"""The files in figures/ of a run folder: its training, its answers, the bias of one test image, and its measures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from sape2 import viz
from sape2.config import RunConfig
from sape2.data import Splits
from sape2.evaluation.accuracy import confusion, predict
from sape2.evaluation.base import images_taken
from sape2.evaluation.runs import Row, describe, in_words
from sape2.inspect.explain import as_picture
from sape2.inspect.explanation import explained
from sape2.models.trained import Load, load_run_model
from sape2.models.vit import ViT
from sape2.runs.files import safe_name
from sape2.runs.run import Run


def pictures(run: Run[RunConfig], images: Callable[[], Splits], load: Load | None = None) -> dict[Path, Callable[[], Path]]:
    """figures/: training curves, confusion of the test set, and the bias of one test image in every layer that has one.

    Each file with what draws it, apart from the others. `images` and `load`, which gives the models, are asked once, by the
    first that needs them.
    """
    config, figures = run.config, run.folder / "figures"
    about = in_words(describe(run))
    model, splits = cache(partial(load or partial(load_run_model, run), "last")), cache(images)

    def curves(path: Path) -> None:
        viz.plot_curves({config.model.encoding: run.epochs()}, path, about)

    def confused(path: Path) -> None:
        test = splits().test
        counts = confusion(predict(model(), test), test.labels)
        viz.plot_confusion(counts, test.classes, path, f"{config.model.encoding}, {about}; test set, last weights")

    def bias(path: Path) -> None:
        first = splits().test[:1]
        notes = f"the first of the test set, labelled {first.classes[int(first.labels[0])]}"
        as_picture(explained(model(), config, first.images[0], list(first.classes), "First test image", notes)).save(path)

    draws = {"curves": curves, "confusion": confused}
    with torch.device("meta"):
        made = ViT(config.model)
    if any(getattr(module, "makes_bias", False) for module in made.modules()):
        draws["bias"] = bias
    return {figures / f"{name}.png": partial(_drawn, draw, figures / f"{name}.png") for name, draw in draws.items()}


def _drawn(draw: Callable[[Path], None], path: Path) -> Path:
    draw(path)
    return path


def draw_measures(folder: Path, rows: list[Row]) -> list[Path]:
    """figures/: the curves of one measure's rows; names say which split, weights and images if not test, last, own.

    Those of fewer images than the measure takes by itself have the number in their names, and do not replace the others.
    """
    first = rows[0]
    limit, measure, usual = first["limit"], first["measure"], {"split": "test", "weights": "last", "other_data": None}
    ending = "".join(f"-{safe_name(first[key])}" for key in usual if first.get(key) != usual[key])
    some = ""
    if limit is not None:
        ending += f"-{limit}_images" if limit < images_taken(measure, None, limit + 1) else ""
        some = f", {limit:,} images drawn by class"
    notes = viz.Notes(about=f"{in_words(first)}; {first['split']} set, {first['weights']} weights{some}")
    return viz.plot_measures({first["encoding"]: rows}, [measure], folder / "figures", ending, notes)
