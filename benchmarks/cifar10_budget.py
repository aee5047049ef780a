"""Tables and curves of docs/results.md from run folders of `sape2 train cifar10_budget`.

Command:  python benchmarks/cifar10_budget.py RUN [RUN ...]   keeps their rows in benchmarks/results/cifar10_budget.jsonl,
          draws docs/figures/cifar10_budget.png and prints the table;
          python benchmarks/cifar10_budget.py                 prints and draws from the rows that are kept.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.tables import markdown_table
from sape2.viz import plot_curves

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results" / "cifar10_budget.jsonl"


def collect(folder: Path) -> list[dict]:
    """Epoch lines and result rows of a run, marked with its encoding and seed."""
    config = Run.open(folder).config
    mark = {"encoding": config.model.encoding, "seed": config.seed}
    return [mark | row for name in ("metrics.jsonl", "results.jsonl") for row in read_rows(folder / name)]


def main() -> None:
    if len(sys.argv) > 1:
        write_rows(ROWS, [row for folder in sys.argv[1:] for row in collect(Path(folder))])
    rows = read_rows(ROWS)
    plot_curves(curves(rows), ROOT / "docs" / "figures" / "cifar10_budget.png")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """One line a run."""
    lines = []
    for encoding in dict.fromkeys(row["encoding"] for row in rows):
        mine = [row for row in rows if row["encoding"] == encoding]
        epochs = [row for row in mine if "validation_accuracy" in row]
        line = {"encoding": encoding, "epochs": len(epochs), "validation, last epoch": epochs[-1]["validation_accuracy"]}
        for row in mine:
            if row.get("name") in ("accuracy", "calibration_error") and row.get("split") == "test":
                line[f"test {row['name']}, {row['weights']}"] = row["value"]
        line["waiting for data, median"] = f"{statistics.median(row['wait_fraction'] for row in epochs):.1%}"
        lines.append(line)
    return markdown_table(lines, list(dict.fromkeys(column for line in lines for column in line)))


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """The epochs of every encoding."""
    names = dict.fromkeys(row["encoding"] for row in rows)
    return {name: [row for row in rows if row["encoding"] == name and "validation_accuracy" in row] for name in names}


if __name__ == "__main__":
    main()
