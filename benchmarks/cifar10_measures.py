"""Shift, resolution, grouping and health of runs of `sape2 compare cifar10_short`, as tables with intervals over images.

Command:  python benchmarks/cifar10_measures.py RUN [RUN ...]   keeps what `sape2 evaluate` left in them in
          benchmarks/results/cifar10_measures.jsonl, and prints the tables;
          python benchmarks/cifar10_measures.py                 prints them from the rows that are kept;
          both draw docs/figures/cifar10_short_{shift,equivariance,resolution,grouping}.png from these rows.

Conditions that all runs share (recipe, model, data, split, machine) are kept once, in the first line; the wording of the
protocols is in docs/evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import keep_and_print, last_test_rows, six_digits
from timing import RESULTS, Row

from sape2 import viz
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.tables import markdown_table

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
ROWS = RESULTS / "cifar10_measures.jsonl"
SHARED = ("recipe", "model", "data", "epochs", "seed", "precision", "torch", "hardware", "split", "weights")
LEFT_OUT = (*SHARED, "protocol", "head", "class")
LAYERS = 4


@dataclass(frozen=True)
class Number:
    """A column: the rows of one name under these conditions; of several, which differ in the rule, the first."""

    heading: str
    measure: str
    name: str
    where: dict[str, Any]

    def row(self, rows: list[Row]) -> Row | None:
        """The row itself; None where there is none, or where it has no value."""
        for row in rows:
            if (row["measure"], row["name"]) == (self.measure, self.name) and self.where.items() <= row.items():
                return None if row["value"] is None else row
        return None

    def of(self, rows: list[Row]) -> str:
        """ "0.712 (0.690 to 0.733)", an interval over images; "" where there is no such row."""
        row = self.row(rows)
        return _text(row) if row else ""


def _text(row: Row) -> str:
    low, high = row.get("ci_low"), row.get("ci_high")
    digits = 0 if row["unit"] == "warnings" else 4 if row["name"] == "lie_derivative_error" else 3
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if low is not None and high is not None else ""
    return f"{row['value']:.{digits}f}{interval}"


def of_layers(heading: str, measure: str, name: str, **where: Any) -> list[Number]:
    return [Number(f"{heading}, layer {layer}", measure, name, where | {"layer": layer}) for layer in range(1, LAYERS + 1)]


SCALED = {"transform": "scaled"}
ONE_PATCH = {"axis": "x", "shift_px": 4}
WITHIN_A_PATCH = Number("consistency, within a patch", "shift", "circular_consistency", {"shifts": "sub_patch"})
WHOLE_PATCHES = Number("whole patches", "shift", "circular_consistency", {"shifts": "patch_multiples"})
LIE_DERIVATIVE = Number("Lie derivative, x, reflected", "shift", "lie_derivative_error", {"axis": "x", "border": "reflect"})
FEATURES = Number(
    "features leaving layer 4, one patch along x", "shift", "feature_equivariance_error", ONE_PATCH | {"layer": LAYERS}
)
AUROC = of_layers("AUROC", "grouping", "bias_auroc", masks="scenes", distance="far", sign="minus")
LIFT = of_layers("lift", "grouping", "same_label_lift", masks="scenes", distance="far")
BIAS_TO_CONTENT = of_layers("bias to content", "health", "bias_to_content")
TABLES = {
    "shift: predictions": [
        Number("accuracy", "accuracy", "accuracy", {}),
        WITHIN_A_PATCH,
        WHOLE_PATCHES,
        Number("two crops", "shift", "cropped_consistency", {"shifts": "crops"}),
        Number("worst case, within a patch", "shift", "worst_case_accuracy", {"shifts": "patch"}),
    ],
    "shift: errors": [
        LIE_DERIVATIVE,
        FEATURES,
        Number("bias of layer 1", "shift", "bias_equivariance_error", ONE_PATCH | {"layer": 1}),
        Number("bias of layer 4", "shift", "bias_equivariance_error", ONE_PATCH | {"layer": 4}),
    ],
    "resolution": [
        Number("32x32", "resolution", "accuracy_at_size", SCALED | {"size": "32x32"}),
        Number("smaller, scaled", "resolution", "mean_accuracy_below", SCALED),
        Number("larger, scaled", "resolution", "mean_accuracy_above", SCALED),
        Number("64x64, scaled", "resolution", "accuracy_at_size", SCALED | {"size": "64x64"}),
        Number("drop to 64x64, paired", "resolution", "accuracy_drop", SCALED | {"size": "64x64"}),
        Number("larger, padded (reflected)", "resolution", "mean_accuracy_above", {"transform": "padded", "border": "reflect"}),
    ],
    "grouping: AUROC of a small bias for the same object, patches two or more apart": AUROC,
    "grouping: attention to the same object against chance, patches two or more apart": LIFT,
    "health": [
        *BIAS_TO_CONTENT,
        Number("warnings", "health", "warnings", {}),
    ],
}


def collect(folders: list[Path]) -> list[Row]:
    """What the runs share, then the rows of each, last epoch, test set; numbers to six digits."""
    rows: list[Row] = []
    for folder in folders:
        encoding = Run.open(folder).config.model.encoding
        found = last_test_rows(folder)
        shared = {key: found[0][key] for key in SHARED}
        if rows and rows[0] != shared:
            raise SystemExit(f"{folder} was run or measured under other conditions: {shared}, not {rows[0]}")
        rows += [] if rows else [shared]
        rows += [{"encoding": encoding} | _short(row) for row in found if "head" not in row and "class" not in row]
    return rows


def _short(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if key not in (*LEFT_OUT, "encoding")}
    return {key: six_digits(value) if isinstance(value, float) else value for key, value in kept.items()}


def by_encoding(rows: list[Row]) -> dict[str, list[Row]]:
    encodings = dict.fromkeys(row["encoding"] for row in rows if "encoding" in row)
    return {encoding: [row for row in rows if row.get("encoding") == encoding] for encoding in encodings}


def draw(rows: list[Row]) -> None:
    """The pictures of docs/results.md; the other sign is in the tables only."""
    runs = {name: mine for name, mine in by_encoding(rows).items() if not name.endswith("sign=minus")}
    notes = viz.Notes(about="vit_nano, cifar10, 2 epochs, one seed; test set, last weights")
    viz.plot_measures(runs, ["shift", "resolution", "grouping"], FIGURES, notes=notes, beginning="cifar10_short_")


def tables(rows: list[Row]) -> str:
    """One table a question, one line an encoding."""
    parts = []
    for title, numbers in TABLES.items():
        lines = [{"encoding": name} | {n.heading: n.of(mine) for n in numbers} for name, mine in by_encoding(rows).items()]
        shown = [line for line in lines if any(value for key, value in line.items() if key != "encoding")]
        parts.append(f"### {title}\n\n{markdown_table(shown, ['encoding', *(number.heading for number in numbers)])}")
    return "\n".join(parts)


if __name__ == "__main__":
    keep_and_print(ROWS, collect, tables)
    draw(read_rows(ROWS))
