"""Runs that differ in the seed only, as one: what tells a group from the others, and the means over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sape2.studies.compare.headlines import Column, Row, Run, telling_layer


@dataclass(frozen=True)
class Group:
    """Runs of the same settings under different seeds, and what tells them from the other groups.

    `label` always begins with the encoding; `name`, for a legend, leaves it out where all groups have the same.
    """

    label: str
    name: str
    runs: list[Run]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.config.seed) for run in self.runs)

    def numbers(self, column: Column) -> list[float]:
        """The values of the runs that have one."""
        layer = telling_layer(self.runs)
        found = (column.pick(run, layer) for run in self.runs)
        return [value for value in found if value is not None]


def group_runs(runs: list[Run]) -> list[Group]:
    """Raises ValueError for two runs of the same settings and seed, which would count as two seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = groups.setdefault(repr(sorted(_settings(run).items())), [])
        for other in same:
            if other.config.seed == run.config.seed:
                raise ValueError(f"{other.folder} and {run.folder} are the same run (same settings and seed); give one of them")
        same.append(run)
    first = [members[0] for members in groups.values()]
    several = len(first) == 1 or len({run.config.model.encoding for run in first}) > 1
    return [
        Group(label, name, sorted(members, key=lambda run: run.config.seed))
        for label, name, members in zip(_labels(first), _labels(first, several), groups.values(), strict=True)
    ]


TOLD_ONCE = ("model.encoding", "model.name", "data.name", "train.epochs")


def shared_in_words(groups: list[Group]) -> str:
    """Encoding, model, data and epochs as far as all groups have the same, for a title; one group is named by its encoding."""
    settings = [_settings(group.runs[0]) for group in groups]
    alike = [key for key in TOLD_ONCE if len({repr(values[key]) for values in settings}) == 1]
    return ", ".join(_tell(key, settings[0][key]) for key in alike if key != "model.encoding" or len(groups) > 1)


def _settings(run: Run) -> dict[str, Any]:
    """Everything that makes the run what it is but for its seed, as {"model.encoding": ...}."""
    nested = run.config.identity()
    flat = {
        f"{part}.{key}": value for part, values in nested.items() if isinstance(values, dict) for key, value in values.items()
    }
    return flat | {key: value for key, value in nested.items() if not isinstance(value, dict) and key != "seed"}


FOLLOWS = {  # what goes without saying once the first is said
    "model.name": ("model.dim", "model.depth", "model.num_heads", "model.mlp_ratio"),
    "data.name": ("data.", "model.image_size", "model.in_channels", "model.num_classes", "model.patch_size"),
    "train.epochs": ("train.warmup_epochs",),
}


def _labels(runs: list[Run], with_encoding: bool = True) -> list[str]:
    """The encoding, and the other settings in which the runs differ; the folder too where that is not enough."""
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    differ = [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1 and key != "model.encoding"]
    implied = {
        key for key in differ for said, follow in FOLLOWS.items() if said in differ and said != key and key.startswith(follow)
    }
    told = [key for key in differ if key not in implied]
    labels = [
        ", ".join([*([run.config.model.encoding] if with_encoding else []), *(_tell(key, values.get(key)) for key in told)])
        for run, values in zip(runs, settings, strict=True)
    ]
    return [
        f"{label} ({run.folder})".strip() if labels.count(label) > 1 else label for label, run in zip(labels, runs, strict=True)
    ]


def _tell(key: str, value: Any) -> str:
    if key in ("model.encoding", "model.name", "data.name", "recipe"):
        return str(value)
    return f"{value} epoch{'s' * (value != 1)}" if key == "train.epochs" else f"{key.split('.')[-1]}={value}"


VALUES = ("value", "ci_low", "ci_high", "chance")
CHANGING = {*VALUES, "n", "seed", "protocol", "torch", "hardware", "precision", "message", "p10", "p90"}


def mean_rows(runs: list[list[Row]]) -> Iterator[Row]:
    """Rows that agree in their conditions as one."""
    groups: dict[str, list[Row]] = {}
    for row in (row for rows in runs for row in rows if row.get("value") is not None):
        groups.setdefault(repr(sorted((k, v) for k, v in row.items() if k not in CHANGING)), []).append(row)
    for rows in groups.values():
        mean, std = mean_and_std([row["value"] for row in rows])
        interval = {} if std is None else {"ci_low": mean - std, "ci_high": mean + std}
        chance = [row["chance"] for row in rows if row.get("chance") is not None]
        conditions = {key: value for key, value in rows[0].items() if key not in CHANGING}
        yield conditions | {"value": mean} | interval | ({"chance": statistics.mean(chance)} if chance else {})


def mean_epochs(runs: list[list[Row]]) -> list[Row]:
    """Mean losses and accuracies of every epoch that all runs have."""
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    return [{name: statistics.mean(row[name] for row in rows) for name in names} for rows in zip(*runs, strict=False)]


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter of one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
