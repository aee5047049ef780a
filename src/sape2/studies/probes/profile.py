"""Task B: find the row with the same contents. The formula of SaPE2 is made for this: it compares rows by content.

Eq. 15 of arXiv:2505.09466 compares two patches by the positions that they count along their rows, so two rows with the
same contents are close wherever they stand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sape2.studies.probes.base import NOT_ASKED, TRAIN, Example, Scenes, Split, Task, one_hot, pick

COLOURS = 8
BACKGROUND, FOREGROUND, QUERY, FIRST_COLOUR = 0, 1, 2, 3  # values of a cell
DISTRACTORS = 3  # rows at Hamming distance 2 from the twins, with as many foreground cells
TRAINED_SHARE = 70  # of the masks, in percent
CHANCE = 1 / COLOURS  # the colours of all rows are drawn independently and uniformly


@dataclass(frozen=True)
class ProfileSplit(Split):
    """`apart`: least and greatest distance of the twins in rows; `held_out`: whether theirs is a mask that no training
    scene contains, in any row. Otherwise all masks of a width of 8 are trained ones.
    """

    rows: int = 8
    width: int = 8
    apart: tuple[int, int] = (1, 4)
    held_out: bool = False


SPLITS = {
    TRAIN: ProfileSplit("8 rows of 8 cells, twins 1 to 4 rows apart, masks of the training set", CHANCE, in_distribution=True),
    "held-out masks": ProfileSplit("the twins have a mask that was never trained in any row", CHANCE, held_out=True),
    "far apart": ProfileSplit("a permutation of rows: twins 5 to 7 rows apart", CHANCE, apart=(5, 7)),
    "12 rows": ProfileSplit("12 rows", CHANCE, rows=12),
    "16 rows": ProfileSplit("16 rows", CHANCE, rows=16),
    "wider": ProfileSplit("rows of 12 cells, so masks too are new", CHANCE, width=12),
}


@dataclass(frozen=True)
class Profile(Task):
    """Each row: a tag, then a mask of foreground and background cells. Masks differ but for one pair of rows, the twins.

    One twin carries the tag QUERY, all other rows a colour; the answer at QUERY is the colour of its twin. Three rows are
    at Hamming distance 2 from the twins with as many foreground cells. `columns` is the same scene transposed. To name
    the colour of any other row is right in a quarter of the scenes (1/7 + 6/7 * 1/8).
    """

    columns: bool = False

    summary: ClassVar[str] = "colour tag of the row with the same foreground mask (8x9)"
    channels: ClassVar[int] = FIRST_COLOUR + COLOURS
    num_classes: ClassVar[int] = COLOURS

    @property
    def splits(self) -> dict[str, ProfileSplit]:
        shapes = {name: (split.rows, 1 + split.width) for name, split in SPLITS.items()}
        return {
            name: replace(split, grid=shapes[name][::-1] if self.columns else shapes[name]) for name, split in SPLITS.items()
        }

    def _sample(self, split: ProfileSplit, number: int, generator: torch.Generator) -> Scenes:
        masks = self._masks(split, number, generator)  # (B, rows, width), the twins first
        tags = FIRST_COLOUR + torch.randint(COLOURS, (number, split.rows), generator=generator)
        tags[:, 0] = QUERY
        order = _order(split, number, generator)  # (B, rows): which of them stands in each row
        board = torch.cat([tags[..., None], masks], -1).gather(1, order[..., None].expand(-1, -1, 1 + split.width))
        answers = torch.full_like(board, NOT_ASKED)
        answers[..., 0] = torch.where(order == 0, tags[:, 1:2] - FIRST_COLOUR, NOT_ASKED)
        if self.columns:
            board, answers = board.transpose(1, 2), answers.transpose(1, 2)
        return Scenes(one_hot(board, self.channels), answers.flatten(1))

    def _masks(self, split: ProfileSplit, number: int, generator: torch.Generator) -> Int[Tensor, "batch rows width"]:
        """The twins, the distractors, then any others, all different but for the twins."""
        trained = is_trained(split.width)
        others = torch.ones_like(trained) if split.held_out or split.width != 8 else trained
        neighbours, exist = moved(torch.arange(len(trained)), split.width)
        exist = exist & others[neighbours]
        twins = (~trained if split.held_out else others) & (exist.sum(1) >= DISTRACTORS)
        twin = pick(twins.expand(number, -1), 1, generator)  # (B, 1)
        close = neighbours[twin[:, 0]].gather(1, pick(exist[twin[:, 0]], DISTRACTORS, generator))
        chosen = torch.cat([twin, twin, close], 1)
        free = others.expand(number, -1).clone().scatter(1, chosen, False)
        rest = pick(free, split.rows - chosen.shape[1], generator)
        return bits(torch.cat([chosen, rest], 1), split.width)

    def example(self, scenes: Scenes, index: int) -> Example:
        values = scenes.cells[index].argmax(0)
        colours = torch.where(values == FOREGROUND, 7, torch.where(values >= FIRST_COLOUR, values - FIRST_COLOUR + 1, 0))
        texts = {
            (y, x): "?" if values[y, x] == QUERY else str(int(values[y, x]) - FIRST_COLOUR + 1)
            for y, x in (values >= QUERY).nonzero().tolist()
        }
        answer = scenes.labels[index][scenes.labels[index] != NOT_ASKED]
        return Example(colours, texts, f"?: {int(answer) + 1}")


@dataclass(frozen=True)
class ColumnProfile(Profile):
    """The same scenes transposed, so its splits keep their names: "12 rows" are twelve columns here."""

    columns: bool = True

    summary: ClassVar[str] = "colour tag of the column with the same foreground mask (9x8)"


def _order(split: ProfileSplit, number: int, generator: torch.Generator) -> Int[Tensor, "batch rows"]:
    """The order of the rows on each board; rows 0 and 1, the twins, stand as far apart as the split says."""
    distance = (torch.arange(split.rows)[:, None] - torch.arange(split.rows)).abs()
    allowed = (distance >= split.apart[0]) & (distance <= split.apart[1])
    pair = pick(allowed.flatten().expand(number, -1), 1, generator)  # (B, 1)
    keys = torch.rand(number, split.rows, generator=generator)
    keys = keys.scatter(1, pair // split.rows, -2.0).scatter(1, pair % split.rows, -1.0)
    return keys.argsort(1).argsort(1)


# --- masks, as the numbers that their bits write -----------------------------------------------------------------------


def bits(masks: Int[Tensor, "*lead"], width: int) -> Int[Tensor, "*lead width"]:
    """0 and 1 for every cell of a mask."""
    return masks[..., None] >> torch.arange(width) & 1


@cache
@torch.inference_mode(False)
def is_trained(width: int) -> Bool[Tensor, " masks"]:
    """70 % of all masks, by a hash, so that the split depends on nothing that is drawn."""
    digests = (hashlib.blake2b(f"{width}:{mask}".encode(), digest_size=4).digest() for mask in range(2**width))
    return torch.tensor([int.from_bytes(digest, "little") % 100 < TRAINED_SHARE for digest in digests])


def moved(masks: Int[Tensor, " masks"], width: int) -> tuple[Int[Tensor, "masks pairs"], Bool[Tensor, "masks pairs"]]:
    """Two cells exchanged, for every pair of cells, and whether that moves a foreground cell: the masks at Hamming
    distance 2 with as many foreground cells.
    """
    first, second = torch.triu_indices(width, width, 1)
    cells = bits(masks, width)
    return masks[:, None] ^ (1 << first) ^ (1 << second), cells[:, first] != cells[:, second]
