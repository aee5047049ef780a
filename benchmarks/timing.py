"""What the benchmarks share besides the contenders: steps to time, and the conditions that every row carries."""

from __future__ import annotations

import argparse
import datetime
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from sape2.evaluation.cost.timing import alternate, spread
from sape2.runs.rows import write_rows
from sape2.tables import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def compare(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """`ms` (median), `p10`, `p90` and `n` of each step, in milliseconds, the steps taken in turn."""
    return {name: summary([1e3 * t for t in times]) for name, times in alternate(steps, rounds).items()}


def summary(milliseconds: list[float]) -> Row:
    p10, p90 = spread(milliseconds)
    return {"ms": statistics.median(milliseconds), "p10": p10, "p90": p90, "n": len(milliseconds)}


def conditions() -> Row:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{processor()}, {platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """With "-dirty" where files other than rows differ from it; None where there is no git, or the files are no checkout."""
    if shutil.which("git") is None or not (found := _git("rev-parse", "--short", "HEAD")):
        return None
    return found + ("-dirty" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    """The name the processor gives itself, where the system says it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor()


def parser(description: str | None, results: str, rounds: int) -> argparse.ArgumentParser:
    """--rounds, --threads and --out, which all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"alternating rounds after the warm-up (default {rounds})")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / results, help=f"rows (default benchmarks/results/{results})")
    return parser


def save(path: Path, rows: list[Row]) -> None:
    write_rows(path, rows)
    print(f"{len(rows)} rows in {path}")
