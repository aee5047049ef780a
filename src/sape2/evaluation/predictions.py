"""Predictions of a finished run for image files without labels, with the pixels and the batches of `sape2 evaluate`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from sape2.config import RunConfig
from sape2.data.base import plain_name
from sape2.data.files import LooseFiles
from sape2.data.picture import Picture, Unlike, unlike
from sape2.data.walk import image_files
from sape2.evaluation.accuracy import predict
from sape2.evaluation.base import Row
from sape2.models.trained import load_run_model
from sape2.runs.run import Run
from sape2.training.memory_errors import ON_CPU, memory_message, told_in_one_line


@dataclass
class Predictions:
    """Rows of file, class and probability (and rank); why files could not be read; in what images are unlike the training's."""

    rows: list[Row] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    unlike: dict[str, list[Unlike]] = field(default_factory=dict)

    def kinds(self) -> dict[str, int]:
        """The kinds of difference from the training images, with the number of images, most frequent first."""
        return dict(Counter(found.kind for each in self.unlike.values() for found in each).most_common())


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, and of folders the image files below them, each once.

    Raises FileNotFoundError for a path that is not there, ValueError if nothing was found.
    """
    found: list[Path] = []
    named = list(map(Path, paths))
    for path in named:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {plain_name(path)}")
        found += image_files(path) if path.is_dir() else [path]
    if not found:
        raise ValueError(
            f"there is no image in {', '.join(map(plain_name, named))}; a file of another ending can be named itself"
        )
    once: dict[Path, Path] = {}
    for path in found:  # however it is spelled
        once.setdefault(path.parent.resolve() / path.name, path)
    return list(once.values())


def predict_files(
    run: Run[RunConfig],
    files: Sequence[Path],
    top: int = 1,
    weights: str = "last",
    watch: Callable[[int], None] = lambda tried: None,
) -> Predictions:
    """The `top` most likely classes of each file (all, if the model has fewer), in the order of `files`.

    Pixels and batches are those of `sape2 evaluate`; images are decoded a batch at a time. Files that cannot be read have no
    rows. `watch` is told how many files were tried. Raises ValueError or OSError if the run cannot be used.
    """
    config, model = run.config, load_run_model(run, weights)
    trained, predictions = run.image_sizes, Predictions()

    def look(file: Path, picture: Picture) -> None:
        if found := unlike(picture, config.data, trained):
            predictions.unlike[plain_name(file)] = found

    images = LooseFiles(files, config.data, config.model, look, watch)
    with told_in_one_line(lambda: memory_message("with one image", config.model, [ON_CPU])), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused, and named
        logits = predict(model, images)
    predictions.unreadable = {plain_name(file): images.unreadable[file] for file in files if file in images.unreadable}
    readable = [file for file in files if file not in images.unreadable]
    predictions.rows = _rows(readable, logits, list(map(plain_name, run.classes)), top)
    return predictions


def _rows(files: list[Path], logits: Tensor, classes: list[str], top: int) -> list[Row]:
    likely = logits.double().softmax(1).topk(min(top, logits.shape[1]))
    rows = []
    for file, values, labels in zip(files, likely.values.tolist(), likely.indices.tolist(), strict=True):
        for rank, (value, label) in enumerate(zip(values, labels, strict=True), start=1):
            place = {"rank": rank} if top > 1 else {}
            rows.append({"file": plain_name(file)} | place | {"class": classes[label], "probability": value})
    return rows
