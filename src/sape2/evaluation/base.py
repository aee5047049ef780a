"""What every measurement shares: the models and data it takes, the rows it gives, intervals by bootstrap.

A measurement is a function (model, data) -> rows. It sees a model as something that turns images (B, C, height, width)
into logits; one that looks inside also needs `embed` and `maps` (`MappedModel`). A row is a flat JSON object with
`measure`, `name`, `value`, `unit`, `n` and `protocol`; where the value is a mean over images, `ci_low` and `ci_high` too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.grid import Grid

Row = dict[str, Any]


@runtime_checkable
class LabelledImages(Protocol):
    """What a measurement needs of a data set; `sape2.data.ImageData` is one. Batches are normalised images and labels."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Tensor: ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@runtime_checkable
class MappedModel(Protocol):
    """A model whose layers can be looked into; `sape2.vit.ViT` is one."""

    @property
    def num_prefix_tokens(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]: ...

    def maps(self, images: Tensor) -> list[dict[str, Tensor]]: ...


def row(measure: str, name: str, value: float | None, unit: str, n: int, protocol: str, **conditions: Any) -> Row:
    """One result; `conditions` say what it was measured at (layer, size, shift_px, ...)."""
    return {"measure": measure, "name": name, "value": value, "unit": unit, "n": n, "protocol": protocol} | conditions


def mean_row(measure: str, name: str, per_image: Float[Tensor, " images"], unit: str, protocol: str, **conditions: Any) -> Row:
    """The mean over images with its 95 % bootstrap interval; images whose value is NaN (undefined there) are left out.

    Where it is undefined for all of them the value is None.
    """
    defined = per_image[~per_image.isnan()].double()
    if not len(defined):
        return row(measure, name, None, unit, 0, protocol, **conditions)
    low, high = bootstrap_interval(defined)
    interval = {"ci_low": low, "ci_high": high}
    return row(measure, name, defined.mean().item(), unit, len(defined), protocol, **interval, **conditions)


def bootstrap_interval(
    values: Float[Tensor, " images"], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean when whole images are drawn again with replacement (Efron)."""
    means = _resampling(len(values), resamples, seed) @ values.double()
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


@functools.lru_cache(maxsize=1)  # most rows of a measurement are about the same number of images
def _resampling(number: int, resamples: int, seed: int) -> Float[Tensor, "resamples images"]:
    """The share of every image in every resample."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(number, (number,), generator=generator).bincount(minlength=number) for _ in range(resamples)]
    return torch.stack(draws).double() / number


def first_images(data: LabelledImages, limit: int | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the first `limit` images (all of them for None)."""
    left = len(data.labels) if limit is None else limit
    for images, labels in data.batches(batch_size):
        if left <= 0:
            return
        yield images[:left], labels[:left]
        left -= len(images)
