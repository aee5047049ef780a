"""What all pictures share: colours that everyone can tell apart, and files that appear whole or not at all.

Maps are in cividis, lines in the colours of Okabe and Ito; beyond eight lines the dashes change too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from sape2.training.files import beside

MAP_COLOURS = "cividis"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8AB00")  # Okabe and Ito, darker yellow
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX*"


def pyplot() -> Any:
    """matplotlib without a window; raises ImportError that says how to get it."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'sape2[viz]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], **about: Any) -> None:
    """A legend under the panels, long names in several lines; the figure grows by it, so that the panels keep their size."""
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), 4, int(14 * width / (max(map(len, labels), default=1) + 6))))
    wrapped = [fill(label, int(13 * width / columns) - 6) for label in labels]
    lines = [label.count("\n") + 1 for label in wrapped]
    rows = -(-len(lines) // columns)  # a column is filled from the top
    tallest = max((sum(lines[start : start + rows]) for start in range(0, len(lines), rows or 1)), default=0)
    figure.set_size_inches(width, height + 0.17 * tallest + 0.3)
    figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, fontsize=8, **about)


def save(figure: Any, path: Path) -> None:
    """Writes the figure, in the format that the name ends in, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format=path.suffix[1:].lower())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot().close(figure)
