"""What attention costs under each encoding, against plain attention and against the forms other people have.

Command:  python benchmarks/attention_cost.py        (about three minutes on two CPU cores)
Float32, 6 heads of 64. All contenders take turns in every round, so what slows the machine meets all of them. Prints a
Markdown table for every shape (medians, ratios of medians) and writes benchmarks/results/attention_cost.jsonl.
"""

from __future__ import annotations

from functools import partial

import torch
from peers import PLAIN, PLAIN_FUSED, contenders, random_tokens
from timing import Row, compare, conditions, parser, save

from sape2.encodings.grid import Grid
from sape2.evaluation.cost.measure import forward, forward_backward
from sape2.tables import markdown_table

SHAPES: list[tuple[int, Grid]] = [(64, (8, 8)), (16, (14, 14)), (4, (24, 24))]
HEADS, HEAD_DIM = 6, 64


def measure(images: int, grid: Grid, rounds: int, only: str) -> list[Row]:
    """One row for every contender and phase."""
    torch.manual_seed(0)
    inputs = random_tokens(images, HEADS, grid, HEAD_DIM)
    modules = {
        name: module for name, module in contenders(HEADS, HEAD_DIM, grid).items() if name.startswith("plain") or only in name
    }
    rows = []
    for step in (forward_backward, forward):
        results = compare({name: partial(step, module, inputs) for name, module in modules.items()}, rounds)
        plain = results[PLAIN]["ms"]
        best = min(plain, results[PLAIN_FUSED]["ms"])
        for name, result in results.items():
            with torch.set_grad_enabled(step is forward_backward):
                path = modules[name].describe(*inputs[:3])
            ratios = {"to_plain_products": result["ms"] / plain, "to_best_plain": result["ms"] / best}
            shape = {"images": images, "grid": f"{grid[0]}x{grid[1]}", "heads": HEADS, "head_dim": HEAD_DIM}
            rows.append({"form": name, "phase": step.__name__} | shape | result | ratios | {"path": path})
    return rows


def table(rows: list[Row]) -> str:
    """One line for every contender: both phases, their spread, and the ratios of forward plus backward."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["form"], {"form": row["form"]})
        short = "f+b" if row["phase"] == "forward_backward" else "f"
        line |= {f"{short}, ms": row["ms"], f"{short}, p10 to p90": f"{row['p10']:.1f} to {row['p90']:.1f}"}
        line |= {f"{short} / plain": row["to_plain_products"], f"{short} / best plain": row["to_best_plain"]}
        if short == "f+b":
            line["path of f+b"] = row["path"]
    columns = [f"{short}{what}" for short in ("f+b", "f") for what in (", ms", ", p10 to p90", " / plain", " / best plain")]
    return markdown_table(lines.values(), ["form", *columns, "path of f+b"])


def main() -> None:
    arguments_parser = parser(__doc__, "attention_cost.jsonl", rounds=11)
    arguments_parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose name has this in it, and plain")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = conditions() | {"dtype": "float32"}
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    everything = []
    for images, grid in SHAPES:
        rows = measure(images, grid, arguments.rounds, arguments.only)
        print(f"{images} images of {grid[0]}x{grid[1]} tokens, n = {arguments.rounds}\n\n{table(rows)}", flush=True)
        everything += [row | about for row in rows]
    save(arguments.out, everything)


if __name__ == "__main__":
    main()
