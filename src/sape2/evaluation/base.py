"""The interface of measurements: the models and data they take, the rows they return, and bootstrap intervals.

A measurement (`Measure`) is a function (model, data) -> rows. It sees a model as something that turns images
(B, C, height, width) into logits; one that reads layers also needs `embed` and `maps` (`MappedModel`). A row is a flat
JSON object with `measure`, `name`, `value`, `unit`, `n` and `protocol`; where the value is a mean over images that differ,
`ci_low` and `ci_high` too; where guessing would give more than 0, `chance`. With a `limit`, images are drawn by class
with a seed; the first ones would not do, because a set that is sorted by class begins with one class.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sape2.data.images import draw_by_class
from sape2.encodings.grid import Grid
from sape2.machine import evaluating, placed
from sape2.tables import Row


@runtime_checkable
class LabelledImages(Protocol):
    """The data that a measurement takes; `sape2.data.ImageData` is one. Batches are normalised images and labels."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Tensor: ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@runtime_checkable
class MappedModel(Protocol):
    """A model whose layers can be looked into; `sape2.models.vit.ViT` is one."""

    @property
    def num_prefix_tokens(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]: ...

    def maps(self, images: Tensor) -> list[dict[str, Tensor]]: ...


def as_mapped(model: object) -> MappedModel | None:
    """The model, if it can be looked into."""
    return model if isinstance(model, MappedModel) else None


class Measure(Protocol):
    """The type of the functions in `MEASURES`. Rows come as a list, or one by one so that the caller can show progress.

    `limit` is the number of images, drawn by class (`drawn`); None leaves it to the measure. Every row states its n.
    """

    def __call__(self, model: Any, data: LabelledImages, limit: int | None = None) -> Iterable[Row]: ...


def row(measure: str, name: str, value: int | float | None, unit: str, n: int, protocol: str, **conditions: Any) -> Row:
    """One result; `conditions` say what it was measured at (layer, size, shift_px, ...)."""
    return {"measure": measure, "name": name, "value": value, "unit": unit, "n": n, "protocol": protocol} | conditions


def mean_row(measure: str, name: str, per_image: Float[Tensor, " images"], unit: str, protocol: str, **conditions: Any) -> Row:
    """The mean over images with its 95 % interval (`interval_of`); images whose value is NaN (undefined there) are left out.

    Where it is undefined for all of them the value is None.
    """
    defined = per_image[~per_image.isnan()].double()
    if not len(defined):
        return row(measure, name, None, unit, 0, protocol, **conditions)
    interval = interval_of(defined, is_share=unit == "fraction" and name not in DIFFERENCES)
    return row(measure, name, defined.mean().item(), unit, len(defined), protocol, **interval, **conditions)


DIFFERENCES = ("accuracy_drop",)  # fractions that may be negative


def interval_of(values: Float[Tensor, " images"], is_share: bool = False) -> Row:
    """ci_low and ci_high of the mean: Wilson's for a share of images, else by bootstrap; nothing where there is none.

    A share is of values that are 0 or 1. Other values that are all the same, or a single one, tell no spread, so they get no
    interval rather than one of no width.
    """
    if is_share and bool(((values == 0) | (values == 1)).all()):
        low, high = wilson_interval(values.mean().item(), len(values))
    else:
        low, high = bootstrap_interval(values)
    return {"ci_low": low, "ci_high": high} if low < high else {}


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share p of n images (1927): with z the normal quantile,

    (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n). Of 12 right of 12 it is 0.758 to 1, not 1 to 1.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def bootstrap_interval(values: Float[Tensor, " images"]) -> tuple[float, float]:
    """95 % percentile interval of the mean when whole images are drawn again with replacement (Efron)."""
    means = resampled_means(values[None])[:, 0]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled_means(
    values: Float[Tensor, "kinds images"], resamples: int = 1000, seed: int = 0
) -> Float[Tensor, "resamples kinds"]:
    """The means of each kind of value over images drawn again with replacement, all kinds over the same images (paired)."""
    counts = _resampled_counts(values.shape[1], resamples, seed)
    return counts.double() @ values.double().T / values.shape[1]


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _resampled_counts(images: int, resamples: int, seed: int) -> Float[Tensor, "resamples images"]:
    """Number of times each resample draws each image; cached, because all rows of a measurement use as many images."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(images, (images,), generator=generator) for _ in range(resamples))
    return torch.stack([draw.bincount(minlength=images).float() for draw in draws])


# --- which images ----------------------------------------------------------------------------------------------------


LIMITS = {"shift": 1000, "resolution": 200, "grouping": 1000, "health": 1000, "cost": 64}  # images, unless told; others: all
DRAW_SEED = 0  # of the images that a limit leaves, so that all models are measured on the same ones


def drawn(data: LabelledImages, limit: int | None) -> LabelledImages:
    """`limit` images of `data` in its order, drawn by class with `DRAW_SEED`; all of them for None, or if there are no more.

    Classes have the shares that they have in `data`. A smaller draw is a part of a larger one.
    """
    if limit is None or limit >= len(data.labels):
        return data
    index = draw_by_class(data.labels.cpu(), limit, DRAW_SEED)
    return Drawn(data, index)


class Drawn:
    """Some images of a data set, in its order."""

    def __init__(self, data: Any, index: Int[Tensor, " images"]) -> None:
        self.data, self.index = data, index

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def labels(self) -> Tensor:
        return self.data.labels[self.index]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the drawn images. A set that takes an index reads only these; other sets are read completely."""
        if hasattr(self.data, "__getitem__"):
            yield from self.data[self.index].batches(batch_size)
            return
        start, images, labels = 0, [], []
        for some, named in self.data.batches(batch_size):
            inside = self.index[(self.index >= start) & (self.index < start + len(some))] - start
            images.append(some[inside])
            labels.append(named[inside])
            start += len(some)
        yield from zip(torch.cat(images).split(batch_size), torch.cat(labels).split(batch_size), strict=True)


def images_taken(measure: str, limit: int | None, there: int) -> int:
    """Number of images that a measure takes, out of `there`, under a limit (None: its own)."""
    wanted = LIMITS.get(measure, there) if limit is None else limit
    if measure == "cost":
        wanted = min(wanted, LIMITS["cost"])
    return int(min(wanted, there))


def count_images(data: LabelledImages, limit: int | None, measure: str = "") -> int:
    """Number of images to measure on, all of them if it is no named measure; raises ValueError for none, or a limit below 1."""
    if not len(data.labels):
        raise ValueError("there are no images to measure on")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of images to measure on must be at least 1; got {limit}")
    return images_taken(measure, limit, len(data.labels))


def answered(logits: Float[Tensor, "*images classes"]) -> Float[Tensor, "*images classes"]:
    """The same logits. Raises ValueError if any is NaN: such an image has no class, and argmax would name one."""
    lost = logits.isnan().any(-1)
    if lost.any():
        raise ValueError(
            f"the model gives NaN for {int(lost.sum())} of {lost.numel()} images, which then have no class; its weights are "
            "damaged, or its numbers overflow (in half precision, try float32)"
        )
    return logits


def image_size(data: LabelledImages) -> tuple[int, int]:
    """(height, width) of the images."""
    images, _ = next(data.batches(1))
    return images.shape[-2], images.shape[-1]


def chance_agreement(first: Int[Tensor, ...], second: Int[Tensor, ...]) -> float:
    """sum_c p_c q_c: how often labels drawn independently with the frequencies found in `first` and `second` agree."""
    size = int(max(first.max(), second.max())) + 1
    p, q = (labels.flatten().bincount(minlength=size).double() / labels.numel() for labels in (first, second))
    return (p @ q).item()


def patch_size(model: nn.Module, data: LabelledImages) -> tuple[int, int]:
    """(height, width) of a patch in pixels: from the grid that the model makes of an image, or from its attributes.

    Raises ValueError for a model that does not tell; `model.patch_size = 1` makes any model tell.
    """
    mapped = as_mapped(model)
    if mapped is not None:
        images, _ = next(data.batches(1))
        with evaluating(model):
            _, grid = mapped.embed(placed(images, model))
        return images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    for owner in (model, getattr(model, "patch_embed", None), getattr(model, "config", None)):
        found = getattr(owner, "patch_size", None)
        if found is not None:
            height, width = found if isinstance(found, (tuple, list)) else (found, found)
            return int(height), int(width)
    raise ValueError(
        f"shifts and sizes are chosen by the patch, and a {type(model).__name__} does not tell its own; set model.patch_size "
        "(1 for a model without patches)"
    )
