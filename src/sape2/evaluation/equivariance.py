"""Equivariance error of tokens and biases inside a model when the image moves by whole patches on a torus.

Such a move resamples nothing and loses nothing, so a model without absolute position has an error of 0 up to rounding,
and any error comes from the position encoding (or from another part of the model that depends on absolute position).
Layer 0 is the input of the first block, layer l the output of block l.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.grid import Grid
from sape2.evaluation.base import LabelledImages, Row, drawn, mean_row, patch_size
from sape2.evaluation.layers import layers_of, mapped
from sape2.evaluation.translation import translate
from sape2.machine import placed

Steps = tuple[int, int]  # (dy, dx) in patches
FEATURES, BIAS = "feature_equivariance_error", "bias_equivariance_error"
FORMULAS = {
    FEATURES: "||F_l(S x) - S F_l(x)||_F / ||F_l(x)||_F of the grid tokens",
    BIAS: "||B'(S x) - S B'(x) S^T||_F / ||B'(x)||_F of the row-centred bias, all heads",
}


def states(model: nn.Module, images: Tensor) -> dict[tuple[str, int], Tensor]:
    """(name of the error, layer) -> what should move along: tokens (B, N, D), and the row-centred bias (B, h, N, N)."""
    found = {}
    for layer in layers_of(model, images):
        if layer.number == 1:
            found[FEATURES, 0] = layer.entering
        found[FEATURES, layer.number] = layer.leaving
        if layer.bias is not None:
            found[BIAS, layer.number] = centred(layer.bias)
    return found


def centred(bias: Float[Tensor, "*lead queries keys"]) -> Float[Tensor, "*lead queries keys"]:
    """B' = B minus the mean of its row, which a softmax does not see."""
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


def equivariance(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 10) -> list[Row]:
    """Rows: feature_equivariance_error per layer and move, and bias_equivariance_error per layer with a bias, and move.

    Both as in `FORMULAS`. Raises ValueError for a model that cannot be looked into.
    """
    mapped(model, "equivariance of features and biases")
    patch = patch_size(model, data)
    errors: dict[tuple[str, str, int, int], list[Tensor]] = {}  # (name, axis, shift_px, layer)
    for images, _ in drawn(data, limit).batches(batch_size):
        images = placed(images, model)
        still = states(model, images)
        grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
        for axis, steps in grid_steps(grid):
            shift = (steps[0] * patch[0], steps[1] * patch[1])
            shifts = images.new_tensor([shift], dtype=torch.float32).expand(len(images), 2)
            for (name, layer), state in states(model, translate(images, shifts, "circular")).items():
                order = token_order(grid, steps, state.device)
                expected = still[name, layer][..., order, :]
                error = relative_error(state, expected if name == FEATURES else expected[..., order])
                errors.setdefault((name, axis, max(shift), layer), []).append(error.float().cpu())
    move = {"transform": "translation", "border": "circular"}
    return [
        mean_row(
            "shift", name, torch.cat(values), "relative",
            f"{formula}; circular shift by whole patches, circular border", axis=axis, shift_px=px, layer=layer, **move,
        )
        for name, formula in FORMULAS.items()
        for (of, axis, px, layer), values in errors.items()
        if of == name
    ]  # fmt: skip
