"""The headline numbers of a run: a few of each measure, for a table of many runs. docs/evaluation/README.md gives reasons."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sape2.config import RunConfig
from sape2.runs.run import Run, trained_in
from sape2.tables import Row


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run with the rows measured on one split with one set of weights, and the lines of its epochs."""

    run: Run[RunConfig]
    rows: list[Row]
    epochs: list[Row]

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def seen(self) -> Row:
        """The images that it saw; {} where that is not known."""
        return self.run.seen

    @property
    def precision(self) -> str | None:
        """Precision of the training, as chosen on its machine; None if unknown."""
        return trained_in(self.epochs)

    def images(self, measure: str) -> int:
        """Number of images of a measure: the n of its first number; 0 if it was not measured."""
        return next((row.get("n") or 0 for row in self.rows if row["measure"] == measure), 0)

    def value(self, name: str, measure: str, **where: Any) -> float | None:
        """Value of the first row with this name and these conditions; None if there is none."""
        found = (
            row["value"]
            for row in self.rows
            if (row["measure"], row["name"]) == (measure, name) and all(row.get(key) == value for key, value in where.items())
        )
        return next(found, None)

    def measures(self) -> set[str]:
        return {row["measure"] for row in self.rows}


def read_runs(folders: Iterable[Path], split: str = "test", weights: str = "last") -> tuple[list[MeasuredRun], list[Path]]:
    """The finished runs, and the folders of those that are not. Raises ValueError or OSError for what is no run folder."""
    runs, unfinished = [], []
    for run in map(Run.open, folders):
        if run.state != "finished":
            unfinished.append(run.folder)
            continue
        chosen = [row for row in run.results() if (row.get("split"), row.get("weights")) == (split, weights)]
        runs.append(MeasuredRun(run, chosen, run.epochs()))
    return runs, unfinished


# --- headline numbers ------------------------------------------------------------------------------------------------


def _unseen_drop(run: MeasuredRun, side: str) -> float | None:
    """Accuracy at the training size less the mean over the unseen sizes on one side, images scaled, the model's own rule."""
    rows = [row for row in run.rows if row["measure"] == "resolution" and row.get("transform") == "scaled"]
    own = [row for row in rows if row["rule"] == rows[0]["rule"]]
    changed = {row["size"] for row in own if row["name"] == "accuracy_drop"}
    trained = next((r["value"] for r in own if r["name"] == "accuracy_at_size" and r["size"] not in changed), None)
    unseen = next((r["value"] for r in own if r["name"] == f"mean_accuracy_{side}"), None)
    return None if trained is None or unseen is None else trained - unseen


def step_ms(run: MeasuredRun) -> float | None:
    """Milliseconds per training step, median over the epochs."""
    speeds = [row["images_per_s"] for row in run.epochs if row.get("images_per_s")]
    return 1000 * run.config.train.batch_size / statistics.median(speeds) if speeds else None


def telling_layer(runs: list[MeasuredRun]) -> int | None:
    """The layer whose bias, far pairs, is furthest from chance in either direction, by the mean over the runs."""
    found: dict[int, list[float]] = {}
    for row in (row for run in runs for row in run.rows if row["name"] == "bias_auroc" and "head" not in row):
        conditions = row["masks"], row["distance"], row["sign"], row["value"] is None
        if conditions == ("scenes", "far", "minus", False):
            found.setdefault(row["layer"], []).append(row["value"])
    return max(found, key=lambda layer: abs(statistics.mean(found[layer]) - 0.5), default=None)


Pick = Callable[[MeasuredRun, int | None], float | None]  # the value of a run, given the telling layer of its group


@dataclass(frozen=True)
class Headline:
    """A headline number: its measure (None: from training), unit, value and meaning."""

    heading: str
    measure: str | None
    unit: str
    pick: Pick
    meaning: str


def _first(name: str, measure: str, **where: Any) -> Pick:
    return lambda run, _: run.value(name, measure, **where)


def _of_bias(name: str, distance: str, **where: Any) -> Pick:
    def pick(run: MeasuredRun, layer: int | None) -> float | None:
        place = {"masks": "scenes", "distance": distance, "layer": layer, "head": None}
        return None if layer is None else run.value(name, "grouping", **place, **where)

    return pick


COUNTS = ("number", "warnings")  # units of whole numbers
HEADLINES = (
    Headline("accuracy", "accuracy", "fraction", _first("accuracy", "accuracy"), "top-1, one view"),
    Headline("consistency", "shift", "fraction", _first("circular_consistency", "shift", shifts="sub_patch"),
             "the same prediction after two random shifts within one patch, circular border; read it beside accuracy"),
    Headline("worst case", "shift", "fraction", _first("worst_case_accuracy", "shift", shifts="patch"),
             "right under every shift within one patch, circular border"),
    Headline("drop, smaller", "resolution", "fraction", lambda run, _: _unseen_drop(run, "below"),
             "accuracy at the training size less the mean over smaller sizes, images scaled, no fine-tuning"),
    Headline("drop, larger", "resolution", "fraction", lambda run, _: _unseen_drop(run, "above"),
             "the same over larger sizes, under the model's own rule for positions beyond its tables"),
    Headline("layer", "grouping", "number", lambda _, layer: layer,
             "whose bias is furthest from chance (far pairs); the next three are of this layer, chosen by what it shows"),
    Headline("AUROC near", "grouping", "AUROC", _of_bias("bias_auroc", "near", sign="minus"),
             "negative bias as a score for the same object, neighbouring patches; chance 0.5, above it b is smaller within "
             "objects"),
    Headline("AUROC far", "grouping", "AUROC", _of_bias("bias_auroc", "far", sign="minus"),
             "the same for patches two or more apart"),
    Headline("d'", "grouping", "standard deviations", _of_bias("bias_separation", "all"),
             "mean bias across objects less that within, over their spread; chance 0"),
    Headline("warnings", "health", "warnings", _first("warnings", "health"),
             "broken limits of the health report; empty where the layers have no bias to check"),
    Headline("ms per step", None, "ms", lambda run, _: step_ms(run),
             "of training, median over epochs, for one batch on the machine that trained"),
)  # fmt: skip
