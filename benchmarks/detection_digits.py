"""Detection with different encodings on the composed set: same images, same weights elsewhere, several seeds.

Command:  python benchmarks/detection_digits.py --out DIR
Resumes where it stopped. Writes benchmarks/results/detection_digits.jsonl, one row a number, and
prints mean, spread and the paired difference to ape; --table prints it from the rows that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from sape2.cli import main as sape2
from sape2.runs.rows import read_rows, write_rows
from sape2.studies.compare.summary import grouped, interval, summarize
from sape2.tables import markdown_table

ROWS = Path(__file__).parent / "results" / "detection_digits.jsonl"
BASELINE = "ape"
MEASURES = ("box_map", "box_map_50", "box_map_75")


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
    table = []
    for encoding, found in summarize(grouped(row for row in rows if row["name"] == name), BASELINE).items():
        line = {"measure": name, "encoding": encoding, "mean": found.mean, "std": found.std, "n": found.n}
        paired = {f"minus {BASELINE}": found.pair.difference, "95 % interval": interval(found.pair)} if found.pair else {}
        table.append(line | paired)
    return table


def table(rows: list[dict]) -> str:
    columns = ["measure", "encoding", "mean", "std", "n", f"minus {BASELINE}", "95 % interval"]
    return markdown_table([line for name in MEASURES for line in summary(rows, name)], columns)


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
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
