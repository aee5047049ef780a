"""Detection with different encodings on the composed set: same images, same weights elsewhere, several seeds.

Command:  python benchmarks/detection_digits.py --out DIR
Resumes where it stopped, at the end of an epoch. Writes benchmarks/results/detection_digits.jsonl, one row a number, and
prints mean, spread and the paired difference to ape; --table prints it from the rows that are there.
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

ROWS = Path(__file__).parent / "results" / "detection_digits.jsonl"
BASELINE = "ape"
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % quantile of Student's t by degrees of freedom


def run(encoding: str, seed: int, out: Path, settings: list[str]) -> list[dict]:
    """The rows of one run, which goes on where it stopped."""
    folder = out / f"{encoding}-s{seed}"
    command = ["detect", "coco_digits", "--encoding", encoding, "--seed", str(seed), "--data", str(out / "data")]
    command += [part for setting in settings for part in ("--set", setting)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = sape2([*command, "--out", str(folder), "--json"])
    if status:
        raise SystemExit(f"{encoding} seed {seed} did not finish")
    return read_rows(folder / "results.jsonl")


def summary(rows: list[dict], name: str) -> list[dict]:
    """Mean, spread and n per encoding, and the paired difference to the baseline over the seeds both have."""
    chosen = [row for row in rows if row["name"] == name]
    values = {(row["encoding"], row["seed"]): row["value"] for row in chosen}
    table = []
    for group in summarize(chosen):
        encoding = group["encoding"]
        row = {"name": name, "encoding": encoding, "mean": group["mean"], "std": group["std"], "n": group["n"]}
        seeds = [seed for other, seed in values if other == encoding and (BASELINE, seed) in values]
        if encoding != BASELINE and len(seeds) > 1:
            differences = [values[encoding, seed] - values[BASELINE, seed] for seed in seeds]
            half = STUDENT_95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
            mean = statistics.mean(differences)
            row |= {f"minus {BASELINE}": mean, "95 % interval": f"{mean - half:+.4f} to {mean + half:+.4f}"}
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/detection_digits"))
    parser.add_argument("--encodings", default="ape,ape+sape2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for sape2 detect")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        grid = [(encoding, seed) for seed in range(arguments.seeds) for encoding in arguments.encodings.split(",")]
        write_rows(ROWS, [row for encoding, seed in grid for row in run(encoding, seed, arguments.out, arguments.set)])
    columns = ["name", "encoding", "mean", "std", "n", f"minus {BASELINE}", "95 % interval"]
    rows = read_rows(ROWS)
    print(markdown_table([line for name in ("box_map", "box_map_50") for line in summary(rows, name)], columns))


if __name__ == "__main__":
    main()
