"""Task C: classify scenes of small objects, at places and at image sizes that training did not contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sape2.encodings.grid import Grid
from sape2.studies.probes.base import TRAIN, Example, Scenes, Split, Task, one_hot

SHAPES = {
    "plus": "010 111 010",
    "cross": "101 010 101",
    "ring": "111 101 111",
    "T": "111 010 010",
    "L": "100 100 111",
    "H": "101 111 101",
}
TEMPLATES = torch.tensor([[int(cell) for cell in text.replace(" ", "")] for text in SHAPES.values()]).unflatten(1, (3, 3)) > 0
SIDE = 3
COLOURS = 4
MOST = 3  # objects in a scene
NOISE = 0.05
TRAINED = 7  # rows and columns, from 0, in which the upper left corner of a training object may stand
LEFT = 0  # the question; 1 + shape asks how many objects have that shape
SHAPE_CHANCE, COUNT_CHANCE = 1 / len(SHAPES), 1 / (MOST + 1)  # both answers are drawn uniformly


@dataclass(frozen=True)
class SceneSplit(Split):
    """`ask`: which of the two questions; `corners`: inside the trained square or all outside of it."""

    ask: Literal["left", "count", "both"] = "both"
    corners: Literal["inside", "outside"] = "inside"
    roll: bool = False
    scale: int = 1


def _left(summary: str, grid: Grid = (12, 12), **options: Any) -> SceneSplit:
    return SceneSplit(f"shape of the left-most object: {summary}", SHAPE_CHANCE, grid, ask="left", **options)


def _count(summary: str, grid: Grid = (12, 12), **options: Any) -> SceneSplit:
    return SceneSplit(f"objects of a shape: {summary}", COUNT_CHANCE, grid, ask="count", **options)


INSIDE, OUTSIDE = "corners of objects in the upper left 7x7", "all corners outside of the upper left 7x7"
SCALED, PADDED = "every cell doubled, 24x24", "a 16x16 canvas, objects where they stood in training"
SPLITS = {
    TRAIN: SceneSplit("both questions, half of the scenes each", 1 / 8, (12, 12), in_distribution=True, measured=False),
    "left": _left(INSIDE, in_distribution=True),
    "count": _count(INSIDE, in_distribution=True),
    "left, moved": _left(OUTSIDE, corners="outside"),
    "count, moved": _count(OUTSIDE, corners="outside"),
    "count, rolled": _count("rolled around the torus by any shift", roll=True),
    "left, scaled": _left(SCALED, grid=(24, 24), scale=2),
    "count, scaled": _count(SCALED, grid=(24, 24), scale=2),
    "left, padded": _left(PADDED, grid=(16, 16)),
    "count, padded": _count(PADDED, grid=(16, 16)),
}


@dataclass(frozen=True)
class ObjectScenes(Task):
    """12x12 cells, two or three objects that do not overlap: 3x3 templates, 6 shapes in 4 colours; then 5 % of the cells
    become background or a colour at random. One object is left-most alone.

    What is asked is a feature of every cell: the shape of the left-most object, or how many objects (0 to 3) have a
    given shape; the two kinds of answers share one read-out from the mean of the tokens.
    """

    summary: ClassVar[str] = "shape of the left-most object, number of objects of a shape (12x12)"
    channels: ClassVar[int] = 1 + COLOURS + 1 + len(SHAPES)
    num_classes: ClassVar[int] = len(SHAPES) + MOST + 1
    readout: ClassVar[Literal["tokens", "mean"]] = "mean"

    @property
    def splits(self) -> dict[str, SceneSplit]:
        return SPLITS

    def _sample(self, split: SceneSplit, number: int, generator: torch.Generator) -> Scenes:
        grid = (split.grid[0] // split.scale, split.grid[1] // split.scale)
        question = _questions(split.ask, number, generator)
        shapes, present, count = _objects(question, generator)
        corners = _corners(present, split.corners, grid, generator)
        colours = torch.randint(1, COLOURS + 1, shapes.shape, generator=generator)
        board = paint(shapes, colours * present, corners, grid)
        if split.roll:
            board = _rolled(board, generator)
        noisy = torch.rand(board.shape, generator=generator) < NOISE
        board = torch.where(noisy, torch.randint(COLOURS + 1, board.shape, generator=generator), board)
        board = board.repeat_interleave(split.scale, 1).repeat_interleave(split.scale, 2)
        asked = one_hot(question[:, None, None].expand_as(board), 1 + len(SHAPES))
        left = shapes.gather(1, corners[..., 1].masked_fill(~present, max(grid)).argmin(1, keepdim=True))[:, 0]
        labels = torch.where(question == LEFT, left, len(SHAPES) + count)
        return Scenes(torch.cat([one_hot(board, 1 + COLOURS), asked], 1), labels)

    def example(self, scenes: Scenes, index: int) -> Example:
        cells, label, names = scenes.cells[index], int(scenes.labels[index]), list(SHAPES)
        colours, question = cells[: 1 + COLOURS].argmax(0), int(cells[1 + COLOURS :, 0, 0].argmax())
        texts = {(y, x): str(int(colours[y, x])) for y, x in colours.nonzero().tolist()}
        asked = "left-most?" if question == LEFT else f"how many {names[question - 1]}?"
        return Example(colours, texts, f"{asked} {names[label] if question == LEFT else label - len(SHAPES)}")


# --- parts of a scene ------------------------------------------------------------------------------------------------


def _questions(ask: str, number: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    shape = 1 + torch.randint(len(SHAPES), (number,), generator=generator)
    left = {"left": torch.ones(number) > 0, "count": torch.zeros(number) > 0}
    return torch.where(left.get(ask, torch.rand(number, generator=generator) < 0.5), LEFT, shape)


def _objects(
    question: Int[Tensor, " batch"], generator: torch.Generator
) -> tuple[Int[Tensor, "batch objects"], Bool[Tensor, "batch objects"], Int[Tensor, " batch"]]:
    """Shapes, which of the three objects there are, and how many have the shape that is asked for.

    For a question about number the number is drawn first, uniform in 0 to 3, then two or three objects that have it.
    """
    number = len(question)
    count = torch.randint(MOST + 1, (number,), generator=generator)
    two_or_three = torch.randint(2, MOST + 1, (number,), generator=generator)
    total = torch.where((question != LEFT) & (count == MOST), MOST, two_or_three)
    asked = question[:, None] - 1
    others = (asked + torch.randint(1, len(SHAPES), (number, MOST), generator=generator)) % len(SHAPES)
    any_shape = torch.randint(len(SHAPES), (number, MOST), generator=generator)
    index = torch.arange(MOST)
    counted = torch.where(index < count[:, None], asked, others)
    return torch.where(question[:, None] == LEFT, any_shape, counted), index < total[:, None], count


def _corners(
    present: Bool[Tensor, "batch objects"], where: str, grid: tuple[int, int], generator: torch.Generator
) -> Int[Tensor, "batch objects 2"]:
    """Upper left corners (y, x), drawn again until no two objects overlap and one is left-most alone."""
    inside = torch.zeros(grid[0] - SIDE + 1, grid[1] - SIDE + 1, dtype=torch.bool)
    inside[:TRAINED, :TRAINED] = True
    places = (inside if where == "inside" else ~inside).nonzero()
    corners = torch.zeros(*present.shape, 2, dtype=torch.long)
    todo = torch.ones(len(present), dtype=torch.bool)
    while todo.any():
        drawn = torch.randint(len(places), (int(todo.sum()), MOST), generator=generator)
        corners[todo] = places[drawn]
        todo = ~_good(corners, present)
    return corners


def _good(corners: Int[Tensor, "batch objects 2"], present: Bool[Tensor, "batch objects"]) -> Bool[Tensor, " batch"]:
    apart = ((corners[:, :, None] - corners[:, None]).abs() >= SIDE).any(-1)  # (B, 3, 3)
    both = present[:, :, None] & present[:, None] & ~torch.eye(MOST, dtype=torch.bool)
    columns = corners[..., 1].masked_fill(~present, corners.max() + 1)
    alone = (columns == columns.min(1, keepdim=True).values).sum(1) == 1
    return (apart | ~both).all((1, 2)) & alone


def paint(
    shapes: Int[Tensor, "batch objects"],
    colours: Int[Tensor, "batch objects"],
    corners: Int[Tensor, "batch objects 2"],
    grid: tuple[int, int],
) -> Int[Tensor, "batch height width"]:
    """The board with each object's template in its colour; colour 0 paints nothing."""
    board = torch.zeros(len(shapes), *grid, dtype=torch.long)
    scene = torch.arange(len(shapes))
    for shape, colour, corner in zip(shapes.T, colours.T, corners.transpose(0, 1), strict=True):
        for dy in range(SIDE):
            for dx in range(SIDE):
                at = scene, corner[:, 0] + dy, corner[:, 1] + dx
                board[at] = torch.where(TEMPLATES[shape, dy, dx] & (colour > 0), colour, board[at])
    return board


def _rolled(board: Int[Tensor, "batch height width"], generator: torch.Generator) -> Int[Tensor, "batch height width"]:
    batch, height, width = board.shape
    shift = torch.randint(height * width, (batch,), generator=generator)
    y = (torch.arange(height) - (shift // width)[:, None]) % height
    x = (torch.arange(width) - (shift % width)[:, None]) % width
    return board[torch.arange(batch)[:, None, None], y[:, :, None], x[:, None]]
