"""Images at sizes other than the training size, and the same model with other rules for positions beyond its tables.

scaled: the whole image resized, bicubic with antialiasing, so that objects change size with it.
padded: pixels unchanged in the centre of a larger canvas, surrounded by their reflection or by the mean colour
        (0 in normalised images). Where the canvas is smaller than the image, its middle is cut out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.evaluation.translation import source_index

Size = tuple[int, int]
FACTORS = (0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0)  # of the training size: 20 to 64 for 32 pixels
OBLONG = ((1.0, 1.5), (1.5, 1.0))  # (height, width)
AS_BUILT = "as built"


@dataclass(frozen=True)
class View:
    """One way to show the images. `border` is what surrounds a padded image; none where nothing does."""

    size: Size
    transform: Literal["scaled", "padded"]
    border: Literal["none", "reflect", "mean"] = "none"

    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height2 width2"]:
        if self.transform == "scaled":
            return scaled(images, self.size)
        return on_canvas(images, self.size, "mean" if self.border == "none" else self.border)

    def __str__(self) -> str:
        """Text for protocols."""
        if self.transform == "scaled":
            return "image resized, bicubic with antialiasing, no border"
        surround = {"reflect": "reflected border", "mean": "border of the mean colour", "none": "cut out, no border"}
        return f"image on a canvas of another size, pixels unchanged, centred, {surround[self.border]}"


def scaled(images: Float[Tensor, "batch channels height width"], size: Size) -> Float[Tensor, "batch channels h w"]:
    """Resized, bicubic with antialiasing; unchanged at its own size."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def on_canvas(
    images: Float[Tensor, "batch channels height width"], size: Size, border: Literal["reflect", "mean"]
) -> Float[Tensor, "batch channels h w"]:
    """The middle of the image in the middle of the canvas; an odd pixel more, or less, is at the bottom or right."""
    for dimension, length in zip((-2, -1), size, strict=True):
        there = images.shape[dimension]
        place = torch.arange(length, device=images.device) + int((there - length) / 2)
        inside = (place >= 0) & (place < there)
        images = images.index_select(dimension, source_index(place, there, "reflect"))
        if border == "mean":
            images = images * (inside[:, None] if dimension == -2 else inside)
    return images


def plain_sizes(size: Size, patch: Size) -> list[Size]:
    """The multiples of the patch nearest to `FACTORS` times the training size, smallest first; that size is among them."""
    heights, widths = ([_nearest(factor * side, step) for factor in FACTORS] for side, step in zip(size, patch, strict=True))
    return sorted({*zip(heights, widths, strict=True), size})


def oblong_sizes(size: Size, patch: Size) -> list[Size]:
    """Sizes of another aspect: half as wide, or half as high, again."""
    sizes = [tuple(_nearest(f * s, p) for f, s, p in zip(factors, size, patch, strict=True)) for factors in OBLONG]
    return [(height, width) for height, width in sizes if (height, width) != size]


def _nearest(length: float, step: int) -> int:
    return max(round(length / step), 1) * step


def views(size: Size, patch: Size) -> list[View]:
    """The training size first; then every size scaled, and padded: the larger and the oblong ones with both borders."""
    sizes = dict.fromkeys([*plain_sizes(size, patch), *oblong_sizes(size, patch)])
    others = [other for other in sizes if other != size]
    shown = [View(other, "scaled") for other in [size, *others]]
    for other in others:
        grows = other[0] > size[0] or other[1] > size[1]
        shown += [View(other, "padded", border) for border in (("reflect", "mean") if grows else ("none",))]
    return shown


# --- rules for positions beyond the tables ---------------------------------------------------------------------------


def rules(model: nn.Module) -> dict[str, nn.Module]:
    """The model as it is, and a copy of it under every other rule that its encodings know for grids beyond the training grid.

    The key of the first is its own rule where all its encodings have the same one, "as built" where they have none or
    several. The weights are the same in all of them. A table with more positions is a choice of training
    (`num_positions`), not a rule, and gets no entry here.
    """
    encodings = list(_with_rule(model))
    built = {encoding.options.beyond for encoding in encodings}
    others = {rule for encoding in encodings for rule in _known(encoding) if rule != encoding.options.beyond}
    first = built.pop() if len(built) == 1 else AS_BUILT
    return {first: model} | {rule: with_beyond(model, rule) for rule in sorted(others)}


def with_beyond(model: nn.Module, rule: str) -> nn.Module:
    """A copy, weights and all, whose encodings follow `rule` (their option `beyond`) wherever they know it."""
    changed = copy.deepcopy(model)
    for encoding in (encoding for encoding in _with_rule(changed) if rule in _known(encoding)):
        encoding.options = dataclasses.replace(encoding.options, beyond=rule)
    return changed


def describe_rule(model: nn.Module) -> str:
    """Says which encoding follows which rule, for protocols."""
    found = sorted({f"{type(encoding).__name__} {encoding.options.beyond}" for encoding in _with_rule(model)})
    return f"beyond the training grid: {', '.join(found)}" if found else "beyond the training grid: as the model is built"


def _with_rule(model: nn.Module) -> Iterator[Any]:
    """The encodings inside that have the option `beyond`; their parameters do not depend on it."""
    return (module for module in model.modules() if hasattr(getattr(module, "options", None), "beyond"))


def _known(encoding: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(type(encoding.options))["beyond"])
