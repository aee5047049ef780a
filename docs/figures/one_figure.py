"""The figure of the front page: every step of SaPE2 for one patch of a photograph, by the encoding itself.

Command:  python docs/figures/one_figure.py      (writes docs/figures/one_figure.png)

Nothing is trained here. A query and its key are six numbers of a patch, the mean and the spread of its colours, so that
one can see what the gates answer to; the tables are drawn as before training. The photograph is china.jpg of scikit-learn
(danielbuechele, CC BY 2.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from sape2.encodings import SaPE2
from sape2.encodings.grid import Grid
from sape2.viz.base import LINES, MAP_COLOURS, pyplot, save

PATCH = 40
TABLE_STD = 0.2  # ten times that of the paper: curves that can be seen with six numbers a patch
HERE, THERE = (3, 10), (3, 5)  # (row, column): sky, and the tower in the same row
WIDTH, FONT = 7.0, 10  # inches and points: the smallest text is 9 pixels high where the figure is 500 wide
OUT = Path(__file__).with_name("one_figure.png")


def photograph() -> tuple[Tensor, Grid]:
    """A photograph of whole patches, (height, width, 3) from 0 to 1, and its grid."""
    pixels = torch.tensor(load_sample_image("china.jpg")).double() / 255
    grid = (pixels.shape[0] // PATCH, pixels.shape[1] // PATCH)
    return pixels[: grid[0] * PATCH, : grid[1] * PATCH], grid


def features(pixels: Tensor, grid: Grid) -> Tensor:
    """Mean and spread of the three colours of every patch, each standardised over the photograph, (1, 1, N, 6)."""
    patches = pixels.unflatten(1, (grid[1], PATCH)).unflatten(0, (grid[0], PATCH)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    numbers = torch.cat([patches.mean(2), patches.std(2)], dim=-1).flatten(0, 1)  # (N, 6)
    return ((numbers - numbers.mean(0)) / numbers.std(0))[None, None]


def draw() -> None:
    plt = pyplot()
    torch.manual_seed(0)
    pixels, grid = photograph()
    encoding = SaPE2(num_heads=1, head_dim=6, grid=grid, table_std=TABLE_STD).double().eval()
    q = features(pixels, grid)
    with torch.no_grad():
        maps = {name: value[0, 0] for name, value in encoding.maps(q, q, grid).items()}
    here, there = (row * grid[1] + column for row, column in (HERE, THERE))
    curve = (q[0, 0, here] @ encoding.table_x.T).detach()

    plt.rcParams.update({"font.size": FONT, "axes.titlesize": FONT + 1, "axes.titlelocation": "left"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 2, figsize=(WIDTH, 1.12 * WIDTH), layout="constrained")
    draw_photograph(axes[0, 0], pixels, grid)
    draw_gates(axes[0, 1], maps["gates_x"][here], pixels)
    draw_positions(axes[1, 0], maps["positions_x"][here])
    draw_reading(axes[1, 1], curve, maps["positions_x"][here])
    draw_vectors(axes[2, 0], maps["vectors_x"][here], maps["vectors_x"][there])
    draw_bias(figure, axes[2, 1], maps["bias"][here].view(grid))
    save(figure, OUT)
    Image.open(OUT).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(OUT, optimize=True)


def mark(axis: Any, place: tuple[int, int], colour: str, label: str, size: float) -> None:
    """A patch filled with its colour, and its letter."""
    row, column = place
    axis.add_patch(pyplot().Rectangle((column * size, row * size), size, size, facecolor=colour, edgecolor="white"))
    style = {"color": "white", "ha": "center", "va": "center_baseline", "weight": "bold"}
    axis.text((column + 0.5) * size, (row + 0.5) * size, label, **style)


def draw_photograph(axis: Any, pixels: Tensor, grid: Grid) -> None:
    axis.imshow(pixels)
    for x in range(grid[1] + 1):
        axis.axvline(x * PATCH - 0.5, color="white", linewidth=0.5, alpha=0.5)
    for y in range(grid[0] + 1):
        axis.axhline(y * PATCH - 0.5, color="white", linewidth=0.5, alpha=0.5)
    axis.axhspan(HERE[0] * PATCH, (HERE[0] + 1) * PATCH, color="white", alpha=0.45)
    mark(axis, HERE, LINES[0], "i", PATCH)
    mark(axis, THERE, LINES[1], "n", PATCH)
    axis.set_title("1  Patches i and n and their row")
    axis.set_axis_off()


def draw_gates(axis: Any, gates: Tensor, pixels: Tensor) -> None:
    strip = pixels[HERE[0] * PATCH : (HERE[0] + 1) * PATCH]
    axis.bar(range(len(gates)), gates, color=LINES[0])
    axis.imshow(strip, extent=(-0.5, len(gates) - 0.5, -0.13, -0.02), aspect="auto")
    axis.set(
        xlim=(-0.5, len(gates) - 0.5), ylim=(-0.15, 1.02), xlabel="column j", ylabel="gate", xticks=range(0, len(gates), 5)
    )
    axis.set_title("2  Gates of patch i along its row")


def draw_positions(axis: Any, positions: Tensor) -> None:
    columns = range(len(positions))
    axis.plot(columns, [len(positions) - column for column in columns], "--", color="grey", label="all gates 1")
    axis.plot(columns, positions, "o-", color=LINES[0], markersize=4, label="gates of i")
    axis.set(xlabel="column m", ylabel="position", ylim=(0, len(positions) + 0.5))
    axis.set(xticks=range(0, len(positions), 5), yticks=range(0, len(positions) + 1, 4))
    axis.legend(frameon=False, loc="upper right", fontsize=FONT)
    axis.set_title("3  Positions: sums of gates")


def draw_reading(axis: Any, curve: Tensor, positions: Tensor) -> None:
    low = positions.floor().long().clamp(max=len(curve) - 2)
    values = curve[low] + (positions - low) * (curve[low + 1] - curve[low])
    axis.plot(range(len(curve)), curve, "s-", color="grey", markersize=4, label="table rows")
    axis.plot(positions, values, "o", color=LINES[0], markersize=5, label="positions of 3")
    axis.set(xlabel="position p", ylabel="query · table")
    axis.set_ylim(top=2.0)
    axis.legend(frameon=False, loc="upper right", fontsize=FONT)
    axis.set_title("4  Table, interpolated")


def draw_vectors(axis: Any, here: Tensor, there: Tensor) -> None:
    distance = float((here - there).norm())
    axis.fill_between(range(len(here)), here, there, color="grey", alpha=0.25, linewidth=0)
    axis.plot(here, "o-", color=LINES[0], markersize=4, label="i")
    axis.plot(there, "o-", color=LINES[1], markersize=4, label="n")
    axis.set(xlabel="column m", ylabel="value", xticks=range(0, len(here), 5))
    axis.legend(frameon=False, loc="upper left", fontsize=FONT)
    axis.set_title(f"5  Position vectors, distance {distance:.1f}")


def draw_bias(figure: Any, axis: Any, bias: Tensor) -> None:
    image = axis.imshow(bias, cmap=MAP_COLOURS, extent=(0, bias.shape[1], bias.shape[0], 0))
    mark(axis, HERE, LINES[0], "i", 1)
    mark(axis, THERE, LINES[1], "n", 1)
    figure.colorbar(image, ax=axis, shrink=0.7, label="logits")
    axis.set_title("6  Bias of i: both axes")
    axis.set_axis_off()


if __name__ == "__main__":
    draw()
