"""Raw rows: the results of a finished run in one line, so that every table of a study is made from one small file.

A line holds the settings of the run (those that decide its result) with their digest, encoding and seed, the conditions it
was measured under, parameters, MACs, time and memory of a step, the rows of the test set, and the curve of its epochs.
A run that failed has `failed`, the reason, instead of numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from sape2.config import ModelConfig, RunConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.evaluation.cost.measure import count_parameters
from sape2.evaluation.cost.operations import count_model_macs
from sape2.evaluation.runs import describe
from sape2.models.vit import ViT
from sape2.runs.files import digest_of, write_text
from sape2.runs.images import how_images_differ
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.runs.settings import canonical, difference
from sape2.studies.compare.headlines import MeasuredRun, step_ms
from sape2.tables import Row

FAILED = ".failed.json"  # in the folder of a run that cannot go on
CURVE = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "images_per_s", "seconds")


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a study share: everything but the encoding and the seed."""
    model = {key: value for key, value in settings["model"].items() if key != "encoding"}
    return {key: value for key, value in settings.items() if key != "seed"} | {"model": model}


def raw_row(run: Run[RunConfig]) -> Row:
    """The line of a finished and measured run."""
    config, epochs = run.config, run.epochs()
    if not epochs:
        raise ValueError(f"{run.folder} is finished but has no metrics.jsonl; remove the folder to run it again")
    test = [row for row in run.results() if (row.get("split"), row.get("measure")) == ("test", "accuracy")]
    conditions = describe(run) | {key: test[0][key] for key in ("torch", "hardware")}  # of then, not of now
    memory = [row["step_memory_mib"] for row in epochs if row.get("step_memory_mib") is not None]
    row = _head(config) | {key: value for key, value in conditions.items() if key not in ("encoding", "seed")}
    row |= _size(config.model) | {
        "images": {key: value for key, value in run.seen.items() if key != "classes"},  # {} if they are not known
        "device": epochs[-1].get("device"),
        "step_ms": step_ms(MeasuredRun(run, test, epochs)),
        "step_memory_mib": max(memory, default=None),
        "training_s": sum(row["seconds"] for row in epochs),
        "rows": [{key: value for key, value in row.items() if key not in (*conditions, "limit")} for row in test],
        "curve": {key: [row.get(key) for row in epochs] for key in CURVE},
    }
    return row


def of_test_set(row: Row, name: str, weights: str) -> float | None:
    """A number of the test set in a raw row; None if it was not measured."""
    return next((r["value"] for r in row["rows"] if (r["name"], r["weights"]) == (name, weights)), None)


def final_accuracy(row: Row) -> float:
    """Of the last epoch."""
    return next(r["value"] for r in row["rows"] if (r["name"], r["weights"]) == ("accuracy", "last"))


def final_validation_accuracy(row: Row) -> float:
    """After the last epoch; never of the best one, which would favour noise."""
    return row["curve"]["validation_accuracy"][-1]


def _head(config: RunConfig) -> Row:
    config = canonical(config)
    settings = json.loads(json.dumps(config.identity()))  # as it will be read again
    return {"encoding": config.model.encoding, "seed": config.seed, "digest": digest_of(settings), "settings": settings,
            "changed": changed_in_words(config)}  # fmt: skip


@cache
def _size(config: ModelConfig) -> Row:
    model = ViT(config)
    macs = count_model_macs(model, config.in_channels, config.image_size)
    return {"parameters": count_parameters(model), "macs_per_image": macs}


# --- failures --------------------------------------------------------------------------------------------------------


def note_failure(run: Run[RunConfig], reason: str) -> None:
    write_text(run.folder / FAILED, json.dumps(_head(run.config) | {"failed": reason}) + "\n")


def failure(run: Run[RunConfig]) -> Row | None:
    path = run.folder / FAILED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# --- the file --------------------------------------------------------------------------------------------------------


def read_raw(path: Path) -> list[Row]:
    """The lines of a file of raw rows, each run once.

    A run that is there twice counts once, and a failed one that finished later counts as finished. Raises ValueError for
    a line that is no raw row, or whose settings are not those of its digest.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    return each_once(_checked(row, f"{path} line {number}") for number, row in enumerate(read_rows(path), start=1))


def _checked(row: Row, where: str) -> Row:
    """The row, with the settings that an older version did not know of at their defaults, its encoding under its one name."""
    if not {"encoding", "seed", "digest", "settings"} <= row.keys() or not ("failed" in row or _has_results(row)):
        raise ValueError(f"{where} is not a raw row of sape2 compare")
    try:
        head = _read_head(json.dumps(row["settings"], sort_keys=True))
    except ValueError as error:
        raise ValueError(f"{where} does not fit this version of sape2: {error}") from error
    told = row["settings"]["model"]["encoding"], row["settings"].get("seed", 0), digest_of(row["settings"])
    if (row["encoding"], row["seed"], row["digest"]) != told:
        raise ValueError(f"{where} was changed: its encoding, seed and digest are not those of its settings")
    return row | head


def _has_results(row: Row) -> bool:
    """Whether it has numbers of the test set and a curve, in the form of `raw_row`."""
    tested = row.get("rows")
    return isinstance(row.get("curve"), dict) and isinstance(tested, list) and all(map(_is_result, tested))


def _is_result(row: Any) -> bool:
    keys = {"name", "value", "unit", "weights"}
    return isinstance(row, dict) and keys <= row.keys() and isinstance(row["value"], (int, float, NoneType))


@cache
def _read_head(settings: str) -> Row:
    """The fields that identify a run, from its settings in JSON; cached, because a file is read often during a study."""
    return _head(RunConfig.from_dict(json.loads(settings)))


def each_once(rows: Iterable[Row]) -> list[Row]:
    """One row a run, the first finished one, in the order of first mention."""
    runs: dict[str, Row] = {}
    for row in rows:
        known = runs.setdefault(row["digest"], row)
        if "failed" in known and "failed" not in row:
            runs[row["digest"]] = row
    return list(runs.values())


def check_one_study(rows: list[Row]) -> None:
    """Raises ValueError naming a difference if the runs differ in more than encoding and seed, or saw other images."""
    for row in rows[1:]:
        first, other = (shared_settings(r["settings"]) for r in (rows[0], row))
        if first != other:
            raise ValueError(
                "these runs cannot stand in one comparison: they differ in more than encoding and seed, "
                f"{difference(first, other)}; give the rows of one study"
            )
    known = [row for row in rows if row.get("images")]  # older rows, and those of failed runs, do not tell
    for row in known[1:]:
        if found := how_images_differ(known[0]["images"], row["images"]):
            raise ValueError(
                f"these runs cannot stand in one comparison: {row['encoding']} seed {row['seed']} saw other images than "
                f"{known[0]['encoding']} seed {known[0]['seed']}: {found}; give the rows of one study"
            )


def gather(path: Path, runs: Iterable[Run[RunConfig]]) -> list[Row]:
    """Brings the file up to date with these runs, and returns its rows. Finished rows are never lost.

    Several processes may do so at once: each looks again after it has written, so the last one leaves everything there.
    """
    known = {row["digest"] for row in finished_rows(path)}
    new = [run for run in runs if _head(run.config)["digest"] not in known]
    found = [row for run in new if (row := raw_row(run) if run.is_measured else failure(run))]
    while True:
        there = read_raw(path) if path.exists() else []
        rows = each_once([*(row for row in there if "failed" not in row), *found])
        if rows == there:
            return rows
        write_rows(path, rows)


def finished_rows(path: Path) -> list[Row]:
    return [row for row in read_raw(path) if "failed" not in row] if path.exists() else []
