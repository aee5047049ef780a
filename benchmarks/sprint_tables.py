"""The tables and figures of the sprint study, from the rows that are kept (`benchmarks/sprint.py` prints them)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from leaderboard import images_seen
from sprint_plan import (
    BASELINE,
    CANDIDATES,
    DIRECT,
    DROPPED,
    JOINS_OF_BIASES,
    QUARTERS,
    RATES,
    SEARCH_ENCODINGS,
    STAGES,
    WHOLE,
    candidate,
    rows_of,
    with_rates,
)
from timing import ROOT, Row

from sape2.encodings import canonical_name
from sape2.studies.compare.outcome import outcome, paired_table
from sape2.studies.compare.paired import Paired, paired_difference
from sape2.studies.compare.rawrows import final_accuracy, final_validation_accuracy
from sape2.studies.compare.summary import grouped, summarize
from sape2.tables import markdown_table
from sape2.viz.base import legend_below, line_style, pyplot, save


def search_table(rows: list[Row]) -> str:
    """Validation accuracy of the candidates, and their mean over the encodings that decide together."""
    found = {row["digest"]: row for row in rows}
    lines = []
    for name, settings in CANDIDATES.items():
        line: Row = {"candidate": name}
        for encoding in SEARCH_ENCODINGS:
            trial = candidate(encoding, settings)
            if trial.digest in found:
                line[encoding] = f"{final_validation_accuracy(found[trial.digest]):.4f}"
        if len(line) > len(SEARCH_ENCODINGS):
            line["mean"] = f"{sum(float(line[e]) for e in SEARCH_ENCODINGS) / len(SEARCH_ENCODINGS):.4f}"
        if len(line) > 1:
            lines.append(line)
    return markdown_table(lines, ["candidate", *SEARCH_ENCODINGS, "mean"])


TUNINGS = ("tuning_headline", "tuning_first", "tuning", "tuning_rivals", "tuning_controls", "tuning_forms")


def tuning_table(rows: list[Row]) -> str:
    """Validation accuracy of every encoding at the pairs of rates it has, the best in bold; and what choosing adds."""
    found = {row["digest"]: final_validation_accuracy(row) for row in rows}
    lines: dict[str, Row] = {}
    for encoding in dict.fromkeys(trial.encoding for stage in TUNINGS for trial in STAGES[stage](rows)):
        for rates in (*RATES, *DROPPED):
            if (digest := with_rates(encoding, rates).digest) in found:
                lines.setdefault(encoding, {})[_heading(rates)] = found[digest]
    headings = [*map(_heading, RATES), GAIN, *map(_heading, DROPPED)]
    searched = [_tuning_line(*line) for line in lines.items() if len(line[1]) > 1]
    return markdown_table(searched, ["encoding", *headings])


GAIN = "gain by choosing, points"


def _tuning_line(encoding: str, accuracies: dict[str, float]) -> Row:
    best, line = max(accuracies.values()), {"encoding": f"`{encoding}`"}
    line |= {rates: f"**{value:.4f}**" if value == best else f"{value:.4f}" for rates, value in accuracies.items()}
    first = accuracies.get(_heading(RATES[0]))
    return line if first is None else line | {GAIN: f"{100 * (best - first):.1f}"}


def _heading(rates: tuple[float, float]) -> str:
    return f"{rates[0]:g} / {rates[1]:g}"


LEVEL = 0.015  # an interval that holds 0 and ends within ±1.5 points


def accuracy_table(rows: list[Row], *stages: str, baseline: str = BASELINE) -> str:
    """Test accuracy of the kept runs of these stages, in pairs of a seed with the baseline; p is adjusted over the table."""
    return markdown_table(*paired_table(rows_of(rows, *stages), canonical_name(baseline), level=LEVEL))


def table_of_added(rows: list[Row], *stages: str) -> str:
    """The same for stages that were added to those of one pair of rates, whose baseline they share."""
    base = [row for row in rows_of(rows, "one_rate", "one_rate_table") if row["encoding"] == BASELINE]
    added = [row for row in rows_of(rows, *stages) if row["encoding"] != BASELINE]
    return markdown_table(*paired_table([*base, *added], BASELINE, level=LEVEL))


WINNER = JOINS_OF_BIASES[-1]
CONTRASTS = (  # what findings.md, choosing.md and README say of two encodings
    *(
        (name, BASELINE)
        for name in ("none", "ape+sape2", "ape+cope", "ape+rope", "rope", "cpe", "log_cpb", "cpe+log_cpb", WINNER)
    ),
    ("sape2", "none"),
    ("ape+rope", "rope"),
    (f"rope+{DIRECT}", "rope"),
    (f"cpe+{DIRECT}", "cpe"),
    (f"rope+{DIRECT},gates=constant", "rope"),
    (f"rope+{DIRECT}", f"rope+{DIRECT},gates=constant"),
    (f"cpe+{DIRECT}", f"cpe+{DIRECT},gates=constant"),
    ("rope+key_table", "rope"),
    (f"rope+{DIRECT},gates=constant", "rope+key_table"),
    *(("cpe+log_cpb", name) for name in ("rope", "cpe", "log_cpb", f"cpe+{DIRECT}")),
    *((WINNER, name) for name in ("rope", "cpe", "log_cpb", "cpe+log_cpb")),
)
SCOPES = {  # column -> stages
    "three passes, one pair of rates": QUARTERS,
    "twelve passes, rates of their own": WHOLE,
    "CIFAR-100, three passes": ("headline_cifar100",),
    "CIFAR-100, twelve passes": ("whole_cifar100",),
}


def contrast_table(rows: list[Row]) -> str:
    """Differences in points over the seeds that both encodings have, each with its interval and the number of pairs."""
    of = {scope: grouped(rows_of(rows, *stages), final_accuracy) for scope, stages in SCOPES.items()}
    lines = []
    for one, other in ((canonical_name(one), canonical_name(other)) for one, other in CONTRASTS):
        line = {"encoding": f"`{one}`", "minus": f"`{other}`"}
        for scope, values in of.items():
            if pair := paired_difference(values.get(one, {}), values.get(other, {})):
                line[scope] = f"{in_points(pair)}, n = {pair.n}"
        lines.append(line)
    return markdown_table(lines, ["encoding", "minus", *SCOPES])


def layer_scale_table(rows: list[Row]) -> str:
    """What LayerScale changes, and SaPE2's difference to the table with it in none, in both and in the table's model alone.

    The last is the paper's comparison: in its code only the blocks without SaPE2 had LayerScale.
    """
    values = {}
    for scaled, stage in (("", "headline_quarter"), (" with LayerScale", "layerscale_quarter")):
        found = grouped(rows_of(rows, stage), final_accuracy)
        values |= {f"`{encoding}`{scaled}": accuracies for encoding, accuracies in found.items()}
    lines = []
    for model, other in (
        ("`ape` with LayerScale", "`ape`"),
        ("`ape+sape2` with LayerScale", "`ape+sape2`"),
        ("`ape+sape2`", "`ape`"),
        ("`ape+sape2` with LayerScale", "`ape` with LayerScale"),
        ("`ape+sape2`", "`ape` with LayerScale"),
    ):
        pair = paired_difference(values.get(model, {}), values.get(other, {}))
        lines.append({"model": model, "minus": other} | ({"points": in_points(pair), "n": pair.n} if pair else {}))
    return markdown_table(lines, ["model", "minus", "points", "n"])


def in_points(pair: Paired) -> str:
    """ "+2.6 (1.1 to 4.1)", in points."""
    within = "" if pair.ci_low is None else f" ({100 * pair.ci_low:.1f} to {100 * pair.ci_high:.1f})"
    return f"{100 * pair.difference:+.1f}{within}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "search": search_table,
    "one_rate": lambda rows: accuracy_table(rows, "one_rate"),
    "one_rate, against constant gates": lambda rows: accuracy_table(rows, "one_rate", baseline=f"rope+{DIRECT},gates=constant"),
    "one_rate_table": lambda rows: table_of_added(rows, "one_rate_table"),
    "one_rate_rivals": lambda rows: table_of_added(rows, "one_rate_rivals"),
    "joins": lambda rows: table_of_added(rows, "joins", "joins_of_biases"),
    "one_rate_controls": lambda rows: table_of_added(rows, "one_rate_controls"),
    "winner": lambda rows: accuracy_table(rows, "winner", baseline="cpe"),
    "contrasts": contrast_table,
    "one_rate_forms": lambda rows: accuracy_table(rows, "one_rate_forms", baseline="ape+sape2"),
    "layerscale_quarter": layer_scale_table,
    "tuning": tuning_table,
    "whole": lambda rows: accuracy_table(rows, *WHOLE),
    "headline_quarter": lambda rows: accuracy_table(rows, "headline_quarter"),
    "headline_cifar100": lambda rows: accuracy_table(rows, "headline_cifar100"),
    "whole_cifar100": lambda rows: accuracy_table(rows, "whole_cifar100"),
    "quarter": lambda rows: accuracy_table(rows, "quarter"),
    "controls": lambda rows: accuracy_table(rows, "cifar10", "controls"),
    "cifar100": lambda rows: accuracy_table(rows, "cifar100"),
}


def table(name: str, rows: list[Row]) -> str:
    """One of `TABLES`; where its runs are not done, what is left."""
    try:
        return TABLES[name](rows)
    except ValueError as left:  # rates that are not searched, no run of the baseline
        return f"{left}\n"


def tables(rows: list[Row]) -> str:
    return "\n".join(f"### {name}\n\n{table(name, rows)}" for name in TABLES)


FIGURES = ROOT / "docs" / "figures"


def figure(rows: list[Row]) -> str:
    """Draws both figures; says where they are."""
    return f"{quarter_figure(rows)}\n{budget_figure(rows)}"


def quarter_figure(rows: list[Row]) -> Path:
    """Every seed of the encodings at a quarter of the length with one pair of rates."""
    path = FIGURES / "sprint_quarter.png"
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(rows_of(rows, *QUARTERS), BASELINE)
        shutil.move(found.draw(Path(folder))[0], path)
    return path


BUDGETS = ("headline_quarter", "headline", "long")  # the same rates of each encoding, by length


def budget_points(rows: list[Row]) -> dict[str, list[Row]]:
    """encoding -> its mean accuracy and paired difference to the baseline (points) for each length that has pairs."""
    points: dict[str, list[Row]] = {}
    for stage in BUDGETS:
        found = rows_of(rows, stage)
        for encoding, summary in summarize(grouped(found, final_accuracy), BASELINE).items():
            images = images_seen(next(row for row in found if row["encoding"] == encoding)) // 1000
            mine = points.setdefault(encoding, [])
            mine.append({"name": "accuracy", "images": images, "value": summary.mean})
            if pair := summary.pair:
                interval = {"value": pair.difference, "ci_low": pair.ci_low, "ci_high": pair.ci_high}
                known = {key: 100 * value for key, value in interval.items() if value is not None}
                mine.append({"name": "difference", "images": images} | known)
    return points


def budget_figure(rows: list[Row]) -> Path:
    """Accuracy, and its difference to the baseline, against the images that a training sees; bars are 95 % intervals."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    points = budget_points(rows)
    lengths = sorted({row["images"] for found in points.values() for row in found})
    for index, (name, found) in enumerate(points.items()):
        for axis, what in zip(axes, ("accuracy", "difference"), strict=True):
            some = [row for row in found if row["name"] == what]
            bars = [[abs(row["value"] - row.get(end, float("nan"))) for row in some] for end in ("ci_low", "ci_high")]
            apart = 1 + 0.02 * (index - len(points) // 2)  # so that bars do not cover each other
            places = [row["images"] * apart for row in some]
            axis.errorbar(places, [row["value"] for row in some], bars, capsize=3, label=name, **line_style(index))
    labels = ("test accuracy, mean over seeds", f"difference to {BASELINE} in pairs of a seed (points)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="training images seen (thousands)", ylabel=label)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    legend_below(figure, *axes[0].get_legend_handles_labels())
    path = FIGURES / "sprint_budget.png"
    save(figure, path)
    return path
