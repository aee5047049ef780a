"""Trains and measures one small model on a controlled task for each (encoding, seed, layers), for `sape2 probe`.

Within a seed all encodings see the same batches and start from the same weights outside of the encoding. All are measured
on the same scenes, with the weights of the last step; no checkpoint is selected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sape2 import viz
from sape2.config import ModelConfig, TrainConfig
from sape2.data.augment import derive_seed
from sape2.encodings import canonical_name
from sape2.evaluation.cost.measure import count_parameters
from sape2.evaluation.views import describe_rule
from sape2.machine import autocast, find_device, hardware, precision_of
from sape2.models.vit import ViT
from sape2.runs.lock import one_at_a_time
from sape2.runs.rows import read_rows, write_rows
from sape2.studies.compare.summary import grouped, summarize
from sape2.studies.probes import NOT_ASKED, TRAIN, Scenes, Task, find_task
from sape2.tables import Row
from sape2.training.accelerator import make_accelerator
from sape2.training.optimisation import make_schedule
from sape2.training.steps import Steps

DIM, NUM_HEADS = 128, 4
WARMUP_SHARE = 0.1
CLIP_GRAD = 1.0
TOKENS_MEASURED = 2**16  # of every split: 1024 scenes of 8x8
FEWEST_SCENES = 256


@dataclass(frozen=True)
class Cell:
    """One training. Raises ValueError for names and sizes that cannot be."""

    task: str
    encoding: str
    seed: int = 0
    layers: int = 2
    steps: int | None = None

    def __post_init__(self) -> None:
        find_task(self.task)
        object.__setattr__(self, "encoding", canonical_name(self.encoding))
        for name, value, least in (("steps", self.steps or 1, 1), ("layers", self.layers, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}; got {value}")
        if self.steps is None:
            object.__setattr__(self, "steps", find_task(self.task).steps)
        with torch.device("meta"):  # what cannot be made is found before anything is trained
            ViT(model_config(self))

    @property
    def key(self) -> Row:
        """The fields that distinguish the rows of this cell from those of other cells."""
        task = find_task(self.task)
        settings = {"steps": self.steps, "batch_size": task.batch_size, "lr": task.lr}
        return {"task": self.task, "encoding": self.encoding, "seed": self.seed, "layers": self.layers} | settings


def model_config(cell: Cell) -> ModelConfig:
    """The ViT of the package with patches of one cell: its patch embedding is then a linear embedding of the features."""
    task = find_task(cell.task)
    return ModelConfig(
        name="probe",
        encoding=cell.encoding,
        image_size=task.grid,
        patch_size=1,
        in_channels=task.channels,
        num_classes=task.num_classes,
        dim=DIM,
        depth=cell.layers,
        num_heads=NUM_HEADS,
        pool="mean",
    )


def build_model(cell: Cell) -> ViT:
    """A new model whose weights outside its encodings depend on task, seed and layers alone."""
    torch.manual_seed(derive_seed(cell.seed, "weights"))
    return ViT(model_config(cell))


def answer(model: ViT, cells: Float[Tensor, "batch channels height width"], task: Task) -> Tensor:
    """Logits for every token, (B, N, classes), or for the scene, (B, classes); norm and head are the same two modules."""
    if task.readout == "mean":
        return model(cells)
    return model.head(model.fc_norm(model.features(cells)))


# --- one cell --------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, on_step: Callable[[], None] = lambda: None) -> list[Row]:
    """Trains and measures; a row for every split. Raises ValueError when the loss is no longer finite."""
    start = time.perf_counter()
    task, precision, device = find_task(cell.task), precision_of("auto"), find_device()
    model = build_model(cell).to(device)
    loss = train(model, task, cell, on_step)
    about = {
        "train_loss": loss,
        "parameters": count_parameters(model),
        "precision": precision,
        "torch": torch.__version__,
        "hardware": hardware(),
    }
    rows = [measure(model, task, cell.task, split, device) | cell.key | about for split in measured_splits(task)]
    return [row | {"seconds": time.perf_counter() - start} for row in rows]


def train(model: ViT, task: Task, cell: Cell, on_step: Callable[[], None] = lambda: None) -> float:
    """AdamW, linear warm-up over a tenth of the steps, cosine; the mean loss of the last tenth."""
    number, config = cell.key["steps"], TrainConfig(epochs=1, warmup_epochs=0, lr=task.lr, clip_grad=CLIP_GRAD)
    schedule = partial(make_schedule, decay="cosine", steps=number, warmup=round(WARMUP_SHARE * number), min_lr=config.min_lr)
    steps = Steps(model, config, schedule, make_accelerator("auto", command="sape2 probe"))

    def losses(scenes: Scenes) -> dict[str, Tensor]:
        with steps.accelerator.autocast():
            logits = answer(model, scenes.cells.to(steps.accelerator.device), task).float()
        labels = scenes.labels.flatten().to(logits.device)
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=NOT_ASKED)}

    found = []
    for step in range(number):
        steps.update(step, [training_batch(task, cell.task, cell.seed, step)], losses)
        found += [numbers["loss"] for _, numbers in steps.look()]
        if not math.isfinite(found[-1]):
            raise ValueError(f"{cell.encoding}, seed {cell.seed}: the loss is {found[-1]} at step {step}")
        on_step()
    last = found[-max(1, number // 10) :]
    return sum(last) / len(last)


def training_batch(task: Task, name: str, seed: int, step: int) -> Scenes:
    """Batch number `step`, decided by (task, seed, step): the same for every encoding."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "probe", name, step))
    return task.sample(TRAIN, task.batch_size, generator)


@torch.no_grad()
def measure(model: ViT, task: Task, name: str, split: str, device: torch.device) -> Row:
    """Accuracy on scenes that are the same for every model, and that no training batch was drawn with."""
    model.eval()
    grid = task.splits[split].grid
    correct = asked = 0
    for scenes in measured_scenes(task, name, split):
        with autocast(device):
            predicted = answer(model, scenes.cells.to(device), task).argmax(-1).cpu()
        correct += int((predicted == scenes.labels).sum())
        asked += int((scenes.labels != NOT_ASKED).sum())
    rule = "the training grid" if grid == model.config.grid else describe_rule(model)
    return {
        "name": "accuracy",
        "value": correct / asked,
        "unit": "fraction",
        "n": asked,
        "chance": task.splits[split].chance,
        "split": split,
        "in_distribution": task.splits[split].in_distribution,
        "grid": f"{grid[0]}x{grid[1]}",
        "protocol": f"weights of the last step, scenes of their own seed; {rule}",
    }


def measured_scenes(task: Task, name: str, split: str) -> Iterator[Scenes]:
    """Batches of the scenes that every model is measured on."""
    height, width = task.splits[split].grid
    number = max(FEWEST_SCENES, TOKENS_MEASURED // (height * width))
    for part in range(math.ceil(number / task.batch_size)):
        generator = torch.Generator().manual_seed(derive_seed("probe", name, "measured", split, part))
        yield task.sample(split, task.batch_size, generator)


# --- many cells ------------------------------------------------------------------------------------------------------


def run_cells(cells: list[Cell], folder: Path, on_step: Callable[[], None] = lambda: None) -> Iterator[tuple[Cell, list[Row]]]:
    """Every cell with its rows, read from results.jsonl where it is finished, else trained and written there at once."""
    path = folder / "results.jsonl"
    for cell in cells:
        rows = finished(read_rows(path), cell)
        if not rows:
            rows = run_cell(cell, on_step)
            folder.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder):  # several commands may share it
                write_rows(path, [*read_rows(path), *rows])
        yield cell, rows


def finished(rows: list[Row], cell: Cell) -> list[Row]:
    """The rows of a cell, trained in the precision of this machine; [] unless every split is there."""
    now = precision_of("auto")  # seeds of one line are trained in one precision
    found = [row for row in rows if row.items() >= (cell.key | {"precision": now}).items()]
    return found if {row["split"] for row in found} >= set(measured_splits(find_task(cell.task))) else []


def measured_splits(task: Task) -> list[str]:
    return [name for name, split in task.splits.items() if split.measured]


def table(rows: list[Row], task: Task) -> tuple[list[Row], list[str]]:
    """A line for each encoding (and number of layers), mean +- standard deviation over seeds; chance stands in the heading."""
    headings = {name: f"{name} ({task.splits[name].chance:.3f})" for name in measured_splits(task)}
    lines: dict[tuple, Row] = {}
    values = grouped((row for row in rows if row["name"] == "accuracy"), by=("encoding", "layers", "precision", "split"))
    for (encoding, layers, precision, split), found in summarize(values).items():
        precisions = {other[2] for other in values if other[:2] == (encoding, layers)}
        name = encoding if len(precisions) == 1 else f"{encoding}, {precision}"  # seeds of one line have one precision
        line = lines.setdefault((name, layers), {"encoding": name, "layers": layers})
        line["seeds"] = found.n
        line[headings[split]] = found.spread(3)
    return list(lines.values()), ["encoding", "layers", "seeds", *headings.values()]


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_examples(name: str, path: Path, number: int = 2) -> None:
    """The first scenes of every split."""
    task = find_task(name)
    panels: dict[str, list[Any]] = {}
    for split in measured_splits(task):
        scenes = task.sample(split, number, torch.Generator().manual_seed(derive_seed("examples", name, split)))
        panels[split] = [task.example(scenes, index) for index in range(number)]
    viz.plot_examples(panels, path, f"{name}: {task.summary}")


def draw_results(rows: list[Row], task: Task, path: Path) -> Path:
    """Accuracy by split, a point for each seed; returns the file."""
    chance = {name: task.splits[name].chance for name in measured_splits(task)}
    points: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["name"] == "accuracy":
            label = row["encoding"] if len({r["layers"] for r in rows}) == 1 else f"{row['encoding']}, {row['layers']} layers"
            points.setdefault(label, {}).setdefault(row["split"], []).append(row["value"])
    told = sorted({row["steps"] for row in rows if "steps" in row})
    viz.plot_probe(points, chance, path, f"a point for each seed; {', '.join(map(str, told))} updates" if told else "")
    return path
