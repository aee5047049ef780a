"""The picture of docs/architecture.md: the rooms of the package and who imports whom, read off the source.

Command:  python docs/figures/architecture.py       (writes docs/figures/architecture.png)

An arrow goes from a room to one that it imports; its width grows with the number of imports. Rooms stand in layers: a
room is one layer above the highest that it imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "sape2"
OUT = Path(__file__).with_suffix(".png")


def room_of(path: Path) -> str:
    """ "training" for training/loop.py; explain and explore, which show what others measure, are a room beside viz."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts[0] == "viz" and parts[1] in ("explain", "explore"):
        return "viz: explain, explore"
    return parts[0]


def imports() -> Counter[tuple[str, str]]:
    """(room, room that it imports): how often, imports inside functions included."""
    found: Counter[tuple[str, str]] = Counter()
    for path in SOURCE.rglob("*.py"):
        if path.name.startswith("__") and path.parent == SOURCE:
            continue  # names looked up when first used
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sape2."):
                goal = SOURCE.joinpath(*(node.module or "").split(".")[1:])
                found[room_of(path), room_of(goal if goal.is_dir() and goal != SOURCE / "viz" else goal / "x")] += 1
    return Counter({pair: count for pair, count in found.items() if pair[0] != pair[1]})


def layers(edges: Counter[tuple[str, str]]) -> dict[str, int]:
    """A room's height. Raises graphlib.CycleError if rooms import each other in a circle."""
    below: dict[str, set[str]] = {room: set() for pair in edges for room in pair}
    for room, other in edges:
        below[room].add(other)
    heights: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        heights[room] = 1 + max((heights[other] for other in below[room]), default=-1)
    return heights


def places(heights: dict[str, int]) -> dict[str, tuple[float, float]]:
    """(x, y) of each room, the rooms of a layer spread evenly."""
    found = {}
    for height in set(heights.values()):
        row = sorted(room for room, at in heights.items() if at == height)
        for index, room in enumerate(row):
            found[room] = ((index + 0.5) / len(row) + 0.06 * (height % 2 - 0.5), float(height))
    return found


def draw(edges: Counter[tuple[str, str]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = places(layers(edges))
    figure, axes = plt.subplots(figsize=(9, 7.2), layout="constrained")
    for (room, other), count in sorted(edges.items()):
        style = {"arrowstyle": "-|>", "color": "0.55", "lw": 0.4 + 0.12 * min(count, 15), "shrinkA": 12, "shrinkB": 14}
        axes.annotate("", xy=at[other], xytext=at[room], arrowprops=style | {"connectionstyle": "arc3,rad=0.08"})
    for room, (x, y) in at.items():
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8f1fa", "edgecolor": "#2b6ca3"}
        axes.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.5, max(y for _, y in at.values()) + 0.5))
    axes.axis("off")
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(imports(), OUT)
