"""The outcome of a study: turns raw rows into one comparison row for each encoding and number, tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sape2 import viz
from sape2.encodings import canonical_name
from sape2.evaluation.runs import in_words
from sape2.runs.files import write_text
from sape2.runs.rows import write_rows
from sape2.studies.compare.paired import Paired
from sape2.studies.compare.rawrows import check_one_study, final_accuracy, of_test_set
from sape2.studies.compare.report import WEIGHTS
from sape2.studies.compare.summary import Summary, comparison_table, grouped, mean_and_std, numbers, summarize
from sape2.tables import Row, Table, csv_table, format_spread, format_value, markdown_table

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
COSTS = {  # name -> (heading, unit, meaning)
    "parameters": ("parameters", "parameters", "all"),
    "macs_per_image": ("MACs per image", "MACs",
                       "of one image's forward pass in matrix products and convolutions, attention included"),
    "step_ms": ("ms per step", "ms",
                "per training step of one batch, median over epochs of wall-clock time on the machine that trained"),
    "step_memory_mib": ("MiB per step", "MiB",
                        "highest extra memory of one training step at PyTorch's allocator, measured during the run"),
    "training_s": ("training (s)", "s", "training steps of the whole run, wall clock, without evaluation"),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Raw rows of one study, each run once, and the encoding that the others are compared with."""

    finished: list[Row]
    failed: list[Row]
    baseline: str

    @property
    def encodings(self) -> list[str]:
        return list(dict.fromkeys(row["encoding"] for row in self.finished))

    def names(self) -> list[str]:
        """The numbers of the test set that are not of one class."""
        return list(dict.fromkeys(row["name"] for run in self.finished for row in run["rows"] if "class" not in row))

    def values(self, name: str, weights: str) -> dict[str, dict[int, float]]:
        """encoding -> seed -> a number of the test set."""
        return grouped(self.finished, lambda row: of_test_set(row, name, weights))

    def summaries(self, name: str, weights: str) -> dict[str, Summary]:
        """encoding -> a number of the test set, in pairs with the baseline."""
        return summarize(self.values(name, weights), self.baseline)

    def paired(self, name: str, weights: str) -> dict[str, Paired]:
        """encoding -> its differences to the baseline, for those that have any."""
        return {encoding: found.pair for encoding, found in self.summaries(name, weights).items() if found.pair}

    def rows(self) -> Iterator[Row]:
        """Rows for programs: accuracy and similar numbers with differences, then costs, then one row for each failed run."""
        for name in self.names():
            for weights in WEIGHTS:
                yield from self._compared(name, weights)
        costs = {name: self.costs(name) for name in COSTS}
        for encoding in self.encodings:
            for name, (_, unit, meaning) in COSTS.items():
                number = {"name": name, "encoding": encoding} | numbers(costs[name].get(encoding), paired=False)
                yield number | {"unit": unit, "protocol": meaning} | self._conditions()
        for row in self.failed:
            yield {"name": "failed", "encoding": row["encoding"], "seed": row["seed"], "reason": row["failed"]}

    def costs(self, name: str) -> dict[str, Summary]:
        """encoding -> one of `COSTS`."""
        return summarize(grouped(self.finished, lambda row: row.get(name)))

    def _compared(self, name: str, weights: str) -> Iterator[Row]:
        unit = next(row["unit"] for run in self.finished for row in run["rows"] if row["name"] == name)
        values = self.values(name, weights)
        for encoding, found in self.summaries(name, weights).items():
            number = {"name": name, "encoding": encoding, "baseline": self.baseline} | numbers(found)
            about = {"seeds": sorted(values[encoding]), "split": "test", "weights": weights, "unit": unit}
            yield number | about | {"protocol": PROTOCOL} | self._conditions()

    def _conditions(self) -> Row:
        first = self.finished[0]
        return {key: first.get(key) for key in ("recipe", "model", "data", "epochs", "changed")}

    @property
    def title(self) -> str:
        """Model, data, epochs and changed settings, which all runs share."""
        return in_words(self.finished[0]) if self.finished else ""

    def tables(self) -> Iterator[Table]:
        """For a terminal: accuracy with the weights of each kind, then costs."""
        for weights, title in WEIGHTS.items():
            yield f"test accuracy, {title}; {self.title}", *accuracy_table(self, weights)
        yield "cost", *cost_table(self)

    def write(self, folder: Path) -> list[Path]:
        """results.jsonl, comparison.csv with every digit, comparison.md."""
        rows = list(self.rows())
        write_rows(folder / "results.jsonl", rows)
        wide = [{key: value for key, value in row.items() if key not in ("protocol", "seeds")} for row in rows]
        write_text(folder / "comparison.csv", csv_table(wide))
        write_text(folder / "comparison.md", page(self))
        return [folder / name for name in ("results.jsonl", "comparison.csv", "comparison.md")]

    def draw(self, folder: Path) -> list[Path]:
        """comparison.png: every seed, best mean first, and the differences. Raises ImportError without matplotlib."""
        if not self.finished:
            return []
        last, best = (self.values("accuracy", weights) for weights in ("last", "best"))
        order = sorted(last, key=lambda encoding: -mean_and_std(list(last[encoding].values()))[0])
        last, best = ({encoding: some.get(encoding, {}) for encoding in order} for some in (last, best))
        paired = {e: (pair.difference, pair.ci_low, pair.ci_high) for e, pair in self.paired("accuracy", "last").items()}
        viz.plot_seeds(last, best if best != last else {}, paired, self.baseline, folder / "comparison.png", self.title)
        return [folder / "comparison.png"]

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
    baseline = next(iter(known), "") if baseline is None else _known_baseline(baseline, known)
    return Outcome(sorted(finished, key=lambda row: row["seed"]), failed, baseline)


def _known_baseline(baseline: str, known: Iterable[str]) -> str:
    """The name that the rows have of this encoding, however it is written."""
    if (name := canonical_name(baseline)) not in known:
        raise ValueError(f"there is no run of the baseline {baseline!r}; there are runs of: {', '.join(known) or 'nothing'}")
    return name


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy_table(found: Outcome, weights: str) -> tuple[list[Row], list[str]]:
    return comparison_table(found.summaries("accuracy", weights), found.baseline)


def paired_table(
    rows: Iterable[Row], baseline: str, value: Callable[[Row], float] = final_accuracy, level: float | None = None
) -> tuple[list[Row], list[str]]:
    """Accuracy of any raw rows in pairs of a seed, with a verdict (`Summary.verdict`), for `markdown_table(*...)`.

    The rows may differ in any setting, such as rates chosen for each encoding: that they are a fair comparison is up to
    the caller. `value` says what of a row is compared; failed runs have no value. Raises ValueError for two rows of one
    encoding and seed, and for a baseline that no row is of.
    """
    values = grouped((row for row in rows if "failed" not in row), value)
    baseline = _known_baseline(baseline, values)
    found = summarize(values, baseline)
    lines, columns = comparison_table(found, baseline)
    return [line | {"verdict": found[line["encoding"]].verdict(level)} for line in lines], [*columns, "verdict"]


def cost_table(found: Outcome) -> tuple[list[Row], list[str]]:
    lines: dict[str, Row] = {encoding: {"encoding": encoding} for encoding in found.encodings}
    for name, (heading, unit, _) in COSTS.items():
        for encoding, cost in found.costs(name).items():
            whole = unit in ("parameters", "MACs")
            spread = format_spread(cost.mean, cost.std or None, 1)
            lines[encoding][heading] = format_value(round(cost.mean)) if whole else spread
    return list(lines.values()), ["encoding", *(heading for heading, _, _ in COSTS.values())]


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
            f"## Test accuracy, {title}\n\n{markdown_table(*accuracy_table(found, weights))}"
            for weights, title in WEIGHTS.items()
        ),
        f"{PROTOCOL}\n\nWhat one seed cannot tell is empty.\n",
        "".join(f"- {note}\n" for note in found.notes()),
        f"## Cost\n\n{markdown_table(*cost_table(found))}",
        "".join(f"- {heading}: {meaning}\n" for heading, _, meaning in COSTS.values()),
    ]
    return "\n".join([*parts, *([_failures(found)] if found.failed else [])])


def _failures(found: Outcome) -> str:
    lines = [{"encoding": row["encoding"], "seed": row["seed"], "reason": row["failed"]} for row in found.failed]
    return f"## Failed\n\n{markdown_table(lines, ['encoding', 'seed', 'reason'])}"
