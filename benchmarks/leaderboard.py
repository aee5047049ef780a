"""docs/leaderboard.md from rows: accuracy, images, operations and seconds of whole trainings; and the check of an entry.

Command:  python benchmarks/leaderboard.py              writes the table into docs/leaderboard.md
          python benchmarks/leaderboard.py check FILE   says what keeps a file from being an entry (status 1), or nothing

An entry is a file of raw rows in benchmarks/results/leaderboard, one a seed, as `benchmarks/speedrun.py` writes it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from kept import with_tables
from timing import RESULTS, ROOT, Row

from sape2.studies.compare.rawrows import check_one_study, final_accuracy, read_raw
from sape2.studies.compare.summary import mean_and_std
from sape2.tables import format_spread, markdown_table

ENTRIES = RESULTS / "leaderboard"
PAGE = ROOT / "docs" / "leaderboard.md"
START, END = "<!-- table: leaderboard -->\n", "<!-- end -->\n"
SETS = {"cifar10": 10_000, "cifar100": 10_000}  # test images
SEEDS = 3
TARGETS = (0.70, 0.80, 0.86)
TRAINING = 3  # operations of a training step over those of a forward pass
NEEDED = ("command", "processor", "threads", "commit", "torch", "precision", "training_s", "macs_per_image")
COLUMNS = ["data", "encoding", "recipe", "accuracy", "n", "images seen", "PFLOP", "seconds", "on", "commit"]


def problems(rows: list[Row]) -> Iterator[str]:
    """What keeps rows from being an entry, a line each."""
    if any("failed" in row for row in rows):
        yield "a run failed"
        return
    seeds = {row["seed"] for row in rows}
    if len(seeds) < SEEDS or len(seeds) < len(rows):
        yield f"it needs at least {SEEDS} different seeds; got {', '.join(str(row['seed']) for row in rows) or 'none'}"
    try:
        check_one_study(rows)
    except ValueError as error:
        yield str(error)
    for row in rows:
        where, settings = f"seed {row['seed']}", row["settings"]
        missing = [key for key in NEEDED if not row.get(key)]
        if missing:
            yield f"{where} does not say its {', '.join(missing)}"
        if row["data"] not in SETS:
            yield f"{where} is on {row['data']}; known: {', '.join(SETS)}"
            continue
        if settings["data"]["train_limit"] is not None:
            yield f"{where} leaves out training images"
        whole = [r for r in row["rows"] if (r["name"], r["weights"]) == ("accuracy", "last")]
        if [r["n"] for r in whole] != [SETS[row["data"]]]:
            yield f"{where} needs one accuracy of the last epoch on all {SETS[row['data']]} test images"
        if row["curve"]["epoch"] != list(range(1, settings["train"]["epochs"] + 1)):
            yield f"{where} has not all {settings['train']['epochs']} epochs in its curve"


def images_seen(row: Row, epochs: int | None = None) -> int:
    """Images of the training set that updates were made from; the rest of an epoch's last batch is left out."""
    train, share = row["settings"]["train"], 1 - row["settings"]["data"]["validation_fraction"]
    per_epoch = round(50_000 * share) // train["batch_size"] * train["batch_size"]
    return per_epoch * (train["epochs"] if epochs is None else epochs)


def petaflop(row: Row, images: int) -> float:
    """Two operations a multiplication with addition, three passes a step; element-wise work is not counted."""
    return 2 * TRAINING * row["macs_per_image"] * images / 1e15


def seconds_to(row: Row, target: float) -> float | None:
    """Of training until an epoch ends with that accuracy on the validation images; None if none does."""
    seconds = 0.0
    for accuracy, took in zip(row["curve"]["validation_accuracy"], row["curve"]["seconds"], strict=True):
        seconds += took
        if accuracy >= target:
            return seconds
    return None


def line(rows: list[Row]) -> Row:
    """One entry."""
    first, accuracies = rows[0], [final_accuracy(row) for row in rows]
    images = images_seen(first)
    entry: Row = {
        "data": first["data"],
        "encoding": f"`{first['encoding']}`",
        "recipe": f"`{first['recipe']}`",
        "accuracy": format_spread(*mean_and_std(accuracies), 4),
        "n": len(rows),
        "images seen": f"{images:,}",
        "PFLOP": f"{petaflop(first, images):.2f}",
        "seconds": f"{statistics.median(row['training_s'] for row in rows):.0f}",
        "on": f"{first['processor']}, {first['threads']} threads, {first['precision']}",
        "commit": first["commit"],
    }
    for target in TARGETS:
        times = [seconds_to(row, target) for row in rows]
        known = [time for time in times if time is not None]
        entry[_heading(target)] = f"{statistics.median(known):.0f}" if len(known) == len(times) else ""
    return entry


def _heading(target: float) -> str:
    return f"s to {target:.2f}"


def table(entries: dict[str, list[Row]]) -> str:
    """Best first on each data set. Raises ValueError for a file that is no entry."""
    for name, rows in entries.items():
        for problem in problems(rows):
            raise ValueError(f"{name}: {problem}")
    ordered = sorted(entries.values(), key=lambda rows: (rows[0]["data"], -statistics.mean(map(final_accuracy, rows))))
    return markdown_table(map(line, ordered), [*COLUMNS[:8], *map(_heading, TARGETS), *COLUMNS[8:]])


def kept() -> dict[str, list[Row]]:
    return {path.name: read_raw(path) for path in sorted(ENTRIES.glob("*.jsonl"))}


def written(page: str, entries: dict[str, list[Row]]) -> str:
    """The page with its table made again."""
    return with_tables(page, lambda name: table(entries))


def main() -> None:
    match sys.argv[1:]:
        case []:
            PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), kept()), encoding="utf-8")
        case ["check", file]:
            found = list(problems(read_raw(Path(file))))
            print("\n".join(found) or f"{file} is an entry")
            raise SystemExit(bool(found))
        case _:
            raise SystemExit((__doc__ or "").strip())


if __name__ == "__main__":
    main()
