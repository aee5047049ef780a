"""A drawing of a few kinds of shapes, written as SVG.

For pages that must respond at once: a drawing takes a hundredth of a second. Lengths are in CSS pixels, y points down.
"""

from __future__ import annotations

import base64
import dataclasses
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


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rect:
    """`title` is shown where one points at it; `patch`, "row,column", is what a click on it chooses.

    `opacity` is that of the fill; a page may override it for all rectangles that are not opaque.
    """

    x: Length
    y: Length
    width: Length
    height: Length
    fill: str = "none"
    stroke: str = "none"
    line: Length = 1.0
    title: str = ""
    patch: str = ""
    opacity: Length | None = None

    def svg(self) -> str:
        stroke = "" if self.stroke == "none" else f" stroke='{self.stroke}' stroke-width='{self.line:g}'"
        patch = f" data-patch='{self.patch}'" if self.patch else ""
        box = f"x='{self.x:.2f}' y='{self.y:.2f}' width='{self.width:.2f}' height='{self.height:.2f}'"
        fill = self.fill if self.fill != "none" or not (self.title or self.patch) else "transparent"  # none is not pointed at
        opacity = "" if self.opacity is None else f" fill-opacity='{self.opacity:g}'"
        return f"<rect {box} fill='{fill}'{opacity}{stroke}{patch}>{_title(self.title)}</rect>"


@dataclass(frozen=True)
class Line:
    """Through all points; filled, it is an area."""

    points: tuple[Point, ...]
    stroke: str = INK
    line: Length = 1.0
    fill: str = "none"

    def svg(self) -> str:
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)
        return f"<polyline points='{points}' fill='{self.fill}' stroke='{self.stroke}' stroke-width='{self.line:g}'/>"


@dataclass(frozen=True)
class Dot:
    x: Length
    y: Length
    radius: Length
    fill: str
    stroke: str = "none"
    title: str = ""

    def svg(self) -> str:
        place = f"cx='{self.x:.2f}' cy='{self.y:.2f}' r='{self.radius:g}'"
        return f"<circle {place} fill='{self.fill}' stroke='{self.stroke}'>{_title(self.title)}</circle>"


@dataclass(frozen=True)
class Text:
    """`y` is the baseline."""

    x: Length
    y: Length
    text: str
    size: Length = 12.0
    fill: str = INK
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False

    def svg(self) -> str:
        weight = " font-weight='600'" if self.bold else ""
        place = f"x='{self.x:.2f}' y='{self.y:.2f}' font-size='{self.size:g}' text-anchor='{self.anchor}'"
        return f"<text {place} fill='{self.fill}'{weight}>{escape(self.text)}</text>"


@dataclass(frozen=True, eq=False)
class Raster:
    """Pixels (height, width, 3), uint8, stretched without smoothing."""

    x: Length
    y: Length
    width: Length
    height: Length
    pixels: np.ndarray

    def svg(self) -> str:
        data = _encoded(self.pixels.tobytes(), self.pixels.shape)
        box = f"x='{self.x:.2f}' y='{self.y:.2f}' width='{self.width:.2f}' height='{self.height:.2f}'"
        how = "preserveAspectRatio='none' style='image-rendering:pixelated'"
        return f"<image {box} {how} href='data:image/png;base64,{data}'/>"


@functools.lru_cache(maxsize=512)  # a click draws the same image and the same scales again
def _encoded(pixels: bytes, shape: tuple[int, ...]) -> str:
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


Shape = Rect | Line | Dot | Text | Raster


def moved(shape: Shape, dx: Length, dy: Length) -> Shape:
    if isinstance(shape, Line):
        return dataclasses.replace(shape, points=tuple((x + dx, y + dy) for x, y in shape.points))
    return dataclasses.replace(shape, x=shape.x + dx, y=shape.y + dy)


# --- drawings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawing:
    """Shapes on white, later ones above earlier ones; `label` says in words what is shown."""

    width: Length
    height: Length
    shapes: tuple[Shape, ...]
    label: str = ""

    def svg(self, standalone: bool = False) -> str:
        """SVG text, for use inside an HTML page or as a file of its own."""
        space = " xmlns='http://www.w3.org/2000/svg'" if standalone else ""
        size = f"viewBox='0 0 {self.width:g} {self.height:g}' width='{self.width:g}' height='{self.height:g}'"
        ground = f"<rect width='{self.width:g}' height='{self.height:g}' fill='#fff'/>"
        body = "".join(shape.svg() for shape in self.shapes)
        about = f"role='img' aria-label='{escape(self.label)}' font-family='{FONT}'"
        return f"<svg{space} {size} {about}>{ground}{body}</svg>"

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
    shapes: list[Shape] = []
    x = y = row_height = used = 0.0
    for drawing in drawings:
        if x and x + drawing.width > width:
            x, y, row_height = 0.0, y + row_height + gap, 0.0
        shapes += [moved(shape, x, y) for shape in drawing.shapes]
        x, row_height = x + drawing.width + gap, max(row_height, drawing.height)
        used = max(used, x - gap)
    return Drawing(used, y + row_height, tuple(shapes), label or "; ".join(d.label for d in drawings if d.label))


def stack(drawings: Iterable[Drawing], gap: Length = 16.0, label: str = "") -> Drawing:
    """One below the other."""
    return flow(list(drawings), 0.0, gap, label)


def framed(drawing: Drawing, margin: Length = 16.0) -> Drawing:
    """With white around it."""
    shapes = tuple(moved(shape, margin, margin) for shape in drawing.shapes)
    return Drawing(drawing.width + 2 * margin, drawing.height + 2 * margin, shapes, drawing.label)


# --- text ------------------------------------------------------------------------------------------------------------


def escape(text: Any) -> str:
    return html.escape(plain(str(text)), quote=True)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


# --- colours ---------------------------------------------------------------------------------------------------------

SEQUENTIAL = "cividis"  # the same to everyone (Nuñez, Anderton and Renslow, 2018)
DIVERGING = "RdBu_r"  # blue and red, which colour-blind readers tell apart (ColorBrewer)


def colour(share: float | np.ndarray, name: str = SEQUENTIAL) -> np.ndarray:
    """Colours of values from 0 to 1 in one of matplotlib's maps, interpolated; (..., 3) uint8."""
    stops = _stops(name)
    channels = [np.interp(share, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@functools.lru_cache(maxsize=2)
def _stops(name: str) -> np.ndarray:
    return 255 * import_optional("matplotlib").colormaps[name](np.linspace(0, 1, 256))[:, :3]


def code(rgb: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb.tolist())


def ink_on(rgb: np.ndarray) -> str:
    """Black or white, whichever has the larger contrast (WCAG 2, relative luminance)."""
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return "#000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#fff"
