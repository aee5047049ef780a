"""Groups of values over seeds, each as its mean, spread and paired difference to a baseline: what every table shows.

`summarize` makes them; `numbers` are the columns for programs, `comparison_table` has those for people.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sape2.studies.compare.paired import Paired, holm, measured, paired_difference
from sape2.tables import Row, format_spread

ALPHA = 0.05
PAIRED = ("difference", "ci_low", "ci_high", "p", "p_holm")
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """A group: mean, sample standard deviation (None for one value), n; its pairs with the baseline, and Holm's p of them."""

    mean: float
    std: float | None
    n: int
    pair: Paired | None = None
    p_holm: float | None = None

    def spread(self, digits: int) -> str:
        return format_spread(self.mean, self.std, digits)

    def verdict(self, level: float | None = None) -> str:
        """ "higher" or "lower" than the baseline if Holm's p is below 0.05, else "unresolved"; "" where there is no interval.

        "level" if the interval holds 0 and ends within ±`level`.
        """
        pair = self.pair
        if pair is None or pair.ci_low is None or pair.ci_high is None or self.p_holm is None:
            return ""
        if self.p_holm < ALPHA:
            return "higher" if pair.difference > 0 else "lower"
        near = level is not None and -level < pair.ci_low <= 0 <= pair.ci_high < level
        return "level" if near else "unresolved"


def summarize(values: Mapping[Group, Mapping[Any, float | None]], baseline: Group | None = None) -> dict[Group, Summary]:
    """A summary of each group that has values, {seed: value}; p is adjusted over the groups that are compared.

    What is not finite counts as not measured.
    """
    some = {group: numbers for group, found in values.items() if (numbers := measured(found))}
    base = some.get(baseline, {}) if baseline is not None else {}
    pairs = {group: paired_difference(found, base) for group, found in some.items() if group != baseline}
    adjusted = dict(zip(pairs, holm([pair.p if pair else None for pair in pairs.values()]), strict=True))
    return {
        group: Summary(*mean_and_std(list(found.values())), len(found), pairs.get(group), adjusted.get(group))
        for group, found in some.items()
    }


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter of one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def grouped(
    rows: Iterable[Row],
    value: Callable[[Row], float | None] = lambda row: row["value"],
    by: Sequence[str] = ("encoding",),
    pair: Sequence[str] = ("seed",),
) -> dict[Any, dict[Any, float]]:
    """group -> pair -> value, for `summarize`: rows that agree in `by` are a group, and paired by what `pair` names.

    A key of one field is its value, of several a tuple. A value that is None is left out. Raises ValueError for two rows
    of one group and pair.
    """
    groups: dict[Any, dict[Any, float]] = {}
    for row in rows:
        group, place = (row.get(keys[0]) if len(keys) == 1 else tuple(row.get(key) for key in keys) for keys in (by, pair))
        values = groups.setdefault(group, {})
        if place in values:
            raise ValueError(f"there are two rows of {group}, {', '.join(pair)} {place}; give each run once")
        if (number := value(row)) is not None:
            values[place] = number
    return groups


# --- columns ---------------------------------------------------------------------------------------------------------


def numbers(summary: Summary | None, paired: bool = True) -> Row:
    """Every digit, under the names that rows have; what is not there is None, and n 0."""
    if summary is None:
        return {"mean": None, "std": None, "n": 0} | (dict.fromkeys(PAIRED) | {"pairs": 0} if paired else {})
    found = {"mean": summary.mean, "std": summary.std, "n": summary.n}
    if not paired:
        return found
    pair = summary.pair or Paired(0, 0.0)
    told = (pair.difference if pair.n else None, pair.ci_low, pair.ci_high, pair.p, summary.p_holm)
    return found | dict(zip(PAIRED, told, strict=True)) | {"pairs": pair.n}


def comparison_table(found: Mapping[Any, Summary], baseline: str) -> tuple[list[Row], list[str]]:
    """Lines and columns of accuracies, for `print_table` and `markdown_table`; what one seed cannot tell is empty."""
    minus = f"minus {baseline}"
    lines = []
    for name, summary in found.items():
        line: Row = {"encoding": name, "accuracy": summary.spread(4), "n": summary.n}
        if pair := summary.pair:
            line |= {minus: f"{pair.difference:+.4f}", "pairs": pair.n, "95 % interval": interval(pair)}
            line |= {"p": format_p(pair.p), "p, Holm": format_p(summary.p_holm)}
        lines.append(line)
    return lines, ["encoding", "accuracy", "n", minus, "95 % interval", "pairs", "p", "p, Holm"]


def interval(pair: Paired, digits: int = 4) -> str:
    """ "-0.0012 to +0.0120"; "" for none."""
    return "" if pair.ci_low is None else f"{pair.ci_low:+.{digits}f} to {pair.ci_high:+.{digits}f}"


def difference(pair: Paired, digits: int = 4) -> str:
    """ "+0.0123 (-0.0012 to +0.0258)", or without the interval where there is none."""
    within = interval(pair, digits)
    return f"{pair.difference:+.{digits}f}" + (f" ({within})" if within else "")


def format_p(p: float | None) -> str:
    return "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"
