"""Synthetic scenes with true masks: objects in two pieces each, on a background. Drawn from a seed alone.

They measure whether attention connects distant parts that belong together (task "distant grouping"). For a model that was
trained on photographs or digits they lie outside its training distribution, and every row says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sape2.encodings.grid import Grid

NUM_TYPES = 2  # of objects, each in two segments; the background is a third label, 0
GAP = 2  # Chebyshev distance between the segments of one type, at least: no patch of one touches the other
NOISE = 0.25  # standard deviation of the pixel noise, in units of a normalised image
Segment = tuple[int, int, int, int]  # top, left, height, width, in patches


def make_scenes(
    number: int, channels: int, grid: Grid, patch: tuple[int, int], seed: int = 0
) -> tuple[Float[Tensor, "images channels height width"], Int[Tensor, "images tokens"]]:
    """`number` scenes of `grid` patches of `patch` pixels (height, width), and the label of every patch.

    Images are in normalised units, mean about 0 and standard deviation about 1. Segments are rectangles of whole patches, so
    no patch is mixed. Every label of a scene has a colour and a grating of its own, the same in both segments, which differ in
    the phase of the grating; white noise covers all. Raises ValueError for grids below 3x3.
    """
    if min(grid) < 3:
        raise ValueError(f"a scene needs a grid of at least 3x3 patches for its four segments; got {grid[0]}x{grid[1]}")
    generator = torch.Generator().manual_seed(seed)
    drawn = [_scene(channels, grid, patch, generator) for _ in range(number)]
    return torch.stack([image for image, _ in drawn]), torch.stack([labels for _, labels in drawn])


def _scene(channels: int, grid: Grid, patch: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image (C, height, width) and the labels of its patches, (N,)."""
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    textures = [_Texture.draw(colour, generator) for colour in _colours(channels, generator)]
    image = textures[0].paint(height, width, generator)
    labels = torch.zeros(grid, dtype=torch.long)
    for index, (top, left, rows, columns) in enumerate(_layout(grid, generator)):
        label = 1 + index // 2
        labels[top : top + rows, left : left + columns] = label
        y, x = top * patch[0], left * patch[1]
        height, width = rows * patch[0], columns * patch[1]
        image[:, y : y + height, x : x + width] = textures[label].paint(height, width, generator)
    return image + NOISE * torch.randn(image.shape, generator=generator), labels.flatten()


# --- where -----------------------------------------------------------------------------------------------------------


def _layout(grid: Grid, generator: torch.Generator) -> list[Segment]:
    """Two segments of type 1, then two of type 2; drawn again from the start when one finds no room."""
    while True:
        placed: list[Segment] = []
        for index in range(2 * NUM_TYPES):
            partner = placed[-1] if index % 2 else None
            found = next((s for s in _draw_segments(grid, generator) if _fits(s, placed, partner)), None)
            placed += [found] if found else []
        if len(placed) == 2 * NUM_TYPES:
            return placed


def _draw_segments(grid: Grid, generator: torch.Generator, tries: int = 20) -> Iterator[Segment]:
    """Rectangles of 1 to a quarter of the grid on either side."""
    for _ in range(tries):
        rows, columns = (_draw(1, max(1, side // 4), generator) for side in grid)
        yield _draw(0, grid[0] - rows, generator), _draw(0, grid[1] - columns, generator), rows, columns


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _fits(segment: Segment, placed: list[Segment], partner: Segment | None) -> bool:
    free = all(_gap(segment, other) >= 1 for other in placed)
    return free and (partner is None or _gap(segment, partner) >= GAP)


def _gap(one: Segment, other: Segment) -> int:
    """Chebyshev distance between the nearest patches of two rectangles, 0 where they overlap."""
    return max(
        max(other[axis] - (one[axis] + one[axis + 2] - 1), one[axis] - (other[axis] + other[axis + 2] - 1), 0)
        for axis in (0, 1)
    )


# --- how it looks ----------------------------------------------------------------------------------------------------


def _colours(channels: int, generator: torch.Generator) -> Float[Tensor, "labels channels"]:
    """One for each label, normal, drawn again until any two are a standard deviation apart (root mean square)."""
    while True:
        colours = torch.randn(1 + NUM_TYPES, channels, generator=generator)
        if (torch.pdist(colours) >= math.sqrt(channels)).all():
            return colours


@dataclass(frozen=True)
class _Texture:
    """A colour and a grating of amplitude 1/2: `wave` is its frequency (y, x) in radians per pixel."""

    colour: Float[Tensor, " channels"]
    wave: Float[Tensor, " 2"]

    @classmethod
    def draw(cls, colour: Tensor, generator: torch.Generator) -> _Texture:
        """Wavelengths of 3 to 8 pixels, in any direction."""
        length = 3 + 5 * torch.rand((), generator=generator)
        angle = math.pi * torch.rand((), generator=generator)
        return cls(colour, 2 * math.pi / length * torch.stack([angle.sin(), angle.cos()]))

    def paint(self, height: int, width: int, generator: torch.Generator) -> Float[Tensor, "channels height width"]:
        """A rectangle of it, from a phase drawn anew."""
        y, x = torch.arange(height)[:, None], torch.arange(width)[None]
        phase = 2 * math.pi * torch.rand((), generator=generator)
        grating = 0.5 * torch.sin(self.wave[0] * y + self.wave[1] * x + phase)
        return self.colour[:, None, None] + grating
