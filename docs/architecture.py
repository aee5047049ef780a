"""The picture of docs/architecture.md: the rooms of the package and who imports whom, read off the source.

Command:  python docs/architecture.py       (writes docs/figures/architecture.png)

An arrow goes from a room to one that it imports; its width grows with the number of imports. Where a way along other
arrows leads there too, it is left out. Rooms stand in layers: a room is one layer above the highest that it imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sape2"
OUT = Path(__file__).parent / "figures" / "architecture.png"


def imports(tree: ast.AST) -> set[str]:
    """Everything imported below the package, as "encodings.base"; other packages by their first name, marked "!"."""
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "sape2":
                names = [f"sape2.{alias.name}" for alias in node.names]
        for name in names:
            inside = name == "sape2" or name.startswith("sape2.")
            found.add(name.removeprefix("sape2").removeprefix(".") if inside else "!" + name.split(".")[0])
    return found


@cache
def modules() -> list[tuple[str, ast.AST]]:
    """Every module of the package by its name below it, "encodings" for the folder's `__init__`."""
    result = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        result.append((name, ast.parse(path.read_text())))
    return result


def room_of(module: str) -> str:
    """ "training" for "training.loop"."""
    return module.split(".")[0]


def edges() -> Counter[tuple[str, str]]:
    """(room, room that it imports): how many imports, those inside functions included."""
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    found = Counter(
        (room_of(module), room_of(name))
        for module, tree in modules()
        for name in imports(tree)
        if {room_of(module), room_of(name)} <= rooms
    )
    return Counter({pair: count for pair, count in found.items() if pair[0] != pair[1]})


def layers(edges: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """A room's height. Raises graphlib.CycleError if rooms import each other in a circle."""
    below: dict[str, set[str]] = {room: set() for pair in edges for room in pair}
    for room, other in edges:
        below[room].add(other)
    heights: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        heights[room] = 1 + max((heights[other] for other in below[room]), default=-1)
    return heights


def direct(edges: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Those that no way along others stands for: the transitive reduction."""

    def reached(room: str) -> set[str]:
        return {other for start, other in edges if start == room} | {
            further for start, other in edges if start == room for further in reached(other)
        }

    return {
        (room, other): count
        for (room, other), count in edges.items()
        if not any(other in reached(between) for start, between in edges if start == room)
    }


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
    boxes = {}
    for room, (x, y) in at.items():
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8f1fa", "edgecolor": "#2b6ca3"}
        boxes[room] = axes.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box).get_bbox_patch()
    for (room, other), count in sorted(direct(edges).items()):
        style = {"arrowstyle": "-|>", "color": "0.45", "lw": 0.6 + 0.12 * min(count, 15), "mutation_scale": 14}
        style |= {"patchA": boxes[room], "patchB": boxes[other], "shrinkA": 0, "shrinkB": 1}
        axes.annotate("", xy=at[other], xytext=at[room], arrowprops=style)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.5, max(y for _, y in at.values()) + 0.5))
    axes.axis("off")
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(edges(), OUT)
