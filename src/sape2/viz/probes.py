"""Charts of the controlled tasks: example scenes, and the accuracy of models on each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sape2.viz.base import LETTER, LINES, legend_names, line_style, picture, put_title, save, subplots

Example = tuple[Tensor, dict[tuple[int, int], str], str]  # colours (H, W), texts in cells, caption
BACKGROUND = "#EEEEEE"
DARK = ("#0072B2", "#009E73", "#000000", "#D55E00")  # which take white text


@picture
def plot_examples(panels: dict[str, list[Example]], path: Path, title: str) -> None:
    """A row of scenes for every split. Colours carry their number as text, so that none has to be told by hue alone."""
    columns = max(len(examples) for examples in panels.values())
    heights = [max(12, *(len(colours) for colours, _, _ in examples)) / 12 for examples in panels.values()]
    size = (3.3 * columns + 0.5, sum(0.7 + 2.6 * height for height in heights))
    figure, axes = subplots(len(panels), columns, figsize=size, height_ratios=heights, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for row, (split, examples) in zip(axes, panels.items(), strict=True):
        row[0].set_ylabel(split, fontsize=10)
        for axis, example in zip(row, examples, strict=True):
            _draw_example(axis, *example)
    save(figure, path)


def _draw_example(axis: Any, colours: Tensor, texts: dict[tuple[int, int], str], caption: str) -> None:
    from matplotlib.colors import ListedColormap

    palette = [BACKGROUND, *LINES]
    height, width = colours.shape
    axis.imshow(colours, cmap=ListedColormap(palette), vmin=-0.5, vmax=len(palette) - 0.5, interpolation="nearest")
    for (y, x), text in texts.items():
        ink = "white" if palette[int(colours[y, x])] in DARK else "black"
        weight = "bold" if colours[y, x] == 0 else "normal"
        axis.text(x, y, text, ha="center", va="center", color=ink, fontsize=7 if height <= 12 else 4.5, weight=weight)
    axis.set_xticks([edge - 0.5 for edge in range(width + 1)], minor=True)
    axis.set_yticks([edge - 0.5 for edge in range(height + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    axis.set_xlabel(caption, fontsize=7)


@picture
def plot_probe(points: dict[str, dict[str, list[float]]], chance: dict[str, float], path: Path, about: str = "") -> None:
    """Accuracy by split: one point for each seed, a column of points for each encoding; dashed: chance."""
    splits = list(chance)
    names = legend_names(list(points))
    width = 1.5 * len(splits) + 2 + LETTER * max(map(len, names.values()), default=0)
    figure, axis = subplots(figsize=(width, 4.2))
    for index, (name, found) in enumerate(points.items()):
        offset = 0.8 * ((index + 0.5) / len(points) - 0.5)
        xs = [splits.index(split) + offset for split, values in found.items() for _ in values]
        ys = [value for values in found.values() for value in values]
        style = line_style(index) | {"linestyle": "none", "markersize": 5}
        axis.plot(xs, ys, alpha=0.8, label=names[name], **style)
    for place, value in enumerate(chance.values()):
        label = "chance" if place == 0 else None
        axis.plot([place - 0.45, place + 0.45], [value, value], "--", color="#666666", linewidth=1, label=label)
    axis.set_xticks(range(len(splits)), splits)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    put_title(figure, about)
    save(figure, path)
