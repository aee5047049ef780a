"""The tables of the docs, made again from the rows in benchmarks/results and from nothing else; trains and times nothing.

Command:  python benchmarks/tables.py [NAME ...]        prints them                                   (make tables)
          python benchmarks/tables.py write             and puts them where a page has the marks
                                                        <!-- table: NAME --> or <!-- table: NAME, PART --> and <!-- end -->
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import attention_cost
import augmentation
import cifar10_budget
import cifar10_measures
import detection_digits
import gate_forms
import glance_measures
import leaderboard
import memory
import model_cost
import placed_gates
import roofline
import sprint_measures
import sprint_tables
from kept import ranked_table, with_tables
from timing import RESULTS, ROOT, Row

from sape2.encodings import canonical_name
from sape2.runs.files import write_text
from sape2.runs.rows import read_rows
from sape2.studies.compare.outcome import Outcome, accuracy_table, cost_table, outcome
from sape2.studies.compare.paired import paired_difference
from sape2.studies.compare.rawrows import final_accuracy
from sape2.studies.compare.summary import grouped, mean_and_std, summarize
from sape2.studies.probes import find_task
from sape2.studies.probing import table as probe_table
from sape2.tables import format_spread, markdown_table

SIZES = ["encoding", "parameters", "MACs per image", "MiB per step"]


def attention_tables(rows: list[Row]) -> str:
    return _by(rows, ("images", "grid"), attention_cost.table)


def model_tables(rows: list[Row]) -> str:
    return _by(rows, ("images", "grid"), lambda some: markdown_table(some, model_cost.COLUMNS))


def memory_tables(rows: list[Row]) -> str:
    measured, largest = [row for row in rows if "ms" in row], [row for row in rows if "scope" in row]
    return markdown_table(measured, memory.COLUMNS) + "\n" + markdown_table(largest, memory.LARGEST_COLUMNS)


def study_tables(rows: list[Row]) -> str:
    """Raw rows of `sape2 compare`: accuracy of the last epoch, of the chosen one where it is another, sizes.

    Without its times: other work ran beside these runs. Sizes are those of seed 0: other seeds ran in another precision.
    """
    found = outcome(rows, "ape")
    accuracy = [markdown_table(*accuracy_table(found, weights)) for weights in ("last", "best")]
    first = outcome([row for row in rows if row["seed"] == 0], "ape")
    return "\n".join([*dict.fromkeys(accuracy), markdown_table(cost_table(first)[0], SIZES)])


LADDER = [
    "readout=direct",
    "readout=direct,count=between",
    "readout=squared_distance",
    "preset=equations",
    "normalize=sqrt_length",
    "sign=minus",
    "sign=learned",
    "gates=none",
    "gates=constant",
    "axes=raster",
    "axes=x",
    "count=between",
    "count=cyclic",
    "dot=key",
]
SETS = {  # of docs/decisions/0006-study.md: title -> (baseline, encodings)
    "contenders": ("ape", ["none", "rope", "rpe_contextual", "ape+cope", "sape2", "ape+sape2"]),
    "field": (
        "ape",
        [
            "sincos",
            "cpe",
            "rope_mixed",
            "rpe",
            "rpe_decomposed",
            "alibi",
            "cope",
            "ape+rope",
            "ape+sape2:preset=equations",
            "ape+sape2:dot=key",
        ],
    ),
    "ladder": ("ape+sape2", [f"ape+sape2:{step}" for step in LADDER]),
}


def set_tables(rows: list[Row]) -> str:
    """Raw rows of the study: a table for each set, p adjusted over its rows; then sizes of all."""
    tables = []
    for title, (baseline, encodings) in SETS.items():
        some = [row for row in rows if row["encoding"] in [baseline, *encodings]]
        tables.append(f"{title}\n\n{accuracy_tables(baseline)(some)}")
    tables.append(f"order\n\n{order_table(rows, read_rows(RESULTS / 'cifar10_short.jsonl'))}")
    return "\n".join([*tables, markdown_table(cost_table(outcome(rows, "ape"))[0], SIZES)])


def order_table(rows: list[Row], longer: list[Row]) -> str:
    """Mean accuracies, and those of seed 0 of a longer study, which is the one that all its encodings have; best first, and how
    far the two orders agree.
    """
    here, there = (_means(outcome(some, "ape")) for some in (rows, [row for row in longer if row["seed"] == 0]))
    both = sorted((name for name in there if name in here), key=lambda name: -here[name])
    lines = [
        {"encoding": name, "half a pass": f"{here[name]:.4f}", "two passes, seed 0": f"{there[name]:.4f}"} for name in both
    ]
    return ranked_table(lines, [here[name] for name in both], [there[name] for name in both])


def _means(found: Outcome) -> Row:
    return {encoding: summary.mean for encoding, summary in found.summaries("accuracy", "last").items()}


def accuracy_tables(*baselines: str) -> Callable[[list[Row]], str]:
    """Raw rows of `sape2 compare`: accuracy of the last epoch, against each of the baselines."""

    def tables(rows: list[Row]) -> str:
        return "\n".join(markdown_table(*accuracy_table(outcome(rows, baseline), "last")) for baseline in baselines)

    return tables


def attach_table(rows: list[Row]) -> str:
    """Each arm, and its difference to `without` in pairs of the same run and seed."""
    arms = grouped(rows, by=["arm"], pair=["run", "seed"])
    table = []
    for arm, found in summarize(arms).items():
        pair = paired_difference(arms[arm], arms["without"])
        line = {"arm": arm, "mean": found.mean, "std": found.std, "n": found.n}
        table.append(line | ({"difference": pair.difference, "std of it": pair.std, "pairs": pair.n} if pair else {}))
    return markdown_table(table, list(table[0]))


def probe_tables(rows: list[Row]) -> str:
    """Rows of `sape2 probe`: a table for each task and number of steps."""
    return _by(rows, ("task", "steps"), lambda some: markdown_table(*probe_table(some, find_task(some[0]["task"]))))


COUNTING = "sape2:count=between,readout=direct"
GATES = {  # kind of gates -> encoding
    "content": canonical_name(COUNTING),
    "none": canonical_name(f"{COUNTING},gates=none"),
    "constant": canonical_name(f"{COUNTING},gates=constant"),
}


def gate_table(rows: list[Row]) -> str:
    """The task `count` with each kind of gates: accuracy by split, and what content gates add, in pairs of a seed."""
    lines = []
    for split in dict.fromkeys(row["split"] for row in rows):
        found = grouped(row for row in rows if row["split"] == split)
        values = {kind: found[name] for kind, name in GATES.items()}
        line = {"split": split} | {kind: format_spread(*mean_and_std(list(of.values())), 3) for kind, of in values.items()}
        for other in ("none", "constant"):
            pair = paired_difference(values["content"], values[other])
            line[f"content minus {other}, points"] = sprint_tables.in_points(pair) if pair else ""
        lines.append(line)
    return markdown_table(lines, list(lines[0]))


def _by(rows: list[Row], keys: tuple[str, ...], table: Callable[[list[Row]], str]) -> str:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    titles = (", ".join(f"{key} {value}" for key, value in zip(keys, group, strict=True)) for group in groups)
    return "\n".join(f"{title}\n\n{table(some)}" for title, some in zip(titles, groups.values(), strict=True))


SCREENED = ("optimizer", "epochs", "muon_lr", "lr", "batch_size", "label_smoothing")


def screening_table(rows: list[Row]) -> str:
    """Raw rows of single trials of the sprint recipe, in the order in which they were run."""
    lines = []
    for row in rows:
        settings = {key: row["settings"]["train"][key] for key in SCREENED}
        accuracies = {"validation": row["curve"]["validation_accuracy"][-1], "test": final_accuracy(row)}
        told = {key: f"{value:.4f}" for key, value in accuracies.items()}
        lines.append({"encoding": row["encoding"], "seed": row["seed"], "precision": row["precision"]} | settings | told)
    return markdown_table(lines, list(lines[0]))


def resource_table(rows: list[Row]) -> str:
    """What the kernels take of the newest device that they were compiled for."""
    newest = max(row["capability"] for row in rows)
    columns = ["kernel", "dtype", "head_dim", "places", "registers", "shared_bytes", "spilled_bytes"]
    return markdown_table([row for row in rows if row["capability"] == newest], columns)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "digits_encodings": accuracy_tables("ape"),
    "digits_ladder": accuracy_tables("ape+sape2", "ape"),
    "digits_equations": accuracy_tables("ape", "ape+sape2"),
    "digits_layerscale": accuracy_tables("ape"),
    "cifar10_budget": cifar10_budget.table,
    "cifar10_glance": set_tables,
    "cifar10_glance_layerscale": accuracy_tables("ape"),
    "cifar10_short": study_tables,
    "cifar10_measures": cifar10_measures.tables,
    "cifar10_glance_measures": glance_measures.tables,
    "probes": probe_tables,
    "probes_gates": gate_table,
    "detection_digits": detection_digits.table,
    "attach_cifar10": attach_table,
    "attach_sprint": attach_table,
    "attention_cost": attention_tables,
    "model_cost": model_tables,
    "roofline": roofline.table,
    "sprint": sprint_tables.tables,
    "sprint_screening": screening_table,
    "gate_forms": gate_forms.table,
    "sprint_measures": sprint_measures.tables,
    "placed_gates": placed_gates.table,
    "memory": memory_tables,
    "input_path": lambda rows: markdown_table(rows, list(rows[0])),
    "augmentation": lambda rows: markdown_table(rows, augmentation.COLUMNS),
    "kernel_resources": resource_table,
}


PARTS: dict[str, Callable[[str, list[Row]], str]] = {
    "sprint": sprint_tables.table,
    "sprint_measures": lambda name, rows: sprint_measures.TABLES[name](rows),
}


def marked_table(name: str) -> str:
    """The table of a mark: `leaderboard`, a file of rows, or one part of a file."""
    if name == "leaderboard":
        return leaderboard.table(leaderboard.kept())
    file, _, part = name.partition(", ")
    rows = read_rows(RESULTS / f"{file}.jsonl")
    return PARTS[file](part, rows) if part else TABLES[file](rows)


def written(page: str) -> str:
    """The page with every marked table made again."""
    return with_tables(page, marked_table)


def write() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            write_text(path, new)


def main() -> None:
    if sys.argv[1:] == ["write"]:
        write()
        return
    unknown = [name for name in sys.argv[1:] if name not in TABLES]
    if unknown:
        raise SystemExit(f"no table {unknown[0]!r}; known: {', '.join(TABLES)}")
    for name in sys.argv[1:] or TABLES:
        rows = read_rows(RESULTS / f"{name}.jsonl")
        print(f"## {name}\n\n{TABLES[name](rows) if rows else f'not measured: no benchmarks/results/{name}.jsonl'}")


if __name__ == "__main__":
    main()
