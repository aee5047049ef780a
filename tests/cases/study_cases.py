"""A tiny study, and runs that are finished without training."""

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.runs.rows import write_rows
from sape2.runs.run import Run
from sape2.studies.compare.plan import Study

TINY = [
    "model.dim=12", "model.depth=1", "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=32", "train.precision=fp32",
    "data.train_limit=128",
]  # fmt: skip


def tiny_study(folder, encodings=("none", "ape"), seeds=2, settings=()):
    return Study(override(get_recipe("digits"), [*TINY, *settings]), tuple(encodings), seeds, folder)


def finish(cell, accuracy=0.5, best=None):
    """What a finished and measured run leaves; the accuracy is any number, the epoch took 2 s."""
    folder = cell.folder
    Run(folder, cell.config).start()
    epoch = {"epoch": 1, "loss": 2.0, "accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.5, "seconds": 2.0}
    write_rows(folder / "metrics.jsonl", [epoch | {"images_per_s": 3200.0, "device": "cpu", "step_memory_mib": 1.5}])
    row = {"measure": "accuracy", "split": "test", "unit": "fraction", "n": 359, "protocol": "p", "torch": "2", "hardware": "h"}
    rows = []
    for weights, value in (("last", accuracy), ("best", accuracy if best is None else best)):
        rows.append(row | {"weights": weights, "name": "accuracy", "value": value})
        rows.append(row | {"weights": weights, "name": "class_accuracy", "value": value, "class": "0"})
    write_rows(folder / "results.jsonl", rows)
    (folder / "model.safetensors").write_bytes(b"weights are not read")
