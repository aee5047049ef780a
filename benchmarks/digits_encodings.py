"""Every encoding on scikit-learn's digits: same recipe, same images, same weights elsewhere, several seeds.

Command:  python benchmarks/digits_encodings.py --out DIR      (about ten seconds a run on two CPU cores)
Resumes where it stopped. Writes benchmarks/results/digits_encodings.jsonl, one row a run, and prints the table of
docs/results.md from it; --table prints it from the rows that are there, without running anything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
from pathlib import Path

from sape2.checkpoint import read_rows, write_rows
from sape2.cli import main as sape2
from sape2.report import markdown_table, summarize

ROWS = Path(__file__).parent / "results" / "digits_encodings.jsonl"
ENCODINGS = [
    "none", "ape", "sincos", "cpe", "rope", "rope_mixed", "rpe", "rpe_contextual", "rpe_decomposed", "alibi", "cope",
    "sape2", "ape+sape2",
]  # fmt: skip
BASELINE = "ape"
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % quantile of Student's t by degrees of freedom


def run(encoding: str, seed: int, folder: Path, epochs: int) -> list[dict]:
    """The accuracy rows of one run, which goes on where it stopped."""
    command = [
        "train",
        "digits",
        "--encoding",
        encoding,
        "--seed",
        str(seed),
        "--epochs",
        str(epochs),
        "--out",
        str(folder),
        "--json",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        status = sape2(command)
    if status:
        raise SystemExit(f"{encoding} seed {seed} did not finish")
    return [row for row in read_rows(folder / "results.jsonl") if row["name"] == "accuracy"]


def summary(rows: list[dict]) -> list[dict]:
    """Mean, spread and n per encoding, and the paired difference to the baseline over the seeds both have."""
    last = [row for row in rows if row["weights"] == "last"]
    values = {(row["encoding"], row["seed"]): row["value"] for row in last}
    table = []
    for group in summarize(last):
        encoding = group["encoding"]
        row = {"encoding": encoding, "test accuracy": group["mean"], "std": group["std"], "n": group["n"]}
        seeds = [seed for name, seed in values if name == encoding and (BASELINE, seed) in values]
        if encoding != BASELINE and len(seeds) > 1:
            differences = [values[encoding, seed] - values[BASELINE, seed] for seed in seeds]
            half = STUDENT_95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
            mean = statistics.mean(differences)
            row |= {f"minus {BASELINE}": mean, "95 % interval": f"{mean - half:+.4f} to {mean + half:+.4f}"}
        table.append(row)
    return table


def table(rows: list[dict]) -> str:
    return markdown_table(summary(rows), ["encoding", "test accuracy", "std", "n", f"minus {BASELINE}", "95 % interval"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_encodings"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        grid = [(encoding, seed) for seed in range(arguments.seeds) for encoding in ENCODINGS]
        runs = [run(encoding, seed, arguments.out / f"{encoding}-s{seed}", arguments.epochs) for encoding, seed in grid]
        write_rows(ROWS, [row for rows in runs for row in rows])
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
