"""Images shifted by whole pixels and by fractions of one, with two rules for the pixels that enter at the border.

Shifts are (dy, dx) in pixels, positive down and to the right, as in `torch.roll`.
circular: pixels that leave at one side enter at the other, so nothing is lost and whole shifts form a group.
reflect:  the image is continued by its reflection at the centres of its border pixels (`F.pad(mode="reflect")`), so moving
          it by s is the same as cropping a window out of the padded image, s pixels away from its middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Border = Literal["circular", "reflect"]
ShiftAxis = Literal["x", "y"]


def source_index(place: Int[Tensor, "*shape"], length: int, border: Border) -> Int[Tensor, "*shape"]:
    """The pixel, out of a line of `length`, that is seen at `place`, which may lie outside the line."""
    if border == "circular":
        return place % length
    period = max(2 * (length - 1), 1)
    folded = place % period
    return torch.minimum(folded, period - folded)


def translate(
    images: Float[Tensor, "batch channels height width"], shifts: Float[Tensor, "batch 2"], border: Border
) -> Float[Tensor, "batch channels height width"]:
    """Every image moved by its own (dy, dx): bilinear between pixels, exact for whole shifts."""
    moved = _translate_rows(images, shifts[:, 0], border)
    return _translate_rows(moved.transpose(-1, -2), shifts[:, 1], border).transpose(-1, -2)


def _translate_rows(images: Tensor, shift: Tensor, border: Border) -> Tensor:
    """out[y] = in[y - shift], linear between the rows on either side of y - shift."""
    batch, channels, height, width = images.shape
    whole = shift.floor()
    place = torch.arange(height, device=images.device) - whole.long()[:, None]  # (B, height)

    def rows(place: Tensor) -> Tensor:
        index = source_index(place, height, border)[:, None, :, None]
        return images.gather(-2, index.expand(batch, channels, height, width))

    fraction = (shift - whole).to(images.dtype)[:, None, None, None]
    if not fraction.any():
        return rows(place)
    return rows(place) + fraction * (rows(place - 1) - rows(place))


def shift_derivative(
    images: Float[Tensor, "batch channels height width"], axis: ShiftAxis, border: Border
) -> Float[Tensor, "batch channels height width"]:
    """d/ds of the image moved by s pixels along `axis`, at s = 0: (x[i - 1] - x[i + 1]) / 2.

    Linear interpolation has a kink at whole shifts; this is the mean of its derivatives from the left and from the right,
    and the limit of its central difference.
    """
    dimension = -2 if axis == "y" else -1
    length = images.shape[dimension]
    place = torch.arange(length, device=images.device)
    before, after = (images.index_select(dimension, source_index(place + step, length, border)) for step in (-1, 1))
    return (before - after) / 2


@dataclass(frozen=True)
class ShiftRange:
    """Whole shifts drawn uniformly from step * {low..high}, each axis by itself; pairs are (y, x), in pixels."""

    label: str
    border: Border
    low: tuple[int, int]
    high: tuple[int, int]
    step: tuple[int, int] = (1, 1)

    def draw(self, draws: int, images: int, seed: int) -> Float[Tensor, "draws images 2"]:
        """Independent shifts for every image; the same for the same seed on every machine."""
        generator = torch.Generator().manual_seed(seed)
        axes = [
            step * torch.randint(low, high + 1, (draws, images), generator=generator)
            for low, high, step in zip(self.low, self.high, self.step, strict=True)
        ]
        return torch.stack(axes, dim=-1).float()

    @property
    def size(self) -> int:
        """Number of different shifts."""
        rows, columns = (high - low + 1 for low, high in zip(self.low, self.high, strict=True))
        return rows * columns

    def __str__(self) -> str:
        """Text for protocols: "dy in 0..3, dx in 0..3 px"."""
        axes = zip(("dy", "dx"), self.low, self.high, self.step, strict=True)
        return ", ".join(f"{n} in {'' if step == 1 else f'{step} * '}{low}..{high}" for n, low, high, step in axes) + " px"


def consistency_ranges(size: tuple[int, int], patch: tuple[int, int]) -> list[ShiftRange]:
    """Within one patch, over the whole torus, by whole patches; and the crops of the image padded by 1/8 of its size.

    What holds no shift but 0 (a patch of one pixel) is left out.
    """
    height, width = size
    cells = (height // patch[0] - 1, width // patch[1] - 1)
    pad = (max(height // 8, 1), max(width // 8, 1))
    ranges = [
        ShiftRange("sub_patch", "circular", (0, 0), (patch[0] - 1, patch[1] - 1)),
        ShiftRange("full", "circular", (0, 0), (height - 1, width - 1)),
        ShiftRange("patch_multiples", "circular", (0, 0), cells, patch),
        ShiftRange("crops", "reflect", (-pad[0], -pad[1]), pad),
    ]
    return [shifts for shifts in ranges if shifts.size > 1]


def shift_sizes(size: tuple[int, int], patch: tuple[int, int]) -> list[int]:
    """Pixels of the accuracy curve: 0, 1, 2, 3, then half, one, two and four patches, up to half the image."""
    largest = max(patch)
    sizes = {0, 1, 2, 3, largest // 2, largest, 2 * largest, 4 * largest}
    return sorted(px for px in sizes if px <= min(size) // 2)


def shift_sets(patch: tuple[int, int], reach: int = 2, phases: int = 8) -> dict[str, tuple[Border, list[tuple[int, int]]]]:
    """The sets that the worst case is taken over: name -> (border, shifts).

    patch: every shift within one patch, on the torus (of a patch above `phases` pixels, that many of each axis at most,
    evenly spaced), if it has more than one pixel. plus_minus: every shift of up to `reach` pixels either way, reflected border.
    """
    rows, columns = (range(0, side, -(-side // phases)) for side in patch)
    near = range(-reach, reach + 1)
    sets: dict[str, tuple[Border, list[tuple[int, int]]]] = {
        "patch": ("circular", [(dy, dx) for dy in rows for dx in columns]),
        "plus_minus": ("reflect", [(dy, dx) for dy in near for dx in near]),
    }
    return {name: (border, shifts) for name, (border, shifts) in sets.items() if len(shifts) > 1}
