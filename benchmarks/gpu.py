"""All that is measured on a GPU, in parts of under ten minutes each on one H100; every row says device and versions.

Command:  python benchmarks/gpu.py [PART ...] [--data DIR]     (every part if none is named; docs/gpu.md)
          python benchmarks/gpu.py --tiny                      (the same on small cases, on a CPU too: is anything missing?)

Parts: correctness, attention, training, compiled, input, table. A case that is done is not done again, so a part that was
stopped goes on where it was. A case that fails leaves a row with its error, and the others follow; --again tries it again.
Rows go to benchmarks/results/gpu.jsonl. Nothing is downloaded. The table needs CIFAR-10 in any layout of docs/data.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import gpu_attention
import gpu_correctness
import gpu_training
import torch
from gpu_case import FULL, TINY, Case, NotAvailable
from timing import RESULTS, Row, conditions

from sape2.runs.rows import read_rows, write_rows
from sape2.tables import markdown_table

PARTS = {
    "correctness": gpu_correctness.cases,
    "attention": gpu_attention.cases,
    "training": gpu_training.eager,
    "compiled": gpu_training.compiled,
    "input": gpu_training.input_path,
    "table": gpu_training.table,
}
SECONDS = 540  # after which a part begins no further case
PACKAGES = ("torchvision", "timm", "accelerate", "triton")
SAME = ("device", "torch", "tiny")  # of a row: else it is another measurement


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--tiny", action="store_true", help="small cases, on a CPU where there is no GPU")
    parser.add_argument("--data", help="CIFAR-10, for the table")
    parser.add_argument("--again", action="store_true", help="tries again what failed or was not available")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a part (default {SECONDS})")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run folders of the table (default runs/gpu)")
    parser.add_argument("--out", type=Path, help="rows (default benchmarks/results/gpu.jsonl, with --tiny RUNS/tiny.jsonl)")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no CUDA device here; --tiny tries everything on a CPU")
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.size = TINY if options.tiny else FULL
    path = options.out or (options.runs / "tiny.jsonl" if options.tiny else RESULTS / "gpu.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = conditions_of(options.device) | {"tiny": options.tiny}
    for part in options.parts or PARTS:
        if not run_part(part, PARTS[part](options), path, about, options.seconds, options.again):
            print("the device no longer answers; give the command again, which goes on behind this case", file=sys.stderr)
            return 1
    return 0


def conditions_of(device: torch.device) -> Row:
    versions = {name: _version(name) for name in PACKAGES}
    about = conditions() | versions | {"device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        about |= {"device": properties.name, "capability": capability, "device_bytes": properties.total_memory}
        about |= {"cuda": torch.version.cuda}
    return about


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_part(part: str, cases: Iterable[Case], path: Path, about: Row, seconds: float, again: bool) -> bool:
    """Runs what is not done yet and writes its rows one by one; False if the device is lost."""
    rows, began = read_rows(path), time.perf_counter()
    if again:
        rows = [row for row in rows if row["part"] != part or not {"error", "note"} & row.keys()]
    done = {row["case"] for row in rows if row["part"] == part and all(row.get(name) == about[name] for name in SAME)}
    new, all_cases = [], list(cases)
    waiting = [case for case in all_cases if case.name not in done]
    while waiting and time.perf_counter() - began <= seconds:
        case = waiting.pop(0)
        print(f"{part}: {case.name}", file=sys.stderr, flush=True)
        found = [{"part": part, "case": case.name} | row | about for row in attempt(case)]
        new += found
        rows += found
        write_rows(path, rows)
        if not answers():
            return False
    shown = [{key: value for key, value in row.items() if key not in about} for row in new]
    columns = list(dict.fromkeys(key for row in shown for key in row if key != "part"))
    left = f"; {len(waiting)} cases left, give the command again" if waiting else ""
    print(f"\n{part}: {len(new)} new rows of {len(all_cases)} cases in {path}{left}\n")
    if new:
        print(markdown_table(shown, columns), flush=True)
    for row in new:
        if row.get("ok") is False or "error" in row:
            print(f"NOT OK: {row['case']}", file=sys.stderr)
    return True


def attempt(case: Case) -> list[Row]:
    """The rows of a case, or one with the reason why there are none."""
    try:
        return case.run()
    except NotAvailable as reason:
        return [{"note": f"not available: {reason}"}]
    except Exception as error:  # whatever it is, the others are still to be measured
        return [{"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]


def answers() -> bool:
    """Whether the device can still be used: a kernel that reads where it must not takes it away from the process."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
