"""Rotary encodings: queries and keys are turned by angles that grow with their place, so that q.k sees the offset only.

All in real arithmetic: channels 2f and 2f + 1 of a head are one plane and turn by the angle f. Prefix tokens are not
turned, so a product of a prefix token with a patch still sees the absolute place of the patch, as in the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts, full_precision, make_options, no_autocast
from sape2.encodings.grid import Grid, check_grid, check_tokens, coordinates

Beyond = Literal["extrapolate", "rescale"]


def turn(
    vectors: Float[Tensor, "batch heads tokens head_dim"], angles: Float[Tensor, "*#heads tokens planes"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """(a, b) -> (a cos - b sin, a sin + b cos) in every plane, computed in float32 or better, in the dtype of `vectors`."""
    a, b = full_precision(vectors).unflatten(-1, (-1, 2)).unbind(-1)  # (B, h, N, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(vectors.dtype)


def places(grid: Grid, trained: Grid, beyond: Beyond, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every token, (N,), in the dtype and on the device of `like`.

    On other grids than the trained one, `extrapolate` leaves them alone and `rescale` stretches or squeezes them onto
    the trained range, x * W_trained / W (EVA, arXiv:2303.11331; `ref_feat_shape` in timm).
    """
    y, x = coordinates(grid, like.device).to(full_precision(like).dtype).unbind(-1)
    if beyond == "rescale":
        x, y = x * (trained[1] / grid[1]), y * (trained[0] / grid[0])
    return x, y


def check_head_dim(name: str, num_heads: int, head_dim: int) -> None:
    """Raises ValueError unless x and y get the same number of planes."""
    if head_dim % 4:
        raise ValueError(
            f"{name} needs head_dim divisible by 4; got {head_dim} (dim={num_heads * head_dim} / num_heads={num_heads}). "
            "Choose another dim or num_heads"
        )


def check_temperature(name: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"{name}:temperature must be above 0; got {temperature}")


class Rotation(AttentionEncoding):
    """Turns q and k by `angles`; what these are is for the subclass to say."""

    def rotate(
        self, q: Float[Tensor, "batch heads tokens head_dim"], k: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens head_dim"]]:
        check_tokens(q, grid)
        with no_autocast(q):
            angles = self.angles(grid, q)
            return turn(q, angles), turn(k, angles)

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "*heads tokens planes"]:
        """The angle of every plane at every token, in radians, on the device of `like`, in float32 or better."""
        raise NotImplementedError


@dataclass(frozen=True)
class RotaryOptions:
    """`temperature`: the longest wavelength is nearly 2 pi times it, in patches; `beyond`: see `places`."""

    temperature: float = 100.0
    beyond: Beyond = "extrapolate"

    def __post_init__(self) -> None:
        check_temperature("rope", self.temperature)


class Rotary(Rotation):
    """Axial RoPE: the first half of the planes turns by x w_f, the second half by y w_f, w_f = temperature^(-f / (d/4)).

    Frequencies, order and temperature 100 as in RoPE-ViT (arXiv:2403.13298), so weights of timm's ViT-RoPE models
    ("cat", x before y) see the same rotation. Raises ValueError unless head_dim is divisible by 4.
    """

    Options = RotaryOptions
    summary = "axial rotary: half of the channels turn with x, half with y"
    source = "arXiv:2104.09864, 2D as in arXiv:2403.13298"
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        self.options = make_options(RotaryOptions, "rope", options)
        check_head_dim("rope", num_heads, head_dim)
        self.head_dim, self.grid = head_dim, check_grid(grid)

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "tokens planes"]:
        x, y = places(grid, self.grid, self.options.beyond, like)
        per_axis = self.head_dim // 4
        frequencies = self.options.temperature ** (-torch.arange(per_axis, device=x.device).to(x.dtype) / per_axis)
        return torch.cat([x[:, None] * frequencies, y[:, None] * frequencies], dim=-1)


@dataclass(frozen=True)
class RotaryMixedOptions:
    """`temperature`, `init`: lengths and directions of the first frequencies, drawn per head or x and y; `beyond`: `places`."""

    temperature: float = 10.0
    init: Literal["random", "axes"] = "random"
    beyond: Beyond = "extrapolate"

    def __post_init__(self) -> None:
        check_temperature("rope_mixed", self.temperature)


class RotaryMixed(Rotation):
    """RoPE-mixed (arXiv:2403.13298): plane f turns by x w^x_f + y w^y_f with learned w, (2, h, d/2), one per head and layer.

    At the start w has the lengths temperature^(-f / (d/4)), twice: along a direction drawn for every head, and along
    the one at a right angle to it, as in RoPE-ViT and timm. w[0] goes with x. Raises ValueError unless head_dim is
    divisible by 4.
    """

    Options = RotaryMixedOptions
    summary = "rotary with learned 2D frequencies per head"
    source = "arXiv:2403.13298"
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        self.options = make_options(RotaryMixedOptions, "rope_mixed", options)
        check_head_dim("rope_mixed", num_heads, head_dim)
        self.grid = check_grid(grid)
        self.frequencies = nn.Parameter(self._initial_frequencies(num_heads, head_dim // 4))

    def _initial_frequencies(self, num_heads: int, per_direction: int) -> Float[Tensor, "2 heads planes"]:
        length = self.options.temperature ** (-torch.arange(per_direction) / per_direction)
        direction = 2 * math.pi * torch.rand(num_heads, 1)
        if self.options.init == "axes":
            direction = torch.zeros(num_heads, 1)
        directions = (direction, direction + math.pi / 2)
        along_x = torch.cat([length * angle.cos() for angle in directions], dim=-1)
        along_y = torch.cat([length * angle.sin() for angle in directions], dim=-1)
        return torch.stack([along_x, along_y])

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "heads tokens planes"]:
        x, y = places(grid, self.grid, self.options.beyond, like)
        along_x, along_y = full_precision(self.frequencies)
        return x[:, None] * along_x[:, None] + y[:, None] * along_y[:, None]
