"""Task A: find the colour of the n-th foreground object to the left, right, above or below. Needs directional counting.

Like selective copying on a grid (2D CoPE, arXiv:2405.18719); the splits of density follow MapFormer (arXiv:2511.19279).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sape2.studies.probes.base import NOT_ASKED, TRAIN, Example, Scenes, Split, Task, draw_until, one_hot, pick

COLOURS = 8
QUERIES = 4  # cells of a scene that ask
DIRECTIONS = ("left", "right", "up", "down")
ARROWS = "\u2190\u2192\u2191\u2193"  # left, right, up, down
CHANCE = 1 / COLOURS  # colours are drawn independently and uniformly


@dataclass(frozen=True)
class CountSplit(Split):
    """`density`: range of the share of foreground; `numbers`: the n asked for; `gaps`: how many blank columns are inserted."""

    density: tuple[float, float] = (0.3, 0.6)
    numbers: tuple[int, ...] = (1, 2, 3)
    gaps: int = 0


SPLITS = {
    TRAIN: CountSplit("8x8, share of foreground uniform in 0.3 to 0.6, n = 1 to 3", CHANCE, in_distribution=True),
    "sparse": CountSplit("share of foreground 0.15", CHANCE, density=(0.15, 0.15)),
    "dense": CountSplit("share of foreground 0.85", CHANCE, density=(0.85, 0.85)),
    "12x12": CountSplit("a 12x12 grid", CHANCE, grid=(12, 12)),
    "16x16": CountSplit("a 16x16 grid", CHANCE, grid=(16, 16)),
    "n=4,5": CountSplit("n = 4 and 5, never trained", CHANCE, numbers=(4, 5)),
    "spaced": CountSplit("four blank columns inserted into 8x8: farther, but the same counts", CHANCE, (8, 12), gaps=4),
}


@dataclass(frozen=True)
class Count(Task):
    """A cell is background or foreground in one of 8 colours. Four background cells ask (direction, n) instead.

    Query cells do not count as foreground. A query cell and what it asks are uniform among those for which the n-th
    foreground cell exists. Features: background, 8 colours, 4 directions, and n / 3 as a number, so that an n that was
    never trained is not an unknown symbol.
    """

    summary: ClassVar[str] = "colour of the n-th foreground cell in a direction (8x8)"
    channels: ClassVar[int] = 1 + COLOURS + len(DIRECTIONS) + 1
    num_classes: ClassVar[int] = COLOURS

    @property
    def splits(self) -> dict[str, CountSplit]:
        return SPLITS

    def _sample(self, split: CountSplit, number: int, generator: torch.Generator) -> Scenes:
        colours, askable = self._boards(split, number, generator)
        height, width = colours.shape[1:]
        can_ask = askable.flatten(3).any((1, 2))  # (B, N)
        places = pick(can_ask, QUERIES, generator)  # (B, Q)
        options = askable.flatten(3).permute(0, 3, 1, 2).flatten(2)  # (B, N, directions * numbers)
        asked = pick(options.gather(1, places[..., None].expand(-1, -1, options.shape[-1])), 1, generator)[..., 0]  # (B, Q)
        direction, which = asked // len(split.numbers), asked % len(split.numbers)
        n = torch.tensor(split.numbers)[which]
        answers = nth_foreground(colours, places, direction, n)
        symbols = colours.flatten(1).scatter(1, places, 1 + COLOURS + direction).unflatten(1, (height, width))
        amount = torch.zeros(number, height * width).scatter(1, places, n / 3).unflatten(1, (1, height, width))
        cells = torch.cat([one_hot(symbols, self.channels - 1), amount], dim=1)
        labels = torch.full((number, height * width), NOT_ASKED).scatter(1, places, answers - 1)
        return Scenes(*insert_blank_columns(cells, labels, split.gaps, generator))

    def _boards(self, split: CountSplit, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Colours (B, H, W), 0 background, and what each background cell may ask, (B, directions, numbers, H, W).

        Boards with fewer than four cells that may ask are drawn again.
        """
        size = split.grid[0], split.grid[1] - split.gaps

        def draw(tries: int) -> tuple[Tensor, Tensor]:
            least, most = split.density
            share = least + (most - least) * torch.rand(tries, 1, 1, generator=generator)
            foreground = torch.rand(tries, *size, generator=generator) < share
            colours = torch.randint(1, COLOURS + 1, foreground.shape, generator=generator) * foreground
            askable = exists(foreground, split.numbers) & ~foreground[:, None, None]
            good = askable.any(1).any(1).flatten(1).sum(1) >= QUERIES
            return colours[good], askable[good]

        colours, askable = draw_until(number, draw)
        return colours, askable

    def example(self, scenes: Scenes, index: int) -> Example:
        cells, labels = scenes.cells[index], scenes.labels[index].unflatten(0, scenes.cells.shape[2:])
        symbols = cells[:-1].argmax(0)
        colours = torch.where(symbols <= COLOURS, symbols, 0)
        texts, answers = {}, []
        for y, x in (symbols > 0).nonzero().tolist():
            direction = int(symbols[y, x]) - 1 - COLOURS
            texts[y, x] = str(int(symbols[y, x]))
            if direction >= 0:
                texts[y, x] = f"{ARROWS[direction]}{round(3 * float(cells[-1, y, x]))}"
                answers.append(f"{texts[y, x]}: {int(labels[y, x]) + 1}")
        return Example(colours, texts, "  ".join(answers))


# --- lines of sight --------------------------------------------------------------------------------------------------


def exists(
    foreground: Bool[Tensor, "batch height width"], numbers: tuple[int, ...]
) -> Bool[Tensor, "batch directions numbers height width"]:
    """True where a cell has at least n foreground cells on the side, for each side and each n."""
    counts = foreground.long()
    sides = [
        counts.cumsum(2) - counts,  # to the left
        counts.flip(2).cumsum(2).flip(2) - counts,  # to the right
        counts.cumsum(1) - counts,  # above
        counts.flip(1).cumsum(1).flip(1) - counts,  # below
    ]
    return torch.stack([torch.stack([side >= n for n in numbers], 1) for side in sides], 1)


def nth_foreground(
    colours: Int[Tensor, "batch height width"],
    places: Int[Tensor, "batch queries"],
    direction: Int[Tensor, "batch queries"],
    n: Int[Tensor, "batch queries"],
) -> Int[Tensor, "batch queries"]:
    """The colour of the n-th foreground cell from each place; 0 where there is none."""
    batch, height, width = colours.shape
    step = torch.tensor([(0, -1), (0, 1), (-1, 0), (1, 0)])[direction]  # (B, Q, 2): y, x
    at = torch.stack([places // width, places % width], -1)
    seen, answer = torch.zeros_like(n), torch.zeros_like(n)
    rows = torch.arange(batch)[:, None]
    for _ in range(max(height, width) - 1):
        at = at + step
        y, x = at.unbind(-1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        colour = colours[rows, y.clamp(0, height - 1), x.clamp(0, width - 1)] * inside
        seen = seen + (colour > 0)
        answer = torch.where((colour > 0) & (seen == n), colour, answer)
    return answer


def insert_blank_columns(
    cells: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch tokens"],
    number: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Background columns at random places; the order of the others stays."""
    if number == 0:
        return cells, labels
    batch, channels, height, width = cells.shape
    columns = pick(torch.ones(batch, width + number, dtype=torch.bool), width, generator).sort(-1).values  # (B, W)
    wide = torch.zeros(batch, channels, height, width + number)
    wide[:, 0] = 1  # background
    wide = wide.scatter(3, columns[:, None, None].expand(-1, channels, height, -1), cells)
    grown = torch.full((batch, height, width + number), NOT_ASKED)
    grown = grown.scatter(2, columns[:, None].expand(-1, height, -1), labels.unflatten(1, (height, width)))
    return wide, grown.flatten(1)
