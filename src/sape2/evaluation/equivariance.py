"""Equivariance error of tokens and biases inside a model when the image moves by whole patches on a torus.

Such a move resamples nothing and loses nothing, so a model without absolute position has an error of 0 up to rounding,
and any error comes from the position encoding (or from another part of the model that depends on absolute position).
Layer 0 is the input of the first block, layer l the output of block l.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.grid import Grid
from sape2.evaluation.base import LabelledImages, MappedModel, Row, as_mapped, drawn_images, evaluating, mean_row, patch_size
from sape2.evaluation.translation import translate

Steps = tuple[int, int]  # (dy, dx) in patches
States = dict[int, Tensor]  # by layer


def tokens_by_layer(model: MappedModel, images: Tensor) -> States:
    """The grid tokens, (B, N, D), of every layer."""
    tokens = [model.embed(images)[0], *(maps["tokens"] for maps in model.maps(images))]
    return {layer: t[:, model.num_prefix_tokens :] for layer, t in enumerate(tokens)}


def biases_by_layer(model: MappedModel, images: Tensor) -> States:
    """The row-centred bias, (B, h, N, N), of every layer that has one. A softmax does not see what a row has in common."""
    layers = enumerate(model.maps(images), start=1)
    return {layer: centred(maps["bias"]) for layer, maps in layers if "bias" in maps}


def centred(bias: Float[Tensor, "*lead queries keys"]) -> Float[Tensor, "*lead queries keys"]:
    """B' = B minus the mean of its row."""
    return bias - bias.mean(-1, keepdim=True)


def token_order(grid: Grid, steps: Steps, device: torch.device) -> Tensor:
    """[j] is the token that comes to stand at place j when the grid moves by `steps` around the torus."""
    index = torch.arange(grid[0] * grid[1], device=device).unflatten(0, grid)
    return index.roll(steps, (0, 1)).flatten()


def relative_error(found: Float[Tensor, "batch ..."], expected: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """||found - expected||_F / ||expected||_F per image; NaN, undefined, where what is expected is all 0."""
    difference, norm = (t.flatten(1).norm(dim=1) for t in (found - expected, expected))
    return torch.where(norm > 0, difference / norm, torch.full_like(norm, torch.nan))


def grid_steps(grid: Grid) -> list[tuple[str, Steps]]:
    """Along each axis one patch, and half of the grid: (axis, steps)."""
    by_axis = {"y": (grid[0], lambda n: (n, 0)), "x": (grid[1], lambda n: (0, n))}
    return [(axis, steps(n)) for axis, (length, steps) in by_axis.items() for n in sorted({1, length // 2}) if 0 < n < length]


def feature_equivariance(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 20) -> list[Row]:
    """Rows: feature_equivariance_error, ||F_l(S x) - S F_l(x)||_F / ||F_l(x)||_F per layer and move."""

    def moved(tokens: Tensor, order: Tensor) -> Tensor:
        return tokens[:, order]

    formula = "||F_l(S x) - S F_l(x)||_F / ||F_l(x)||_F of the grid tokens"
    return _error_rows("feature_equivariance_error", formula, tokens_by_layer, moved, model, data, limit, batch_size)


def bias_equivariance(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 20) -> list[Row]:
    """Rows: bias_equivariance_error, ||B'(S x) - S B'(x) S^T||_F / ||B'(x)||_F per layer with a bias, and move."""

    def moved(bias: Tensor, order: Tensor) -> Tensor:
        return bias[..., order, :][..., order]

    formula = "||B'(S x) - S B'(x) S^T||_F / ||B'(x)||_F of the row-centred bias, all heads"
    return _error_rows("bias_equivariance_error", formula, biases_by_layer, moved, model, data, limit, batch_size)


def _error_rows(
    name: str,
    formula: str,
    read: Callable[[MappedModel, Tensor], States],
    moved: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    data: LabelledImages,
    limit: int | None,
    batch_size: int,
) -> list[Row]:
    """One row for every layer and move. Raises ValueError for a model that cannot be looked into."""
    mapped = as_mapped(model)
    if mapped is None:
        raise ValueError(f"{name} needs a model with embed and maps (evaluation.base.MappedModel); got {type(model).__name__}")
    patch = patch_size(model, data)
    errors: dict[tuple[str, int, int], list[Tensor]] = {}  # (axis, shift_px, layer)
    with evaluating(model) as device:
        for images, _ in drawn_images(data, limit, batch_size):
            images = images.to(device)
            still = read(mapped, images)
            grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
            for axis, steps in grid_steps(grid):
                shift = (steps[0] * patch[0], steps[1] * patch[1])
                shifts = images.new_tensor([shift]).expand(len(images), 2)
                order = token_order(grid, steps, device)
                for layer, state in read(mapped, translate(images, shifts, "circular")).items():
                    error = relative_error(state, moved(still[layer], order)).float().cpu()
                    errors.setdefault((axis, max(shift), layer), []).append(error)
    protocol = f"{formula}; circular shift by whole patches, circular border"
    move = {"transform": "translation", "border": "circular"}
    return [
        mean_row("shift", name, torch.cat(values), "relative", protocol, axis=axis, shift_px=px, layer=layer, **move)
        for (axis, px, layer), values in errors.items()
    ]
