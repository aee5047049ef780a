"""Groups of runs that differ only in the seed: what distinguishes groups, and the means over the seeds of each.

Equal settings are not enough: runs on different images (data.json) or in different precisions are in different groups.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sape2.config.recipes.changed import changed_settings, value_in_words
from sape2.runs.images import how_images_differ
from sape2.studies.compare.headlines import Headline, MeasuredRun, telling_layer
from sape2.studies.compare.summary import mean_and_std
from sape2.tables import Row


@dataclass(frozen=True)
class Group:
    """Runs of the same settings under different seeds, and what tells them from the other groups.

    `label` always begins with the encoding; `name`, for a legend, leaves it out where all groups have the same.
    """

    label: str
    name: str
    runs: list[MeasuredRun]
    left_out: tuple[str, ...] = ()  # what of its runs does not stand beside the others, in words

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.config.seed) for run in self.runs)

    def images(self, measure: str | None) -> int | None:
        """Number of images behind each number of a measure; None if it was not measured or has no such number."""
        return None if measure in (None, "cost") else max(run.images(measure) for run in self.runs) or None

    def values(self, column: Headline) -> dict[int, float]:
        """seed -> the value of the run, for those that have one."""
        layer = telling_layer(self.runs)
        found = ((run.config.seed, column.pick(run, layer)) for run in self.runs)
        return {seed: value for seed, value in found if value is not None}


def group_runs(runs: list[MeasuredRun]) -> list[Group]:
    """Raises ValueError for two runs of the same settings and seed, which would count as two seeds."""
    groups: list[list[MeasuredRun]] = []
    settings = dict(zip(map(id, runs), _all_settings(runs), strict=True))
    for run in runs:
        same = next((group for group in groups if settings[id(group[0])] == settings[id(run)]), [])
        if not same:
            groups.append(same)
        for other in same:
            if other.config.seed == run.config.seed:
                raise ValueError(f"{other.folder} and {run.folder} are the same run (same settings and seed); give one of them")
        same.append(run)
    first = [members[0] for members in groups]
    told = [settings[id(run)] for run in first]
    several = len(first) == 1 or len({run.config.model.encoding for run in first}) > 1
    return [
        Group(label, name, *_over_as_many(sorted(members, key=lambda run: run.config.seed)))
        for label, name, members in zip(_labels(first, told), _labels(first, told, several), groups, strict=True)
    ]


def _over_as_many(runs: list[MeasuredRun]) -> tuple[list[MeasuredRun], tuple[str, ...]]:
    """Drops runs that were measured on fewer images than others of the group, so that a mean over seeds is of like numbers."""
    left_out: list[str] = []
    for measure in sorted({measure for run in runs for measure in run.measures()}):
        most = max(run.images(measure) for run in runs)
        for place, run in enumerate(runs):
            if 0 < run.images(measure) < most:
                left_out.append(
                    f"{measure} of {run.folder} is over {run.images(measure):,} images and that of other seeds over {most:,}: "
                    f"it is left out; sape2 evaluate {run.folder} --measures {measure} measures it on all"
                )
                runs[place] = replace(run, rows=[row for row in run.rows if row["measure"] != measure])
    return runs, tuple(left_out)


TOLD_ONCE = ("model.encoding", "model.name", "data.name", "train.epochs")


def shared_in_words(groups: list[Group]) -> str:
    """Encoding, model, data, epochs and changed settings as far as all groups have the same, for a title.

    One group is named by its encoding.
    """
    settings = [_settings(group.runs[0]) for group in groups]
    alike = [key for key in TOLD_ONCE if len({repr(values[key]) for values in settings}) == 1]
    words = [_tell(key, settings[0][key]) for key in alike if key != "model.encoding" or len(groups) > 1]
    changed = [changed_settings(group.runs[0].config) for group in groups]
    words += [
        f"{key}={value_in_words(value)}"
        for key, value in changed[0].items()
        if key not in TOLD_ONCE and all(other.get(key) == value for other in changed)
    ]
    return ", ".join(words)


def _all_settings(runs: list[MeasuredRun]) -> list[dict[str, Any]]:
    """Settings, training precision and images of each run; images are identified by the first run that saw the same."""
    known: list[MeasuredRun] = []
    found = []
    for run in runs:
        same = next((other for other in known if how_images_differ(other.seen, run.seen) is None), None)
        if same is None:
            known.append(run)
        found.append(_settings(run) | {"precision": run.precision, "images": f"images of {(same or run).folder}"})
    return found


def _settings(run: MeasuredRun) -> dict[str, Any]:
    """Everything that makes the run what it is but for its seed, as {"model.encoding": ...}."""
    nested = run.config.identity()
    flat = {
        f"{part}.{key}": value for part, values in nested.items() if isinstance(values, dict) for key, value in values.items()
    }
    return flat | {key: value for key, value in nested.items() if not isinstance(value, dict) and key != "seed"}


FOLLOWS = {  # what goes without saying once the first is said
    "model.name": ("model.dim", "model.depth", "model.num_heads", "model.mlp_ratio"),
    "data.name": ("data.", "model.image_size", "model.in_channels", "model.num_classes", "model.patch_size", "images"),
    "model.image_size": ("images",),  # arrays are looked at as the model takes them
    "model.in_channels": ("images",),
    "train.epochs": ("train.warmup_epochs",),
    "train.precision": ("precision",),
}


def _labels(runs: list[MeasuredRun], settings: list[dict[str, Any]], with_encoding: bool = True) -> list[str]:
    """The encoding, and the other settings in which the runs differ; the folder too where that is not enough."""
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
    if key in ("model.encoding", "model.name", "data.name", "recipe", "images"):
        return str(value)
    return f"{value} epoch{'s' * (value != 1)}" if key == "train.epochs" else f"{key.split('.')[-1]}={value}"


VALUES = ("value", "ci_low", "ci_high", "chance")
CHANGING = {*VALUES, "n", "seed", "protocol", "torch", "hardware", "precision", "message", "p10", "p90", "limit", "changed",
            "encoding"}  # fmt: skip


def mean_rows(runs: list[list[Row]]) -> Iterator[Row]:
    """Rows that agree in their conditions as one."""
    groups: dict[str, list[Row]] = {}
    for row in (row for rows in runs for row in rows if row.get("value") is not None):
        groups.setdefault(repr(sorted((k, v) for k, v in row.items() if k not in CHANGING)), []).append(row)
    for rows in groups.values():
        mean, std = mean_and_std([row["value"] for row in rows])
        interval = {"ci_low": mean - std, "ci_high": mean + std} if std else {}
        chance = [row["chance"] for row in rows if row.get("chance") is not None]
        conditions = {key: value for key, value in rows[0].items() if key not in CHANGING}
        yield conditions | {"value": mean} | interval | ({"chance": statistics.mean(chance)} if chance else {})


def mean_epochs(runs: list[list[Row]]) -> list[Row]:
    """Mean losses and accuracies of every epoch that all runs have."""
    names = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
    return [{name: _mean([row[name] for row in rows]) for name in names} for rows in zip(*runs, strict=False)]


def _mean(values: list[float | None]) -> float | None:
    """None if one of them was not finite."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None
