"""Drawings as SVG: shapes are texts of it, one below or beside the other.

For pages that must respond at once: a drawing takes a hundredth of a second. Lengths are in CSS pixels, y points down.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sape2.runs.files import write_atomic
from sape2.viz.base import import_optional, plain

INK, FAINT = "#1a1a1a", "#595959"
FONT = "DejaVu Sans, Verdana, sans-serif"
Length = float | int
Point = tuple[Length, Length]
Anchor = Literal["start", "middle", "end"]


# --- shapes ----------------------------------------------------------------------------------------------------------


def rect(
    x: Length,
    y: Length,
    width: Length,
    height: Length,
    fill: str = "none",
    stroke: str = "none",
    line: Length = 1.0,
    title: str = "",
    patch: str = "",
    opacity: Length | None = None,
) -> str:
    """`title` is shown where one points at it; `patch`, "row,column", is what a click on it chooses.

    `opacity` is that of the fill; a page may override it for all rectangles that are not opaque.
    """
    edge = "" if stroke == "none" else f" stroke='{stroke}' stroke-width='{line:g}'"
    chosen = f" data-patch='{patch}'" if patch else ""
    shown = fill if fill != "none" or not (title or patch) else "transparent"  # none is not pointed at
    mixed = "" if opacity is None else f" fill-opacity='{opacity:g}'"
    return f"<rect {_box(x, y, width, height)} fill='{shown}'{mixed}{edge}{chosen}>{_title(title)}</rect>"


def line(points: Iterable[Point], stroke: str = INK, width: Length = 1.0, fill: str = "none") -> str:
    """Through all points; filled, it is an area."""
    through = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f"<polyline points='{through}' fill='{fill}' stroke='{stroke}' stroke-width='{width:g}'/>"


def dot(x: Length, y: Length, radius: Length, fill: str, stroke: str = "none", title: str = "") -> str:
    return f"<circle cx='{x:.2f}' cy='{y:.2f}' r='{radius:g}' fill='{fill}' stroke='{stroke}'>{_title(title)}</circle>"


def text(
    x: Length, y: Length, words: str, size: Length = 12.0, fill: str = INK, anchor: Anchor = "start", bold: bool = False
) -> str:
    """`y` is the baseline."""
    weight = " font-weight='600'" if bold else ""
    place = f"x='{x:.2f}' y='{y:.2f}' font-size='{size:g}' text-anchor='{anchor}'"
    return f"<text {place} fill='{fill}'{weight}>{escape(words)}</text>"


def raster(x: Length, y: Length, width: Length, height: Length, pixels: np.ndarray) -> str:
    """Pixels (height, width, 3), uint8, stretched without smoothing."""
    data = _encoded(pixels.tobytes(), pixels.shape)
    how = "preserveAspectRatio='none' style='image-rendering:pixelated'"
    return f"<image {_box(x, y, width, height)} {how} href='data:image/png;base64,{data}'/>"


@functools.lru_cache(maxsize=512)  # a click draws the same image and the same scales again
def _encoded(pixels: bytes, shape: tuple[int, ...]) -> str:
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _box(x: Length, y: Length, width: Length, height: Length) -> str:
    return f"x='{x:.2f}' y='{y:.2f}' width='{width:.2f}' height='{height:.2f}'"


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def escape(words: Any) -> str:
    return html.escape(plain(str(words)), quote=True)


# --- drawings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """Shapes on white, later ones above earlier ones; `label` says in words what is shown."""

    width: Length
    height: Length
    shapes: Sequence[str]
    label: str = ""

    def svg(self, standalone: bool = False) -> str:
        """SVG text, for use inside an HTML page or as a file of its own."""
        space = " xmlns='http://www.w3.org/2000/svg'" if standalone else ""
        size = f"viewBox='0 0 {self.width:g} {self.height:g}' width='{self.width:g}' height='{self.height:g}'"
        ground = f"<rect width='{self.width:g}' height='{self.height:g}' fill='#fff'/>"
        about = f"role='img' aria-label='{escape(self.label)}' font-family='{FONT}'"
        return f"<svg{space} {size} {about}>{ground}{''.join(self.shapes)}</svg>"

    def png(self, scale: int = 2) -> bytes:
        """`scale` pixels for each CSS pixel; drawn by resvg, with the font that comes with matplotlib."""
        fonts = Path(import_optional("matplotlib").get_data_path()) / "fonts" / "ttf"
        files = [str(fonts / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]
        image = import_optional("resvg_py").svg_to_bytes(
            svg_string=self.svg(standalone=True), zoom=scale, skip_system_fonts=True, font_files=files
        )
        return bytes(image)

    def save(self, path: Path) -> None:
        """Writes PNG or SVG, by the ending of the name; the file appears complete or not at all."""
        data = self.svg(standalone=True).encode() if path.suffix.lower() == ".svg" else self.png()
        write_atomic(path, lambda temporary: temporary.write_bytes(data))


def flow(drawings: Sequence[Drawing], width: Length, gap: Length = 16.0, label: str = "") -> Drawing:
    """Side by side from the left as long as there is room, then in the next row."""
    shapes: list[str] = []
    x = y = row_height = used = 0.0
    for drawing in drawings:
        if x and x + drawing.width > width:
            x, y, row_height = 0.0, y + row_height + gap, 0.0
        shapes.append(_moved(drawing, x, y))
        x, row_height = x + drawing.width + gap, max(row_height, drawing.height)
        used = max(used, x - gap)
    return Drawing(used, y + row_height, shapes, label or "; ".join(d.label for d in drawings if d.label))


def stack(drawings: Iterable[Drawing], gap: Length = 16.0, label: str = "") -> Drawing:
    """One below the other."""
    return flow(list(drawings), 0.0, gap, label)


def framed(drawing: Drawing, margin: Length = 16.0) -> Drawing:
    """With white around it."""
    return Drawing(drawing.width + 2 * margin, drawing.height + 2 * margin, [_moved(drawing, margin, margin)], drawing.label)


def _moved(drawing: Drawing, x: Length, y: Length) -> str:
    return f"<g transform='translate({x:.2f} {y:.2f})'>{''.join(drawing.shapes)}</g>"


# --- colours ---------------------------------------------------------------------------------------------------------

SEQUENTIAL = "cividis"  # the same to everyone (Nuñez, Anderton and Renslow, 2018)
DIVERGING = "RdBu_r"  # blue and red, which colour-blind readers tell apart (ColorBrewer)


def colour(share: float | np.ndarray, name: str = SEQUENTIAL) -> np.ndarray:
    """Colours of values from 0 to 1 in one of matplotlib's maps; (..., 3) uint8."""
    rgba = np.asarray(import_optional("matplotlib").colormaps[name](share))
    return (255 * rgba[..., :3]).round().astype(np.uint8)


def code(rgb: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb.tolist())


def ink_on(rgb: np.ndarray) -> str:
    """Black or white, whichever has the larger contrast (WCAG 2, relative luminance)."""
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return "#000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#fff"
