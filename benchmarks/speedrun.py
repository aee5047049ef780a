"""How long a plain ViT takes to an accuracy on CIFAR-10, from its first step: on two CPU cores, or on what there is.

Command:  python benchmarks/speedrun.py --data DIR [--recipe cifar10_sprint] [--encoding ape] [--seeds 3] [--threads 2]
                                        [--target 0.80] [--set KEY=VALUE …] [--out FILE]

DIR holds the folder cifar10. Each seed is trained from the start to the end of the recipe; nothing else may run on the
machine. Time is that of the training steps, augmentation included; measuring is not in it. The run counts if the mean test
accuracy of the last epoch reaches the target. Rows go to FILE (default benchmarks/results/leaderboard/RECIPE-ENCODING.jsonl),
which is an entry of docs/leaderboard.md: `python benchmarks/leaderboard.py check FILE`. Seeds that FILE has are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from leaderboard import ENTRIES, problems
from sprint import keep, run_of, trained
from sprint_plan import Trial

from sape2.runs.files import safe_name
from sape2.runs.rows import read_rows
from sape2.studies.compare.rawrows import final_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="cifar10_sprint")
    parser.add_argument("--encoding", default="ape")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = given.out or ENTRIES / f"{given.recipe}-{safe_name(given.encoding)}.jsonl"
    trials = [Trial(given.recipe, given.encoding, seed, settings=tuple(given.set)) for seed in range(given.seeds)]
    run(trials, given.data, rows, given.threads)
    print(report(rows, given.target))


def run(trials: list[Trial], data: Path | None, rows: Path, threads: int) -> None:
    """Each in a folder of its own that is thrown away: a run that was interrupted has no time of its own."""
    import torch

    torch.set_num_threads(threads)
    for trial in trials:
        if trial.digest not in {row["digest"] for row in read_rows(rows)}:
            with tempfile.TemporaryDirectory() as folder:
                run = run_of(trial, data, Path(folder) / "run")
                with run.hold():
                    keep(trained(trial, run), rows)


def report(path: Path, target: float) -> str:
    """Whether the target is reached, in which time, and what keeps the rows from being an entry."""
    rows = read_rows(path)
    mean = statistics.mean(map(final_accuracy, rows))
    seconds = statistics.median(row["training_s"] for row in rows)
    verdict = "reached" if mean >= target else "missed"
    lines = [f"{target:g} {verdict}: {mean:.4f} in {seconds:.0f} s (median), {len(rows)} seeds, {rows[0]['processor']}"]
    return "\n".join([*lines, *(f"not an entry yet: {problem}" for problem in problems(rows)), f"rows in {path}"])


if __name__ == "__main__":
    main()
