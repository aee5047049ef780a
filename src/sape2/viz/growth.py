"""Charts of cost against the number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sape2.viz.base import LETTER, legend_names, line_style, picture, save, subplots

Points = list[tuple[int | float, int | float]]


@picture
def plot_growth(panels: dict[str, dict[str, Points]], path: Path, label: str) -> None:
    """Points (tokens, value) of every named line, one panel a title, both axes logarithmic; grey: growth with N and N^2."""
    number = max(1, len(panels))
    names = legend_names(list(dict.fromkeys(name for lines in panels.values() for name in lines)))
    width = 4.6 * number + 1.5 + LETTER * max(map(len, names.values()), default=0)
    figure, grid = subplots(1, number, figsize=(width, 4.2), squeeze=False)
    for panel, (title, lines) in zip(grid[0], panels.items(), strict=False):
        for index, (name, points) in enumerate(lines.items()):
            panel.plot(*zip(*sorted(points), strict=True), label=names[name], **line_style(index))
        points = [point for line in lines.values() for point in line]
        if len({x for x, _ in points}) > 1:  # of one size nothing grows, and a line of no length would be in the legend
            _mark_slopes(panel, points)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        _plain_ticks(panel, sorted({x for x, _ in points}))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens N")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    handles = {name: handle for panel in grid[0] for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    save(figure, path)


def _plain_ticks(panel: Any, sizes: list[int | float]) -> None:
    """The sizes measured along x, and 1, 2, 5, 10, 20, ... along y, as people write numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45 if len(sizes) > 6 else 0)
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())


def _mark_slopes(panel: Any, points: Points) -> None:
    """Thin lines of growth with N and with N^2 from the lowest point at the smallest N."""
    first, last = min(points), max(x for x, _ in points)
    for power, style in ((1, ":"), (2, "-.")):
        ends = [first[1], first[1] * (last / first[0]) ** power]
        panel.plot([first[0], last], ends, style, color="#999999", linewidth=1, label=f"growth with N{'²' * (power == 2)}")
