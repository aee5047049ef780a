"""Resamples tables to another grid as images, by one matrix per axis with the weight of every old place in every new one.

The sums are those of `F.interpolate(..., align_corners=False)`, which is not called itself: for images one column wide
PyTorch's antialiased form (2.14 and before) gives every row the value of the first one, and in ONNX a side of length one is
sampled elsewhere. A matrix product is right on every grid and in every graph.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.grid import Grid
from sape2.encodings.precision import no_autocast

Kernel = Literal["bicubic", "bilinear"]


def resample(
    image: Float[Tensor, "*lead height width"], grid: Grid, kernel: Kernel, antialias: bool
) -> Float[Tensor, "*lead new_height new_width"]:
    with no_autocast(image):
        down, across = (_weights(image, axis, length, kernel, antialias) for axis, length in zip((-2, -1), grid, strict=True))
        return down @ image @ across.T


def _weights(image: Tensor, axis: int, length: int, kernel: Kernel, antialias: bool) -> Float[Tensor, "new_length old_length"]:
    """The weight of every old place in each of `length` new ones; their centres lie (i + 1/2) old / new - 1/2 places along."""
    old = image.shape[axis]
    place = torch.arange(old, device=image.device).to(image.dtype)
    ratio = old / image.new_full((), length)
    centre = (torch.arange(length, device=image.device).to(image.dtype) + 0.5) * ratio - 0.5
    if antialias:  # a kernel as wide as the new places are apart, what lies outside left out
        weights = _kernel((place - centre[:, None]) / ratio.clamp_min(1), kernel, -0.5)
        return weights / weights.sum(-1, keepdim=True)
    # Four places around the centre, those outside taken for the last one.
    centre = centre if kernel == "bicubic" else centre.clamp_min(0)
    taps = torch.arange(-1, 3, device=image.device).to(image.dtype) + centre.floor()[:, None]
    hit = taps.clamp(0, old - 1)[:, :, None] == place
    return (_kernel(taps - centre[:, None], kernel, -0.75)[:, :, None] * hit).sum(1)


def _kernel(distance: Tensor, kernel: Kernel, a: float) -> Tensor:
    """Keys' cubic convolution with its parameter a, or the triangle; 0 beyond two places, or one."""
    d = distance.abs()
    if kernel == "bilinear":
        return (1 - d).clamp_min(0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0))
