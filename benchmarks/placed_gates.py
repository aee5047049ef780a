"""Do gates shut on the canvas and open on the object? Runs of gate_forms.py on the images of placed.py, layer by layer.

Command:  python benchmarks/placed_gates.py RUN [RUN ...] --data DIR     measures finished runs, on images of DIR/placed_cifar10
          python benchmarks/placed_gates.py                              prints the table
          python benchmarks/placed_gates.py RUN --data DIR --figure FILE draws the gates of one run on some test images

The mean gate that patches of the object give to patches of the object, and to those of the canvas, in their row and column,
over the heads and 500 test images. A patch of one colour counts as canvas. Rows: benchmarks/results/placed_gates.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from sprint import keep, splits_of
from timing import RESULTS, Row, conditions
from torch import Tensor

from sape2.config import RunConfig
from sape2.evaluation.base import drawn
from sape2.models.trained import load_run_model
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.compare.summary import grouped, summarize
from sape2.tables import markdown_table
from sape2.viz.base import MAP_COLOURS, save, subplots

ROWS = RESULTS / "placed_gates.jsonl"
IMAGES, SHOWN = 500, 10  # measured, drawn
CANVAS, OBJECT = "on the canvas", "on the object"


def is_canvas(images: Float[Tensor, "batch channels height width"], patch: int) -> Bool[Tensor, "batch rows columns"]:
    pixels = images.unfold(2, patch, patch).unfold(3, patch, patch).flatten(-2)  # (B, C, H, W, pixels of a patch)
    return (pixels.amax(-1) - pixels.amin(-1) < 1e-4).all(1)


def along_lines(maps: dict[str, Tensor], canvas: Bool[Tensor, "batch rows columns"]) -> tuple[Tensor, Tensor]:
    """The gates of the patch at (y, x) to those at (y, m), (B, h, H, W, W), and to those at (m, x), (B, h, H, W, H)."""
    return maps["gates_x"].unflatten(2, canvas.shape[1:]), maps["gates_y"].unflatten(2, canvas.shape[1:])


def mean_gates(maps: dict[str, Tensor], canvas: Bool[Tensor, "batch rows columns"]) -> dict[str, float]:
    """Of the gates that the patches of the object give along their row and their column."""
    by_row, by_column = along_lines(maps, canvas)
    met = (canvas[:, None, :, None, :].expand_as(by_row), canvas.mT[:, None, None].expand_as(by_column))
    of_object = ~canvas[:, None, :, :, None]
    found: dict[str, float] = {}
    for name, wanted in ((OBJECT, False), (CANVAS, True)):
        chosen = [g[(m == wanted) & of_object] for g, m in zip((by_row, by_column), met, strict=True)]
        found[name] = torch.cat(chosen).mean().item()
    return found


def gates_met(maps: dict[str, Tensor], canvas: Bool[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Of every patch the mean gate that it gets from the patches of the object in its row and in its column."""
    given = (~canvas)[:, None, :, :, None].float()
    by_row, by_column = (gates * given for gates in along_lines(maps, canvas))
    total = by_row.mean(1).sum(2) + by_column.mean(1).sum(1).mT
    return total / (given.sum(3) + given.sum(2).mT).mean(1)


def look(folder: Path, data: Path, count: int) -> tuple[Run[RunConfig], Tensor, list[dict[str, Tensor]]]:
    """A finished run, its first test images and their maps."""
    run = Run.open_finished(folder)
    run = Run(folder, replace(run.config, data=replace(run.config.data, source=str(data / run.config.data.name))))
    images = torch.cat([some for some, _ in drawn(splits_of(run).test, count).batches(count)])
    with torch.no_grad():
        return run, images, load_run_model(run, "last").maps(images)


def draw(folder: Path, data: Path, file: Path) -> None:
    """Test images, and below each the gates that its patches get in layer 3."""
    run, images, layers = look(folder, data, SHOWN)
    met = gates_met(layers[2], is_canvas(images, run.config.model.patch_size))
    mean, std = (torch.tensor(values)[:, None, None] for values in (run.config.data.mean, run.config.data.std))
    figure, axes = subplots(2, SHOWN, figsize=(SHOWN, 2.05))
    for column, (image, gates) in enumerate(zip(images, met, strict=True)):
        axes[0, column].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0))
        shown = axes[1, column].imshow(gates, cmap=MAP_COLOURS, vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[1], label="gate", fraction=0.02)
    save(figure, file)


def measure(folder: Path, data: Path) -> Iterator[Row]:
    """A row for each layer and kind of patch."""
    run, images, layers = look(folder, data, IMAGES)
    canvas = is_canvas(images, run.config.model.patch_size)
    about, here = {"encoding": run.config.model.encoding, "seed": run.config.seed, "n": len(images)}, conditions()
    about |= {key: here[key] for key in ("commit", "date", "hardware")}
    for layer, maps in enumerate(layers, start=1):
        for name, value in mean_gates(maps, canvas).items():
            yield about | {"layer": layer, "name": name, "value": round(value, 4)}


def table(rows: list[Row]) -> str:
    """Mean and spread over seeds, by layer."""
    lines = []
    for layer in sorted({row["layer"] for row in rows}):
        of_layer = [row for row in rows if row["layer"] == layer]
        for encoding in dict.fromkeys(row["encoding"] for row in of_layer):
            line = {"encoding": f"`{encoding}`", "layer": layer}
            for name in (OBJECT, CANVAS):
                found = summarize(grouped(row for row in of_layer if row["name"] == name))[encoding]
                line |= {"n": found.n, name: found.spread(2)}
            lines.append(line)
    return markdown_table(lines, ["encoding", "layer", "n", OBJECT, CANVAS])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, help="folder that holds placed_cifar10")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if bool(given.runs) != bool(given.data):
        parser.error("measuring needs runs and --data DIR")
    if given.figure:
        draw(given.runs[0], given.data, given.figure)
        return
    for folder in given.runs:
        for row in measure(folder, given.data):
            keep(row, ROWS)
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
