"""Task D: group parts that belong together but lie apart. Content suffices, so a model without positions is the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from sape2.studies.probes.base import NOT_ASKED, TRAIN, Example, Scenes, Split, Task, draw_until, pick

FEATURES = 32
SHOWN = 0.7  # the share of tokens that show the bit of their type, the others show the opposite
SEGMENTS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # height, width in cells
CHANCE = 0.5  # bits are drawn uniformly


@dataclass(frozen=True)
class DistantSplit(Split):
    """`types` of objects in `segments` pieces each, at least `gap` cells apart (Chebyshev); `noise`: s of a token."""

    types: int = 4
    segments: int = 2
    gap: int = 3
    noise: float = 0.5


SPLITS = {
    TRAIN: DistantSplit("8x8, 4 types in 2 segments each, at least 3 cells apart, noise 0.5", CHANCE, in_distribution=True),
    "noisy": DistantSplit("noise 0.8", CHANCE, noise=0.8),
    "farther": DistantSplit("16x16, segments at least 6 cells apart", CHANCE, (16, 16), gap=6),
    "6 types": DistantSplit("6 types", CHANCE, types=6),
    "1 segment": DistantSplit("every type in one segment", CHANCE, segments=1),
    "4 segments": DistantSplit("12x12, every type in four segments", CHANCE, (12, 12), segments=4),
}


@dataclass(frozen=True)
class Distant(Task):
    """Every type has a random unit prototype in R^32, new in every scene, and a bit. A token of it is
    sqrt(1 - s^2) prototype + s noise (noise ~ N(0, 1/32)), with a feature that shows the bit, +1 or -1, rightly in 70 % of
    the tokens. Every token of an object is asked for the bit of its type. What is no object is background: a prototype of
    its own, no bit shown, nothing asked.

    To repeat the bit that a token shows is right in 70 %; the majority over the tokens of its type is the ceiling.
    """

    summary: ClassVar[str] = "bit of a type, from noisy tokens in segments that lie apart (8x8)"
    channels: ClassVar[int] = FEATURES + 1
    num_classes: ClassVar[int] = 2

    @property
    def splits(self) -> dict[str, DistantSplit]:
        return SPLITS

    def _sample(self, split: DistantSplit, number: int, generator: torch.Generator) -> Scenes:
        groups = _layouts(split, number, generator).flatten(1)  # (B, N)
        prototypes = torch.randn(number, 1 + split.types, FEATURES, generator=generator)
        prototypes = F.normalize(prototypes, dim=-1).gather(1, groups[..., None].expand(-1, -1, FEATURES))
        noise = torch.randn(prototypes.shape, generator=generator) / math.sqrt(FEATURES)
        tokens = math.sqrt(1 - split.noise**2) * prototypes + split.noise * noise
        bit = torch.randint(2, (number, 1 + split.types), generator=generator).gather(1, groups)  # (B, N)
        right = torch.rand(groups.shape, generator=generator) < SHOWN
        shown = torch.where(right, 2 * bit - 1, 1 - 2 * bit) * (groups > 0)
        cells = torch.cat([tokens, shown[..., None]], -1).transpose(1, 2).unflatten(2, split.grid)
        return Scenes(cells, torch.where(groups > 0, bit, NOT_ASKED), groups)

    def example(self, scenes: Scenes, index: int) -> Example:
        grid = scenes.cells.shape[2:]
        groups = scenes.groups[index].unflatten(0, grid) if scenes.groups is not None else torch.zeros(grid, dtype=torch.long)
        labels = scenes.labels[index].unflatten(0, grid)
        texts = {(y, x): "+" if scenes.cells[index, -1, y, x] > 0 else "\u2212" for y, x in groups.nonzero().tolist()}
        bits = (labels[groups == group][0] for group in range(1, int(groups.max()) + 1))
        return Example(groups, texts, "types: " + " ".join("+" if bit else "\u2212" for bit in bits))


# --- where segments lie ----------------------------------------------------------------------------------------------


def _layouts(split: DistantSplit, number: int, generator: torch.Generator) -> Int[Tensor, "batch height width"]:
    """The type of every cell from 1, 0 is background; layouts in which a segment found no room are drawn again."""

    def draw(tries: int) -> tuple[Tensor]:
        groups = torch.zeros(tries, *split.grid, dtype=torch.long)
        fits = torch.ones(tries, dtype=torch.bool)
        for segment in range(split.types * split.segments):
            fits &= _place(groups, 1 + segment // split.segments, split.gap, generator)
        return (groups[fits],)

    return draw_until(number, draw)[0]


def _place(
    groups: Int[Tensor, "batch height width"], group: int, gap: int, generator: torch.Generator
) -> Bool[Tensor, " batch"]:
    """Puts one segment of the type into each layout, in place: anywhere free that is far enough from the others of the type.

    False where there is no such place, in which case nothing is put.
    """
    batch, height, width = groups.shape
    near = F.max_pool2d((groups == group).float(), 2 * gap - 1, stride=1, padding=gap - 1)  # closer than the gap
    blocked = ((groups > 0) | (near > 0)).float()
    free = torch.zeros(batch, len(SEGMENTS), height, width, dtype=torch.bool)  # upper left corners of every size
    for index, (rows, columns) in enumerate(SEGMENTS):
        free[:, index, : height - rows + 1, : width - columns + 1] = F.max_pool2d(blocked, (rows, columns), stride=1) == 0
    sizes = torch.randint(len(SEGMENTS), (batch,), generator=generator)
    free = free[torch.arange(batch), sizes].flatten(1)
    corner = pick(free, 1, generator)  # (B, 1)
    below = torch.arange(height) - corner // width  # (B, H)
    beside = torch.arange(width) - corner % width
    rows, columns = torch.tensor(SEGMENTS)[sizes].T[..., None]  # (B, 1) each
    inside = ((below >= 0) & (below < rows))[:, :, None] & ((beside >= 0) & (beside < columns))[:, None]
    groups[inside & free.any(1)[:, None, None]] = group
    return free.any(1)
