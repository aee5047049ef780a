"""The results of `sape2 cost`, as rows for programs, tables for people and lines for figures."""

from __future__ import annotations

import statistics
from functools import partial

from sape2.evaluation import base
from sape2.evaluation.cost.measure import MIB, growth_exponent
from sape2.evaluation.cost.timing import spread
from sape2.tables import Row

LEVELS = ("attention", "model")
PHASES = {"attention": ("forward", "forward_backward"), "model": ("inference", "training_step")}
YARDSTICKS = ("none", "plain")
SHORT = {"forward_backward": "f + b", "training_step": "step"}
_row = partial(base.row, "cost")


def counted_rows(parameters: int, macs: int, path: str | None) -> list[Row]:
    return [
        _row("parameters", parameters, "parameters", 1, "all parameters", path=path),
        _row("macs", macs, "MACs per image", 1, "forward pass of one image, counted on meta", path=path),
    ]


def timed_rows(phase: str, name: str, results: dict[str, Row], batch: int) -> list[Row]:
    """Time, speed, memory, and their ratios to the yardsticks; values None and the `note` where it did not run."""
    result = results[name]
    note = {key: result[key] for key in ("note", "path") if key in result}
    times = result.get("seconds", [])
    n, median = len(times), statistics.median(times) if times else None
    ms = [1e3 * seconds for seconds in times]
    speeds = [batch / seconds for seconds in times]
    memory = result.get("bytes")
    protocol, peak = "median of alternating repeats", "highest extra bytes, allocator"
    rows = [
        _row(f"{phase}_ms", median and 1e3 * median, "ms", n, protocol, **_spread(ms), **note),
        _row(f"{phase}_images_per_s", median and batch / median, "images/s", n, protocol, **_spread(speeds), **note),
        _row(f"{phase}_memory", None if memory is None else memory / MIB, "MiB", int(memory is not None), peak, **note),
    ]
    for yardstick in (other for other in YARDSTICKS if other in results):
        base = results[yardstick]
        ratio = median / statistics.median(base["seconds"]) if median and base.get("seconds") else None
        rows.append(_row(f"{phase}_ms_to_{yardstick}", ratio, "ratio", n, f"of medians, to {yardstick}", **note))
        more = memory / base["bytes"] if memory and base.get("bytes") else None
        rows.append(_row(f"{phase}_memory_to_{yardstick}", more, "ratio", int(bool(more)), f"to {yardstick}", **note))
    return rows


def _spread(values: list[float]) -> Row:
    low, high = spread(values) if len(values) > 1 else (None, None)  # one time has no spread
    return {"p10": low, "p90": high}


def growth_rows(rows: list[Row]) -> list[Row]:
    """Rows with the growth exponents of time and memory in N, for every encoding and phase, over the measured grids."""
    groups: dict[tuple, list[Row]] = {}
    same = ("name", "encoding", "level", "dtype", "batch")
    for row in rows:
        if row["name"].endswith(("_ms", "_memory")) and row["value"]:
            groups.setdefault(tuple(row[key] for key in same), []).append(row)
    result = []
    for group in groups.values():
        points = {row["tokens"]: row["value"] for row in group}
        if len(points) < 2:
            continue
        smallest, largest = min(group, key=lambda row: row["tokens"]), max(group, key=lambda row: row["tokens"])
        paths = "; ".join(dict.fromkeys(row["path"] for row in group))
        exponent = _row(
            f"{smallest['name']}_growth", growth_exponent([*points.items()]), "exponent of N", len(points),
            "slope of log value over log N, least squares", path=paths,
        )  # fmt: skip
        about = {key: value for key, value in smallest.items() if key not in exponent and key not in ("p10", "p90", "note")}
        result.append(exponent | about | {"grid": f"{smallest['grid']} to {largest['grid']}", "tokens": None})
    return result


# --- tables and lines ------------------------------------------------------------------------------------------------


def count_table(rows: list[Row]) -> list[Row]:
    """Parameters and MACs of one cell, and the path of the phase with gradients; one line for each encoding."""
    lines = _lines(rows)
    for found in rows:
        line = lines[found["encoding"]]
        if found["name"] == "parameters":
            line["parameters"] = found["value"]
        elif found["name"] == "macs":
            line["MACs, M"] = found["value"] / 1e6
        elif found["name"] == f"{PHASES[found['level']][1]}_ms":
            line["path"] = found.get("path") or found["note"]
    return list(lines.values())


def time_table(rows: list[Row]) -> list[Row]:
    """Times of one cell; spread, speed, memory and ratios are those of the phase with gradients."""
    lines, (short, long) = _lines(rows), PHASES[rows[0]["level"]]
    headings = {f"{short}_ms": f"{short}, ms", f"{long}_ms": f"{SHORT[long]}, ms", f"{long}_images_per_s": "images/s"}
    headings |= {f"{long}_memory": "peak, MiB"} | {f"{long}_ms_to_{name}": f"/ {name}" for name in YARDSTICKS}
    for found in (found for found in rows if found["name"] in headings):
        line = lines[found["encoding"]]
        line[headings[found["name"]]] = found["value"]
        if found["name"] == f"{long}_ms":
            line["p10 to p90"] = None if found["p10"] is None else f"{found['p10']:.1f} to {found['p90']:.1f}"
    return list(lines.values())


def _lines(rows: list[Row]) -> dict[str, Row]:
    names = {row["encoding"]: row["timed_as"] for row in rows}
    return {name: {"encoding": name if timed == name else f"{name} (= {timed})"} for name, timed in names.items()}


def lines_of_growth(rows: list[Row], quantity: str) -> dict[str, dict[str, list[tuple[int | float, int | float]]]]:
    """Panels for `viz.plot_growth`: for every level, dtype and batch, the points (N, value) of every encoding.

    `quantity` is "ms" or "memory", of forward plus backward or a training step. What was timed as another is left out.
    """
    panels: dict[str, dict[str, list[tuple[int | float, int | float]]]] = {}
    wanted = {f"{PHASES[level][1]}_{quantity}" for level in LEVELS}
    for row in rows:
        if row["name"] in wanted and row["value"] and row["timed_as"] == row["encoding"]:
            what = "attention" if row["level"] == "attention" else row["model"]
            phase = row["name"].removesuffix(f"_{quantity}").replace("_", " ")
            panel = panels.setdefault(f"{what}, {phase}, {row['dtype']}, batch {row['batch']}", {})
            panel.setdefault(row["encoding"], []).append((row["tokens"], row["value"]))
    return panels
