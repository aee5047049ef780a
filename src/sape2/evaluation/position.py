"""Position probe: how well a linear model predicts row and column from the tokens of each layer.

Content also predicts position (sky is above), so every number comes twice: with the patches in place, and with the
patches of every image shuffled. Shuffled content says nothing about position, so only position that the model adds is left.
A model without any encoding has R^2 = 0 on shuffled patches, exactly. Source of the method: Islam et al., arXiv:2001.08248.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.grid import Grid, coordinates
from sape2.evaluation.base import LabelledImages, Row, count_images, drawn, mean_row
from sape2.evaluation.layers import grid_of, layers_of

PENALTY = 1e-4  # of the ridge regression, in units of the variance of a feature
AXES = ("y", "x")
PROTOCOL = (
    f"ridge regression (penalty {PENALTY:g} of each feature's variance) from grid tokens to row and column, fitted on images "
    "1, 3, 5, ..., measured on images 2, 4, 6, ..."
)


def moments(features: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"]) -> Float[Tensor, "all all"]:
    """z^T z of the rows z = (1, features, targets): sums from which a ridge regression follows without keeping the rows."""
    rows = torch.cat([torch.ones_like(targets[:, :1]), features, targets], dim=1)
    return rows.T @ rows


def ridge(
    sums: Float[Tensor, "all all"], num_targets: int = 2, penalty: float = PENALTY
) -> tuple[Float[Tensor, "features targets"], Float[Tensor, " targets"]]:
    """(weights, intercept) that minimise mean |y - w x - c|^2 + penalty |w s|^2, s the standard deviation of each feature.

    `sums` are those of `moments`. A feature that never changes gets weight 0.
    """
    second, x, y = sums / sums[0, 0], slice(1, -num_targets), slice(-num_targets, None)
    mean = second[0]
    covariance = second - mean[:, None] * mean
    variance = covariance.diagonal()[x]
    varies = variance > 1e-12 * second.diagonal()[x]  # less is rounding
    scale = torch.where(varies, variance.clamp_min(0).sqrt(), torch.inf)
    correlation = covariance[x, x] / (scale[:, None] * scale)
    identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    weights = torch.linalg.solve(correlation + penalty * identity, covariance[x, y] / scale[:, None]) / scale[:, None]
    return weights, mean[y] - mean[x] @ weights


def position_content(
    measure: str, model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 32
) -> Iterator[Row]:
    """Rows position_r2 and position_error per axis and layer; layer 0 is what enters the first block.

    Raises ValueError for less than two images: one half is for fitting, the other for measuring.
    """
    number = count_images(data, limit)
    if number < 2:
        raise ValueError(f"the position probe needs at least 2 images, to fit on one and measure on the other; got {number}")
    batch_size += batch_size % 2  # so that every batch starts with an image of the first half
    for shuffled in (False, True):
        probes = _fit(model, _half(data, limit, batch_size, 0), shuffled)
        yield from _measure(measure, model, _half(data, limit, batch_size, 1), shuffled, probes)


def _half(data: LabelledImages, limit: int | None, batch_size: int, start: int) -> Iterator[Tensor]:
    for images, _ in drawn(data, limit).batches(batch_size):
        if len(images) > start:
            yield images[start::2]


def _fit(model: nn.Module, batches: Iterator[Tensor], shuffled: bool) -> list[tuple[Tensor, Tensor]]:
    """One probe a layer."""
    sums: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for images in batches:
        for layer, tokens, grid in _tokens(model, images, generator if shuffled else None):
            found = moments(tokens.flatten(0, 1), _targets(grid, tokens).repeat(len(tokens), 1))
            sums[layer] = sums[layer] + found if layer in sums else found
    return [ridge(some) for _, some in sorted(sums.items())]


def _measure(
    measure: str, model: nn.Module, batches: Iterator[Tensor], shuffled: bool, probes: list[tuple[Tensor, Tensor]]
) -> Iterator[Row]:
    squared, absolute = ([[] for _ in probes] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    grid = (1, 1)
    for images in batches:
        for layer, tokens, grid in _tokens(model, images, generator if shuffled else None):
            weights, intercept = probes[layer]
            error = tokens @ weights + intercept - _targets(grid, tokens)  # (B, N, 2)
            squared[layer].append(error.square().mean(1).cpu())
            absolute[layer].append(error.abs().mean(1).cpu())
    place = coordinates(grid).double()
    spread, away = place.var(0, unbiased=False), (place - place.mean(0)).abs().mean(0)
    for layer in range(len(probes)):
        r2 = (1 - torch.cat(squared[layer]) / spread).masked_fill(spread == 0, float("nan"))
        errors = torch.cat(absolute[layer])
        for index, axis in enumerate(AXES):
            conditions = {"layer": layer, "axis": axis, "patches": "shuffled" if shuffled else "in place"}
            yield mean_row(measure, "position_r2", r2[:, index], "R^2", PROTOCOL, chance=0.0, **conditions)
            chance = away[index].item()
            yield mean_row(measure, "position_error", errors[:, index], "patches", PROTOCOL, chance=chance, **conditions)


def _tokens(
    model: nn.Module, images: Tensor, generator: torch.Generator | None
) -> Iterator[tuple[int, Float[Tensor, "batch tokens dim"], Grid]]:
    """(layer, grid tokens, grid): 0 for what enters the first block, then what leaves each layer."""
    if generator is not None:
        images = shuffle_patches(images, grid_of(model, images), generator)
    for layer in layers_of(model, images):
        if layer.number == 1:
            yield 0, layer.entering, layer.grid
        yield layer.number, layer.leaving, layer.grid


def _targets(grid: Grid, like: Tensor) -> Float[Tensor, "tokens 2"]:
    return coordinates(grid, like.device).to(like.dtype)


def shuffle_patches(
    images: Float[Tensor, "batch channels height width"], grid: Grid, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """The patches of every image in an order of its own."""
    height, width = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    patches = images.unfold(2, height, height).unfold(3, width, width).flatten(2, 3)  # (B, C, N, height, width)
    order = torch.rand(len(images), patches.shape[2], generator=generator).argsort(-1).to(images.device)
    patches = patches.gather(2, order[:, None, :, None, None].expand_as(patches))
    return patches.unflatten(2, grid).transpose(3, 4).flatten(4, 5).flatten(2, 3)
