"""What all pictures share: colours that everyone can tell apart, and files that appear whole or not at all.

Maps are in cividis, lines in the colours of Okabe and Ito; beyond eight lines the dashes change too.
"""

from __future__ import annotations

from pathlib import Path
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
