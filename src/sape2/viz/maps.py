"""Pictures of one image: the bias between its patches, what a patch counts, the bias against distance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from sape2.viz.base import LINES, MAP_COLOURS, pyplot, save


def plot_bias(
    image: UInt8[Tensor, "channels height width"],
    layers: list[Float[Tensor, "heads tokens tokens"]],
    grid: tuple[int, int],
    patch: tuple[int, int],
    path: Path,
    titles: list[str],
) -> None:
    """The bias of one patch (y, x) against all others, mean over heads, for every given layer."""
    plt = pyplot()
    height, width = grid
    figure, axes = plt.subplots(1, len(layers) + 1, figsize=(2.4 * (len(layers) + 1) + 0.8, 2.8))
    axes[0].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
    size = image.shape[-2] // height, image.shape[-1] // width
    corner = patch[1] * size[1] - 0.5, patch[0] * size[0] - 0.5
    axes[0].add_patch(plt.Rectangle(corner, size[1], size[0], fill=False, edgecolor=LINES[1], linewidth=2))
    axes[0].set_title("image and patch", fontsize=9)
    for panel, bias, title in zip(axes[1:], layers, titles, strict=True):
        values = bias.mean(0)[patch[0] * width + patch[1]].view(height, width)
        shown = panel.imshow(values.numpy(), cmap=MAP_COLOURS)
        panel.plot(patch[1], patch[0], "s", color=LINES[1], markersize=5)
        panel.set_title(title, fontsize=9)
        figure.colorbar(shown, ax=panel, fraction=0.046)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle("bias of the marked patch against all patches (logits, mean over heads)", fontsize=10)
    save(figure, path)


def plot_pairs(
    image: UInt8[Tensor, "channels height width"],
    layers: dict[str, Float[Tensor, "tokens tokens"]],
    grid: tuple[int, int],
    patches: dict[str, tuple[int, int]],
    path: Path,
    quantity: str = "bias (logits)",
    columns: int = 6,
) -> None:
    """Figure 4 of the paper: what the layers give between all patches, and from each named patch (y, x) to all others.

    One column a layer, `columns` of them beside each other at most; one colour scale for all maps of a layer.
    """
    plt = pyplot()
    blocks = _blocks(list(layers), columns)
    rows, width = 1 + len(patches), 1 + max(map(len, blocks))
    figure = plt.figure(figsize=(1.75 * width + 0.4, len(blocks) * (1.75 * rows + 0.9)), layout="constrained")
    for block, part in zip(blocks, np.atleast_1d(figure.subfigures(len(blocks), 1)), strict=True):
        axes = part.subplots(rows, width, squeeze=False)
        for panel in axes.flat:
            panel.set_xticks([])
            panel.set_yticks([])
        _mark(axes[0, 0], image, grid, patches)
        axes[0, 0].set_title("image", fontsize=9)
        for row, (name, patch) in enumerate(patches.items(), start=1):
            _mark(axes[row, 0], image, grid, {name: patch})
            axes[row, 0].set_ylabel(f"from the {name}\n(row {patch[0]}, column {patch[1]})", fontsize=8)
        for column, name in enumerate(block, start=1):
            _pair_column(axes[:, column], layers[name], grid, list(patches.values()), name, quantity)
        for panel in axes[:, 1 + len(block) :].flat:
            panel.set_axis_off()
    save(figure, path)


def _blocks(names: list[str], columns: int) -> list[list[str]]:
    """As few rows of at most `columns` as can be, of about equal length."""
    width = math.ceil(len(names) / math.ceil(len(names) / columns))
    return [names[start : start + width] for start in range(0, len(names), width)]


def _pair_column(
    panels: Any, pairs: Tensor, grid: tuple[int, int], patches: list[tuple[int, int]], title: str, quantity: str
) -> None:
    """All pairs, then one map for each patch, over one colour bar."""
    values = pairs.double().numpy()
    limits = {"vmin": values.min(), "vmax": max(values.max(), values.min() + 1e-9), "cmap": MAP_COLOURS}
    shown = panels[0].imshow(values, **limits)
    panels[0].set_title(f"{title}\nall {len(values)} x {len(values)} pairs", fontsize=9)
    for panel, (y, x) in zip(panels[1:], patches, strict=True):
        panel.imshow(values[y * grid[1] + x].reshape(grid), **limits)
        panel.add_patch(_frame(x - 0.5, y - 0.5, 1.0, 1.0, LINES[1]))
    bar = panels[0].figure.colorbar(shown, ax=list(panels), location="bottom", shrink=0.9, aspect=18, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(quantity, fontsize=8)


def _mark(panel: Any, image: Tensor, grid: tuple[int, int], patches: dict[str, tuple[int, int]]) -> None:
    """The image with frames around patches."""
    panel.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    height, width = image.shape[-2] / grid[0], image.shape[-1] / grid[1]
    for y, x in patches.values():
        panel.add_patch(_frame(x * width - 0.5, y * height - 0.5, width, height, LINES[1]))
    panel.set_xticks([])
    panel.set_yticks([])


def _frame(x: float, y: float, width: float, height: float, colour: str) -> Any:
    """A coloured frame that stands out from dark and from light."""
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    frame = Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=2, clip_on=False, zorder=3)
    frame.set_path_effects([patheffects.Stroke(linewidth=3.5, foreground="white"), patheffects.Normal()])
    return frame


def plot_counts(
    image: UInt8[Tensor, "channels height width"],
    maps: dict[str, dict[str, Float[Tensor, "heads _"]]],
    grid: tuple[int, int],
    patch: tuple[int, int],
    path: Path,
    title: str,
) -> None:
    """What one patch counts: its gates and its positions along each axis, one line a head.

    `maps` is {"x": {"gates": ..., "positions": ...}, "y": ...}; a position that is read twice (counts from both ends) has
    twice as many places. Above each axis stand the patches that are counted, in order.
    """
    plt = pyplot()
    heads, places = (max(found["gates"].shape[side] for found in maps.values()) for side in (0, 1))
    in_lines = all(axis in ("x", "y") for axis in maps)
    heights = (3.4 / places if in_lines else 1.2, 0.5 + 0.22 * heads, 0.5 + 0.22 * heads)
    figure, axes = plt.subplots(
        3, len(maps), figsize=(4.8 * len(maps), 0.8 + sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    for column, (axis, found) in zip(axes.T, maps.items(), strict=True):
        _strip(column[0], image, grid, patch, axis)
        length = _length(grid, axis)
        _heads(column[1], found["gates"], length, 1.0, "gate")
        _heads(column[2], found["positions"], length, None, "position (table rows)")
        column[1].set_title(f"gates along {AXIS_NAMES.get(axis, axis)}", fontsize=9)
        twice = ", once from each end" if found["positions"].shape[1] > length else ""
        column[2].set_title(f"positions along {AXIS_NAMES.get(axis, axis)}{twice}", fontsize=9)
        column[2].set_xlabel("place on the line", fontsize=8)
    save(figure, path)


def _heads(panel: Any, maps: Tensor, length: int, largest: float | None, unit: str) -> None:
    """One line a head, one cell a place, the number in the cell where there is room."""
    values = maps.double().numpy()
    largest = largest or max(values.max(), 1e-9)
    shown = panel.imshow(values, cmap=MAP_COLOURS, aspect="auto", vmin=0, vmax=largest)
    panel.set_yticks(range(len(values)), [str(head + 1) for head in range(len(values))])
    if values.shape[1] <= 16:
        panel.set_xticks(range(values.shape[1]), [str(place % length) for place in range(values.shape[1])])
        for head, place in np.ndindex(*values.shape):
            colour = "black" if values[head, place] > 0.6 * largest else "white"
            panel.text(
                place, head, f"{values[head, place]:.2f}"[:4].rstrip("."), ha="center", va="center", fontsize=6, color=colour
            )
    panel.tick_params(labelsize=7)
    panel.set_ylabel("head", fontsize=8)
    bar = panel.figure.colorbar(shown, ax=panel)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(unit, fontsize=8)


AXIS_NAMES = {"x": "the row", "y": "the column", "raster": "the raster order", "sequence": "the raster order"}


def _length(grid: tuple[int, int], axis: str) -> int:
    return {"x": grid[1], "y": grid[0]}.get(axis, grid[0] * grid[1])


def _strip(panel: Any, image: Tensor, grid: tuple[int, int], patch: tuple[int, int], axis: str) -> None:
    """The patches of the line that is counted, side by side; the whole image where that is all of it."""
    if axis not in ("x", "y"):
        _mark(panel, image, grid, {"patch": patch})
        return
    height, width = image.shape[-2] // grid[0], image.shape[-1] // grid[1]
    line = [(patch[0], place) if axis == "x" else (place, patch[1]) for place in range(_length(grid, axis))]
    for place, (y, x) in enumerate(line):
        tile = image[:, y * height : (y + 1) * height, x * width : (x + 1) * width].permute(1, 2, 0).squeeze(-1).numpy()
        panel.imshow(tile, cmap="gray", vmin=0, vmax=255, extent=(place - 0.45, place + 0.45, 0.45, -0.45))
    panel.add_patch(_frame(line.index(patch) - 0.45, -0.45, 0.9, 0.9, LINES[1]))
    panel.set(xlim=(-0.5, len(line) - 0.5), ylim=(0.5, -0.5), aspect="auto")
    panel.set_frame_on(False)
    panel.set_title(f"the patches of {AXIS_NAMES[axis]}, {'left to right' if axis == 'x' else 'top to bottom'}", fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])


def plot_distance(
    layers: dict[str, Float[Tensor, "maps tokens tokens"]],
    grid: tuple[int, int],
    path: Path,
    quantity: str = "bias (logits)",
    columns: int = 6,
) -> None:
    """Each layer's bias (or attention) against the distance of the two patches: mean and standard deviation of all pairs."""
    plt = pyplot()
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    apart = np.hypot(y[:, None] - y, x[:, None] - x)
    bins = np.round(apart).astype(int)
    blocks = _blocks(list(layers), columns)
    rows, width = len(blocks), len(blocks[0])
    figure, axes = plt.subplots(
        rows,
        width,
        figsize=(2.1 * width + 0.8, 2.1 * rows + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[len(layers) :]:
        panel.set_axis_off()
    for panel, (name, maps) in zip(axes.flat, layers.items(), strict=False):  # the last row may be longer
        groups = [maps[:, bins == step].double().numpy() for step in range(bins.max() + 1)]
        mean, spread = (np.array([statistic(group) for group in groups]) for statistic in (np.mean, np.std))
        panel.plot(range(len(groups)), mean, color=LINES[0], marker="o", markersize=3)
        panel.fill_between(range(len(groups)), mean - spread, mean + spread, color=LINES[0], alpha=0.2, linewidth=0)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelbottom=True, labelsize=8)
        panel.grid(alpha=0.3)
    figure.supxlabel("distance of the two patches (patches, rounded); band: one standard deviation of the pairs", fontsize=8)
    axes[0, 0].set_ylabel(quantity, fontsize=8)
    save(figure, path)
