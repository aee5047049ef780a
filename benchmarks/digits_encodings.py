"""Every encoding on scikit-learn's digits: same recipe, same images, same weights elsewhere, several seeds.

Command:  python benchmarks/digits_encodings.py --out DIR      (about half a minute a run on two CPU cores)
Resumes where it stopped. Writes benchmarks/results/digits_encodings.jsonl, one row a run, and prints the table of
docs/results.md from it; --table prints it from the rows that are there, without running anything.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from sape2.cli import main as sape2
from sape2.report import markdown_table

ROWS = Path(__file__).parent / "results" / "digits_encodings.jsonl"
ENCODINGS = [
    "none", "ape", "sincos", "cpe", "rope", "rope_mixed", "rpe", "rpe_contextual", "rpe_decomposed", "alibi", "cope",
    "ape+cope", "sape2", "ape+sape2", "ape+sape2:preset=equations", "ape+sape2:dot=key", "ape+rope",
]  # fmt: skip
BASELINE = "ape"
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % quantile of Student's t by degrees of freedom


def run(encoding: str, seed: int, folder: Path, epochs: int) -> list[dict]:
    """The last-epoch accuracy rows of one run."""
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
    if sape2(command):
        raise SystemExit(f"{encoding} seed {seed} did not finish")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["name"] == "accuracy"]


def summary(rows: list[dict]) -> list[dict]:
    """Mean, spread and n per encoding, and the paired difference to the baseline over the seeds both have."""
    by_encoding: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["weights"] == "last":
            by_encoding.setdefault(row["encoding"], {})[row["seed"]] = row["value"]
    table = []
    for encoding, values in by_encoding.items():
        seeds = sorted(set(values) & set(by_encoding[BASELINE]))
        differences = [values[seed] - by_encoding[BASELINE][seed] for seed in seeds]
        row = {"encoding": encoding, "test accuracy": statistics.mean(values.values()), "n": len(values)}
        if len(values) > 1:
            row["std"] = statistics.stdev(values.values())
        if encoding != BASELINE and len(seeds) > 1:
            half = STUDENT_95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
            mean = statistics.mean(differences)
            row |= {f"minus {BASELINE}": mean, "95 % interval": f"{mean - half:+.4f} to {mean + half:+.4f}"}
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_encodings"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = []
        for seed in range(arguments.seeds):
            for number, encoding in enumerate(ENCODINGS):
                rows += run(encoding, seed, arguments.out / f"{number:02d}-s{seed}", arguments.epochs)
                ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    print(markdown_table(summary(rows), ["encoding", "test accuracy", "std", "n", f"minus {BASELINE}", "95 % interval"]))


if __name__ == "__main__":
    main()
