"""The interface of controlled tasks: seeded scenes on a token grid, correct answers, and splits with known chance.

A scene is a grid of cells, one token each; a cell is a vector of features (mostly one-hot). Nothing is cut into patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sape2.encodings.grid import Grid

NOT_ASKED = -1  # the label of a token that is not asked anything; no part of loss and accuracy
TRAIN = "train"


class Scenes(NamedTuple):
    """Cells (B, C, H, W) and labels: one for every token, (B, N), or one for the scene, (B,), as the task's `readout` says.

    `groups` (B, N), where a task has it, says which tokens belong together, 0 is none.
    """

    cells: Float[Tensor, "batch channels height width"]
    labels: Tensor
    groups: Int[Tensor, "batch tokens"] | None = None


class Example(NamedTuple):
    """A scene for people: a colour for every cell (0 background, 1 and above see `viz`), texts in cells (y, x), a caption."""

    colours: Int[Tensor, "height width"]
    texts: dict[tuple[int, int], str]
    caption: str


@dataclass(frozen=True)
class Split:
    """One distribution of scenes. `chance` is the accuracy of the best constant answer. A split may be for training alone."""

    summary: str
    chance: float
    grid: Grid = (8, 8)
    in_distribution: bool = False
    measured: bool = True


class Task(ABC):
    """A task; its members are frozen dataclasses, their fields options of the task.

    `splits[TRAIN]` is what the models learn from; every split is measured on fresh draws. `steps` updates of `batch_size`
    scenes with learning rate `lr`, the same for every encoding.
    """

    summary: ClassVar[str]
    channels: ClassVar[int]
    num_classes: ClassVar[int]
    readout: ClassVar[Literal["tokens", "mean"]] = "tokens"
    steps: ClassVar[int] = 1000
    batch_size: ClassVar[int] = 32
    lr: ClassVar[float] = 1e-3

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, Split]: ...

    @property
    def grid(self) -> Grid:
        """(H, W) of the training scenes."""
        return self.splits[TRAIN].grid

    def sample(self, split: str, number: int, generator: torch.Generator) -> Scenes:
        """`number` scenes, decided by the state of the generator alone; raises ValueError for unknown splits."""
        if split not in self.splits:
            raise ValueError(f"unknown split {split!r}; known splits: {', '.join(self.splits)}")
        return self._sample(self.splits[split], number, generator)

    @abstractmethod
    def _sample(self, split: Any, number: int, generator: torch.Generator) -> Scenes: ...

    @abstractmethod
    def example(self, scenes: Scenes, index: int) -> Example: ...


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_until(number: int, draw: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`draw` gives what was good of so many tries; the first `number` of the good ones."""
    kept: list[tuple[Tensor, ...]] = []
    while (missing := number - sum(len(part[0]) for part in kept)) > 0:
        kept.append(draw(missing + missing // 2 + 2))
    return tuple(torch.cat(parts)[:number] for parts in zip(*kept, strict=True))


def pick(allowed: Tensor, number: int, generator: torch.Generator) -> Int[Tensor, "*lead number"]:
    """`number` different indices of the last axis, uniform among those that are allowed; there must be that many."""
    keys = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    return keys.topk(number, dim=-1).indices


def one_hot(values: Int[Tensor, "batch height width"], number: int) -> Float[Tensor, "batch number height width"]:
    """A channel for each value from 0."""
    return F.one_hot(values, number).movedim(-1, 1).float()
