"""Common parts of all charts: colours that colour-blind readers can distinguish, legends and atomic files.

Maps are in cividis, lines in the colours of Okabe and Ito; beyond eight lines the dashes change too.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from textwrap import fill
from typing import Any, ParamSpec, TypeVar

from sape2.config.extras import from_extra
from sape2.runs.files import write_atomic

MAP_COLOURS = "cividis"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8AB00")  # Okabe and Ito, darker yellow
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX*"
PLAIN_TEXT = {"text.usetex": False, "text.parse_math": False, "axes.formatter.use_mathtext": False}
Given = ParamSpec("Given")
Made = TypeVar("Made")


def import_optional(name: str) -> Any:
    """A library of the extra `viz`, which `explore` has too; raises ImportError that says how to get it."""
    return from_extra("viz", name, f"pictures need {name.replace('_', '-')}")


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **grid: Any) -> tuple[Any, Any]:
    """A figure and its panels, as of `pyplot.subplots`. pyplot is not used: the caller's backend and open figures stay."""
    import_optional("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **grid)


def pyplot() -> Any:
    """Imports matplotlib with a backend that opens no window, for scripts that draw with pyplot."""
    import_optional("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def picture(draw: Callable[Given, Made]) -> Callable[Given, Made]:
    """Decorates a function that draws a figure: names are drawn as plain text, whatever they contain and the user's settings.

    Without this "A$^$B" is a formula that cannot be read, "$a$" is shown as another name, and usetex gives all to LaTeX.
    Characters that the font lacks are drawn as boxes, without a warning for each.
    """

    @wraps(draw)
    def drawn(*given: Given.args, **named: Given.kwargs) -> Made:
        mpl = import_optional("matplotlib")

        with mpl.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            mpl.rcdefaults()
            mpl.rcParams.update(PLAIN_TEXT)
            return draw(*given, **named)

    return drawn


def plain(name: str) -> str:
    """A name in one line, without what no figure can show: control characters, and bytes that are no UTF-8."""
    return " ".join(re.split(r"[\x00-\x1f\x7f-\x9f]+", name.encode("utf-8", "backslashreplace").decode("utf-8")))


def as_text(name: str) -> str:
    """A name as a chart can show it: plain, and with no "_" in front, by which a legend would leave it out."""
    return f" {plain(name)}" if name.startswith("_") else plain(name)


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], **about: Any) -> None:
    """A legend under the panels, with long names in several lines; the figure is enlarged, so that the panels keep their size.

    Where that would take more than half the height of the panels, names are shortened to a line and stand in more columns.
    """
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), 4, int(14 * width / (max(map(len, labels), default=1) + 6))))
    texts = [fill(label, int(13 * width / columns) - 6) for label in labels]
    most = max(1, int((height / 2 - 0.3) / LINE))
    if _tallest(texts, columns) > most:
        columns = min(max(columns, -(-len(labels) // most)), int(width / 2.2))  # 2.2 in: room for some twenty characters
        texts = shortened(labels, int(13 * width / columns) - 6)
    figure.set_size_inches(width, height + LINE * _tallest(texts, columns) + 0.3)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8, **about)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line: no two alike up to twenty-four."""
    turn = index // len(LINES)
    marker = MARKERS[(index + turn) % len(MARKERS)]
    return {"color": LINES[index % len(LINES)], "linestyle": DASHES[turn % len(DASHES)], "marker": marker, "markersize": 4}


LETTER = 0.07  # inches of the figure for a character beside a panel
LINE = 0.17  # inches of the figure for a line of the legend


def _tallest(texts: Sequence[str], columns: int) -> int:
    """Lines of the longest column; a column is filled from the top."""
    lines = [text.count("\n") + 1 for text in texts]
    rows = -(-len(lines) // columns) or 1
    return max((sum(lines[start : start + rows]) for start in range(0, len(lines), rows)), default=0)


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many characters that stay different: of long ones what they share goes first, then the middle."""
    parts = {name: re.split(r"(?=[+:,])", name) for name in names if len(name) > most}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    found = [_cut(_without(parts[name], shared), most) if name in parts else name for name in names]
    return [f"{_cut(text, most - 4)} #{at}" if found.count(text) > 1 else text for at, text in enumerate(found, 1)]


def _without(parts: Sequence[str], shared: set[str]) -> str:
    """The first part and those that are not shared, an ellipsis for each gap."""
    text = "".join(part if at == 0 or part not in shared else "…" for at, part in enumerate(parts))
    return re.sub("…+", "…", text)


def _cut(text: str, most: int) -> str:
    keep = most - 1
    return text if len(text) <= most else f"{text[: keep - keep // 2]}…{text[-(keep // 2) :]}"


def legend_names(names: Sequence[str]) -> dict[str, str]:
    """Each name as it stands beside a panel, where there is room for some 48 characters."""
    return dict(zip(names, shortened([as_text(name) for name in names], 48), strict=True))


def put_title(figure: Any, about: str) -> None:
    """Puts the title above all panels, in as many lines as needed."""
    if about:
        figure.suptitle(fill(as_text(about), int(13 * figure.get_size_inches()[0])), fontsize=9)


def whole_ticks(panel: Any) -> None:
    """Puts ticks at whole numbers, for an axis of epochs or layers."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def save(figure: Any, path: Path) -> None:
    """Writes the figure, in the format that the name ends in, and closes it."""
    about = {"dpi": 150, "bbox_inches": "tight", "format": path.suffix[1:].lower()}
    try:
        write_atomic(path, lambda temporary: figure.savefig(temporary, **about))
    finally:
        if (plt := sys.modules.get("matplotlib.pyplot")) is not None:  # which may have made it
            plt.close(figure)
