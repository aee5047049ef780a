"""The confusion matrix of a test set, and the pairs of classes that are confused most often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sape2.viz.base import MAP_COLOURS, as_text, picture, put_title, save, shortened, subplots

NAMED = 20  # classes whose names and numbers of images have room in the matrix
LISTED = 15  # pairs


@picture
def plot_confusion(counts: Tensor, classes: tuple[str, ...], path: Path, about: str = "") -> None:
    """Rows: true classes; columns: predicted classes; colours: fraction of the row. Beside it the pairs confused most.

    Fits a screen whatever the number of classes. `about` is the title: model, images and weights.
    """
    classes = tuple(map(as_text, classes))
    images = counts.double().numpy()
    share = images / images.sum(1, keepdims=True).clip(min=1)
    figure, (panel, beside) = subplots(1, 2, figsize=(9.2, 5.6), width_ratios=[1.75, 1])
    from matplotlib.colors import PowerNorm

    shown = panel.imshow(share, cmap=MAP_COLOURS, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if len(classes) <= NAMED:
        _name_classes(panel, classes)
        _write_images(panel, images, share)
    else:
        panel.set_xlabel(f"predicted class (0 to {len(classes) - 1})")
        panel.set_ylabel(f"true class (0 to {len(classes) - 1})")
    figure.colorbar(shown, ax=panel, label="fraction of the true class (square-root scale)", fraction=0.046)
    _list_pairs(beside, worst_pairs(images), classes, images.sum(1))
    put_title(figure, about)
    save(figure, path)


def worst_pairs(images: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the most frequent errors, the most frequent first."""
    wrong = images * (1 - np.eye(len(images)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [(int(true), int(predicted)) for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [(*pair, int(images[pair])) for pair in pairs if wrong[pair]]


def _name_classes(panel: Any, classes: Sequence[str]) -> None:
    names = shortened(classes, 16)
    upright = max(map(len, names)) <= 2
    panel.set_xticks(range(len(classes)), names, fontsize=8, **({} if upright else {"rotation": 60, "ha": "right"}))
    panel.set_yticks(range(len(classes)), names, fontsize=8)
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class (numbers: images)")


def _write_images(panel: Any, images: np.ndarray, share: np.ndarray) -> None:
    for row, column in np.argwhere(images):
        ink = "black" if share[row, column] > 0.36 else "white"  # 0.6 of the square-root scale
        panel.text(column, row, int(images[row, column]), ha="center", va="center", fontsize=7, color=ink)


def _list_pairs(panel: Any, pairs: Sequence[tuple[int, int, int]], classes: Sequence[str], totals: np.ndarray) -> None:
    """One line a pair: the images, their share of the true class, both classes."""
    panel.set_axis_off()
    panel.set_title("most frequent errors: true → predicted" if pairs else "no errors", fontsize=9, loc="left")
    names = shortened(classes, 15)
    if len(classes) > NAMED:
        names = [f"{at} {name}" for at, name in enumerate(names)]
    for line, (true, predicted, images) in enumerate(pairs):
        place, style = 0.97 - line / LISTED, {"transform": panel.transAxes, "fontsize": 8, "va": "top", "clip_on": False}
        panel.text(0.16, place, f"{images} ({images / totals[true]:.0%})", ha="right", **style)
        panel.text(0.2, place, f"{names[true]} → {names[predicted]}", **style)
