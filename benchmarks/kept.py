"""What the scripts share that keep measured rows in benchmarks/results and make tables from them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from timing import Row

from sape2.runs.rows import read_rows, write_rows
from sape2.tables import markdown_table

MARKED = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str, table: Callable[[str], str]) -> str:
    """The page with every marked table made again from the name in its mark."""
    return MARKED.sub(lambda mark: f"{mark[1]}\n{table(mark[2])}\n{mark[3]}", page)


def last_test_rows(folder: Path) -> list[Row]:
    """What `sape2 evaluate` left in a run of the test set and the weights of the last epoch."""
    return [row for row in read_rows(folder / "results.jsonl") if (row["split"], row["weights"]) == ("test", "last")]


def six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def ranked_table(lines: list[Row], first: Sequence[float], second: Sequence[float]) -> str:
    """A table, and below it how far two numbers of its lines agree in rank."""
    from scipy.stats import spearmanr

    agreement = spearmanr(first, second).statistic
    return markdown_table(lines, list(lines[0])) + f"\nRank correlation (Spearman): {agreement:.2f}\n"


def keep_and_print(path: Path, collect: Callable[[list[Path]], list[Row]], tables: Callable[[list[Row]], str]) -> None:
    """Keeps the rows of the run folders on the command line, if there are any; prints the tables of the rows that are kept."""
    if len(sys.argv) > 1:
        write_rows(path, collect([Path(name) for name in sys.argv[1:]]))
    print(tables(read_rows(path)))
