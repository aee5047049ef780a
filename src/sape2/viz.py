"""Pictures. Each function takes data and a file name, and writes the file; colours can be told apart by everyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

MAP_COLOURS = "cividis"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'sape2[viz]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, bbox_inches="tight", format=path.suffix[1:])
    temporary.replace(path)
    _pyplot().close(figure)


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and accuracy against the epoch, for the metrics.jsonl rows of each named run."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    panels = (("loss", "validation_loss", "cross-entropy (nats)"), ("accuracy", "validation_accuracy", "accuracy"))
    for panel, (train, validation, label) in zip(axes, panels, strict=True):
        for index, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            colour = LINES[index % len(LINES)]
            panel.plot(epochs, [row[validation] for row in rows], color=colour, label=f"{name}, validation")
            panel.plot(epochs, [row[train] for row in rows], color=colour, linestyle=":", label=f"{name}, training")
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    axes[0].set_title("training targets are smoothed and mixed, so their loss is higher", fontsize=8, loc="left")
    _save(figure, path)


def plot_confusion(counts: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Rows: the true class; columns: the model's answer; shades: the share of the row."""
    plt = _pyplot()
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    figure, panel = plt.subplots(figsize=(0.5 * len(classes) + 2, 0.5 * len(classes) + 1.5))
    image = panel.imshow(share.numpy(), cmap=MAP_COLOURS, vmin=0, vmax=1)
    panel.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    panel.set_yticks(range(len(classes)), classes)
    panel.set_xlabel("answer")
    panel.set_ylabel("true class")
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "black" if share[row, column] > 0.6 else "white"
                panel.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=panel, label="share of the true class", fraction=0.046)
    _save(figure, path)


def plot_bias(
    image: UInt8[Tensor, "channels height width"],
    layers: list[Float[Tensor, "heads tokens tokens"]],
    grid: tuple[int, int],
    patch: tuple[int, int],
    path: Path,
    titles: list[str],
) -> None:
    """The bias of one patch (y, x) against all others, mean over heads, for every given layer."""
    plt = _pyplot()
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
    _save(figure, path)


def plot_growth(panels: dict[str, dict[str, list[tuple[int | float, int | float]]]], path: Path, label: str) -> None:
    """Points (tokens, value) of every named line, one panel a title, both axes logarithmic; grey: growth with N and N^2."""
    plt = _pyplot()
    figure, grid = plt.subplots(1, max(1, len(panels)), figsize=(4.6 * max(1, len(panels)) + 2.2, 4.2), squeeze=False)
    for panel, (title, lines) in zip(grid[0], panels.items(), strict=False):
        for index, (name, points) in enumerate(lines.items()):
            style = {"color": LINES[index % len(LINES)], "linestyle": ("-", "--", ":")[index // len(LINES) % 3]}
            panel.plot(*zip(*sorted(points), strict=True), marker="os^vDP*X"[index % 8], markersize=4, label=name, **style)
        _mark_slopes(panel, [point for points in lines.values() for point in points])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens N")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    handles = {name: handle for panel in grid[0] for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    _save(figure, path)


def _mark_slopes(panel: Any, points: list[tuple[int | float, int | float]]) -> None:
    """Thin lines of growth with N and with N^2 from the lowest point at the smallest N."""
    first, last = min(points), max(x for x, _ in points)
    for power, style in ((1, ":"), (2, "-.")):
        ends = [first[1], first[1] * (last / first[0]) ** power]
        panel.plot([first[0], last], ends, style, color="#999999", linewidth=1, label=f"growth with N{'²' * (power == 2)}")
