"""Do gates shut on the canvas and open on the object? Runs of gate_forms.py on the images of placed.py, layer by layer.

Command:  python benchmarks/placed_gates.py RUN [RUN ...] --data DIR     measures finished runs, on images of DIR/placed_cifar10
          python benchmarks/placed_gates.py                              prints the table

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

from sape2.evaluation.base import drawn
from sape2.models.trained import load_run_model
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.compare.summary import grouped, summarize
from sape2.tables import markdown_table

ROWS = RESULTS / "placed_gates.jsonl"
IMAGES = 500
CANVAS, OBJECT = "on the canvas", "on the object"


def is_canvas(images: Float[Tensor, "batch channels height width"], patch: int) -> Bool[Tensor, "batch rows columns"]:
    pixels = images.unfold(2, patch, patch).unfold(3, patch, patch).flatten(-2)  # (B, C, H, W, pixels of a patch)
    return (pixels.amax(-1) - pixels.amin(-1) < 1e-4).all(1)


def mean_gates(maps: dict[str, Tensor], canvas: Bool[Tensor, "batch rows columns"]) -> dict[str, float]:
    """Of the gates that the patches of the object give along their row and their column."""
    by_row = maps["gates_x"].unflatten(2, canvas.shape[1:])  # (B, h, H, W, W)
    by_column = maps["gates_y"].unflatten(2, canvas.shape[1:])  # (B, h, H, W, H)
    met = (canvas[:, None, :, None, :].expand_as(by_row), canvas.mT[:, None, None].expand_as(by_column))
    of_object = ~canvas[:, None, :, :, None]
    found: dict[str, float] = {}
    for name, wanted in ((OBJECT, False), (CANVAS, True)):
        chosen = [g[(m == wanted) & of_object] for g, m in zip((by_row, by_column), met, strict=True)]
        found[name] = torch.cat(chosen).mean().item()
    return found


def measure(folder: Path, data: Path) -> Iterator[Row]:
    """A row for each layer and kind of patch."""
    run = Run.open_finished(folder)
    run = Run(folder, replace(run.config, data=replace(run.config.data, source=str(data / run.config.data.name))))
    model = load_run_model(run, "last")
    images = torch.cat([some for some, _ in drawn(splits_of(run).test, IMAGES).batches(IMAGES)])
    canvas = is_canvas(images, run.config.model.patch_size)
    with torch.no_grad():
        layers = model.maps(images)
    about = {"encoding": run.config.model.encoding, "seed": run.config.seed, "n": len(images)}
    about |= {key: conditions()[key] for key in ("commit", "date", "hardware")}
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
    given = parser.parse_args()
    if bool(given.runs) != bool(given.data):
        parser.error("measuring needs runs and --data DIR")
    for folder in given.runs:
        for row in measure(folder, given.data):
            keep(row, ROWS)
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
