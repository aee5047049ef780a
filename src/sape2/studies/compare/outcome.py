"""The outcome of a study: turns raw rows into one comparison row for each encoding and number, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sape2 import viz
from sape2.evaluation.report import csv_table, format_spread, format_value, markdown_table
from sape2.runs.files import write_text
from sape2.runs.rows import write_rows
from sape2.studies.compare.groups import mean_and_std
from sape2.studies.compare.paired import Paired, holm, paired_difference
from sape2.studies.compare.rawrows import check_one_study
from sape2.studies.compare.tables import WEIGHTS

Row = dict[str, Any]
PROTOCOL = (
    "std: sample standard deviation over seeds. difference: mean, over the seeds that both have, of the value minus that of "
    "the baseline with the same seed; 95 % interval and two-sided p by Student's t over these differences, n - 1 degrees of "
    "freedom; p_holm: Holm's adjustment over the encodings compared. All this is about training again with another seed on "
    "the same images; that the test set is a sample is not in it."
)
EXPLAINED = (
    "± is the standard deviation over seeds, not an interval; the 95 % interval is that of the mean difference over the pairs "
    "of one seed, by Student's t. Values or differences that are all alike have none."
)
COSTS = {  # name -> (unit, meaning)
    "parameters": ("parameters", "all"),
    "macs_per_image": ("MACs", "of one image's forward pass in matrix products and convolutions, attention included"),
    "step_ms": ("ms", "per training step of one batch, median over epochs of wall-clock time on the machine that trained"),
    "step_memory_mib": ("MiB", "highest extra memory of one training step at PyTorch's allocator, measured during the run"),
    "training_s": ("s", "training steps of the whole run, wall clock, without evaluation"),
}


@dataclass(frozen=True)
class Outcome:
    """Raw rows of one study, each run once, and the encoding that the others are compared with."""

    finished: list[Row]
    failed: list[Row]
    baseline: str

    @property
    def encodings(self) -> list[str]:
        return list(dict.fromkeys(row["encoding"] for row in self.finished))

    def by_seed(self, encoding: str, name: str, weights: str) -> dict[int, float]:
        """seed -> a number of the test set."""
        return {
            run["seed"]: row["value"]
            for run in self.finished
            if run["encoding"] == encoding
            for row in run["rows"]
            if (row["name"], row["weights"]) == (name, weights)
        }

    def names(self) -> list[str]:
        """The numbers of the test set that are not of one class."""
        return list(dict.fromkeys(row["name"] for run in self.finished for row in run["rows"] if "class" not in row))

    def paired(self, name: str, weights: str) -> dict[str, Paired]:
        """encoding -> its differences to the baseline, for those that have any."""
        base = self.by_seed(self.baseline, name, weights)
        others = (encoding for encoding in self.encodings if encoding != self.baseline)
        found = ((encoding, paired_difference(self.by_seed(encoding, name, weights), base)) for encoding in others)
        return {encoding: paired for encoding, paired in found if paired is not None}

    def rows(self) -> Iterator[Row]:
        """Rows for programs: accuracy and similar numbers with differences, then costs, then one row for each failed run."""
        for name in self.names():
            for weights in WEIGHTS:
                yield from self._compared(name, weights)
        for encoding in self.encodings:
            for name, (unit, meaning) in COSTS.items():
                values = [row[name] for row in self.finished if row["encoding"] == encoding and row[name] is not None]
                mean, std = mean_and_std(values) if values else (None, None)
                about = {"unit": unit, "protocol": meaning} | self._conditions()
                yield {"name": name, "encoding": encoding, "mean": mean, "std": std, "n": len(values)} | about
        for row in self.failed:
            yield {"name": "failed", "encoding": row["encoding"], "seed": row["seed"], "reason": row["failed"]}

    def _compared(self, name: str, weights: str) -> Iterator[Row]:
        paired = self.paired(name, weights)
        adjusted = dict(zip(paired, holm([pair.p for pair in paired.values()]), strict=True))
        for encoding in self.encodings:
            values = self.by_seed(encoding, name, weights)
            if not values:
                continue
            mean, std = mean_and_std(list(values.values()))
            pair = paired.get(encoding)
            yield {
                "name": name,
                "encoding": encoding,
                "mean": mean,
                "std": std,
                "n": len(values),
                "baseline": self.baseline,
                "difference": pair and pair.difference,
                "ci_low": pair and pair.ci_low,
                "ci_high": pair and pair.ci_high,
                "p": pair and pair.p,
                "p_holm": adjusted.get(encoding),
                "pairs": pair.n if pair else 0,
                "seeds": sorted(values),
                "split": "test",
                "weights": weights,
                "unit": next(row["unit"] for run in self.finished for row in run["rows"] if row["name"] == name),
                "protocol": PROTOCOL,
            } | self._conditions()

    def _conditions(self) -> Row:
        first = self.finished[0]
        return {key: first.get(key) for key in ("recipe", "model", "data", "epochs", "changed")}

    @property
    def title(self) -> str:
        """Data, model, epochs and changed settings, which all runs share."""
        if not self.finished:
            return ""
        about = self._conditions()
        changed = f", {about['changed']}" if about["changed"] else ""
        return f"{about['data']}, {about['model']}, {about['epochs']} epoch{'s' * (about['epochs'] != 1)}{changed}"

    def notes(self) -> list[str]:
        """Notes on the numbers that a reader of the table must know."""
        notes = [EXPLAINED] if len(self.finished) > len(self.encodings) else []
        seeds: dict[str, set[int]] = {}
        for row in self.finished:
            seeds.setdefault(str(row.get("precision")), set()).add(row["seed"])
        if len(seeds) > 1:
            told = "; ".join(f"{name}: seeds {', '.join(map(str, sorted(some)))}" for name, some in seeds.items())
            notes.append(f"Runs were trained in different precision ({told}), so ± holds more than the seed.")
        return notes


def outcome(rows: list[Row], baseline: str | None = None) -> Outcome:
    """The outcome of raw rows; the baseline is the first encoding unless named.

    Raises ValueError for rows of several studies, and for a baseline that no run is of.
    """
    check_one_study(rows)
    finished, failed = ([row for row in rows if ("failed" in row) == wanted] for wanted in (False, True))
    known = list(dict.fromkeys(row["encoding"] for row in rows))
    if baseline is not None and baseline not in known:
        raise ValueError(f"there is no run of the baseline {baseline!r}; there are runs of: {', '.join(known) or 'nothing'}")
    baseline = baseline or (known[0] if known else "")
    return Outcome(sorted(finished, key=lambda row: row["seed"]), failed, baseline)


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy_table(found: Outcome, weights: str) -> list[Row]:
    """Table for people: accuracy with its paired difference; cells that need several seeds are empty for one."""
    return [
        {"encoding": row["encoding"], "accuracy": format_spread(row["mean"], row["std"], 4), "n": row["n"]}
        | ({f"minus {found.baseline}": f"{row['difference']:+.4f}", "pairs": row["pairs"]} if row["pairs"] else {})
        | ({"95 % interval": f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}"} if row["ci_low"] is not None else {})
        | {key: format_p(row[name]) for key, name in (("p", "p"), ("p, Holm", "p_holm")) if row[name] is not None}
        for row in found.rows()
        if row["name"] == "accuracy" and row["weights"] == weights
    ]


def accuracy_columns(found: Outcome) -> list[str]:
    return ["encoding", "accuracy", "n", f"minus {found.baseline}", "95 % interval", "pairs", "p", "p, Holm"]


def cost_table(found: Outcome) -> list[Row]:
    lines: dict[str, Row] = {}
    for row in found.rows():
        if row["name"] in COSTS and row["mean"] is not None:
            line = lines.setdefault(row["encoding"], {"encoding": row["encoding"]})
            whole = row["unit"] in ("parameters", "MACs")
            line[COST_HEADINGS[row["name"]]] = (
                format_value(round(row["mean"])) if whole else format_spread(row["mean"], row["std"] or None, 1)
            )
    return list(lines.values())


COST_HEADINGS = {
    "parameters": "parameters",
    "macs_per_image": "MACs per image",
    "step_ms": "ms per step",
    "step_memory_mib": "MiB per step",
    "training_s": "training (s)",
}


def format_p(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def write_outcome(found: Outcome, folder: Path) -> list[Path]:
    """results.jsonl, comparison.csv with every digit, comparison.md."""
    rows = list(found.rows())
    write_rows(folder / "results.jsonl", rows)
    wide = [{key: value for key, value in row.items() if key not in ("protocol", "seeds")} for row in rows]
    write_text(folder / "comparison.csv", csv_table(wide))
    write_text(folder / "comparison.md", page(found))
    return [folder / name for name in ("results.jsonl", "comparison.csv", "comparison.md")]


def draw_outcome(found: Outcome, folder: Path) -> list[Path]:
    """comparison.png: accuracy of every seed, best mean first, and its differences. Raises ImportError without matplotlib."""
    values = {e: found.by_seed(e, "accuracy", "last") for e in found.encodings}
    last = dict(sorted(values.items(), key=lambda item: -sum(item[1].values()) / len(item[1])))
    best = {e: found.by_seed(e, "accuracy", "best") for e in last}
    paired = {e: (pair.difference, pair.ci_low, pair.ci_high) for e, pair in found.paired("accuracy", "last").items()}
    viz.plot_seeds(last, best if best != last else {}, paired, found.baseline, folder / "comparison.png", found.title)
    return [folder / "comparison.png"]


def page(found: Outcome) -> str:
    """The comparison in markdown."""
    if not found.finished:
        return f"# No run has finished\n\n{_failures(found)}"
    about = found.finished[0]
    seeds = sorted({row["seed"] for row in found.finished})
    machines = sorted({f"{row['hardware']}, torch {row['torch']}, {row['precision']}" for row in found.finished})
    parts = [
        f"# {about['recipe']}: {len(found.encodings)} encodings, {len(found.finished)} runs\n",
        f"{found.title}, seeds {', '.join(map(str, seeds))}; {'; '.join(machines)}.\n",
        *(
            f"## Test accuracy, {title}\n\n{markdown_table(accuracy_table(found, weights), accuracy_columns(found))}"
            for weights, title in WEIGHTS.items()
        ),
        f"{PROTOCOL}\n\nWhat one seed cannot tell is empty.\n",
        "".join(f"- {note}\n" for note in found.notes()),
        f"## Cost\n\n{markdown_table(cost_table(found), ['encoding', *COST_HEADINGS.values()])}",
        "".join(f"- {COST_HEADINGS[name]}: {meaning}\n" for name, (_, meaning) in COSTS.items()),
    ]
    return "\n".join([*parts, *([_failures(found)] if found.failed else [])])


def _failures(found: Outcome) -> str:
    lines = [{"encoding": row["encoding"], "seed": row["seed"], "reason": row["failed"]} for row in found.failed]
    return f"## Failed\n\n{markdown_table(lines, ['encoding', 'seed', 'reason'])}"
