"""Rotary encodings: rotate queries and keys by angles proportional to position, so that q.k depends only on the offset.

Rotations use real arithmetic: channels 2f and 2f + 1 of a head are one plane, rotated by angle number f (in DINOv3's layout,
channels f and f + d/2). Prefix tokens are not rotated, so a product of a prefix token with a patch still depends on
the absolute place of the patch, as in the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import AttentionBias, Factors
from sape2.encodings.content import Content, Vectors
from sape2.encodings.derivatives import by_hand
from sape2.encodings.grid import Grid, check_tokens, coordinates, num_prefix_tokens
from sape2.encodings.options import check_positive
from sape2.encodings.precision import full_precision, no_autocast

Beyond = Literal["extrapolate", "rescale"]
Layout = Literal["pairs", "halves"]
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
PRESETS: dict[str, dict[str, Any]] = {
    "rope_vit": {},
    "dinov3": {"coordinates": "separate", "order": "yx", "layout": "halves", "train_rescale": 2.0},
}


def turn(
    vectors: Float[Tensor, "batch heads tokens head_dim"],
    angles: Float[Tensor, "*#heads tokens planes"],
    layout: Layout = "pairs",
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """(a, b) -> (a cos - b sin, a sin + b cos) in every plane, computed in float32 or better, in the dtype of `vectors`.

    Plane f has the channels 2f and 2f + 1 in pairs, f and f + d/2 in halves.
    """
    vectors_full, dim = full_precision(vectors), -1 if layout == "pairs" else -2
    planes = vectors_full.unflatten(-1, (-1, 2) if layout == "pairs" else (2, -1))
    cos, sin = angles.cos(), angles.sin()
    if layout == "pairs" and vectors.device.type == "cpu" and by_hand(vectors, angles):
        turned = torch.view_as_real(torch.view_as_complex(planes.contiguous()) * torch.complex(cos, sin))  # one pass
    else:
        a, b = planes.unbind(dim)  # (B, h, T, d/2)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=dim)
    return turned.flatten(-2).to(vectors.dtype)


def places(grid: Grid, trained: Grid, beyond: Beyond, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every token, (N,), in the dtype and on the device of `like`.

    On other grids than the trained one, `extrapolate` leaves them alone and `rescale` stretches or squeezes them onto
    the trained range, x * W_trained / W (EVA, arXiv:2303.11331; `ref_feat_shape` in timm).
    """
    y, x = coordinates(grid, like.device).to(full_precision(like).dtype).unbind(-1)
    if beyond == "rescale":
        x, y = x * (trained[1] / grid[1]), y * (trained[0] / grid[0])
    return x, y


def check_head_dim(name: str, num_heads: int, head_dim: int, directions: int = 2) -> None:
    """Raises ValueError unless all directions get the same number of planes."""
    if head_dim % (2 * directions):
        raise ValueError(
            f"{name} needs head_dim divisible by {2 * directions}; got {head_dim} "
            f"(dim={num_heads * head_dim} / num_heads={num_heads}). Choose another dim or num_heads"
        )


class Rotation(AttentionEncoding):
    """Turns q and k by `angles`; what these are is for the subclass to say."""

    layout: Layout = "pairs"

    def rotate(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        check_tokens(q, grid)
        return self.rotate_all(q, k, grid)

    def rotate_all(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        """Prefix tokens turn by an angle of 0, which leaves them exactly as they are."""
        with no_autocast(q):
            angles = F.pad(self.angles(grid, q), (0, 0, num_prefix_tokens(q.shape[-2], grid), 0))
            return turn(q, angles, self.layout), turn(k, angles, self.layout)

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "*heads tokens planes"]:
        """The angle of every plane at every token, in radians, on the device of `like`, in float32 or better."""
        raise NotImplementedError


@dataclass(frozen=True)
class RotaryOptions:
    """Coordinates, directions and frequencies of the planes, and how places move in training: docs/method.md has them all."""

    temperature: float = 100.0
    beyond: Beyond = "extrapolate"
    coordinates: Literal["patches", "separate", "min", "max"] = "patches"
    directions: int = 2
    spread: Literal["uniform", "spiral", "golden"] = "uniform"
    fastest: float = 1.0
    order: Literal["xy", "yx"] = "xy"
    layout: Layout = "pairs"
    train_shift: float = 0.0
    train_jitter: float = 1.0
    train_rescale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("rope:temperature", self.temperature)
        if self.beyond == "rescale" and self.coordinates != "patches":
            raise ValueError(f"rope:beyond=rescale has no effect on coordinates={self.coordinates}, which follow the grid")
        if self.directions < 1:
            raise ValueError(f"rope:directions must be at least 1; got {self.directions}")
        if self.directions != 2 and self.spread == "golden":
            raise ValueError("rope:directions has no effect with spread=golden, which gives every plane its own")
        if self.directions % 2 and self.spread == "spiral":
            raise ValueError(f"rope:spread=spiral needs an even number of directions; got {self.directions}")
        if not 0 < self.fastest <= math.pi:
            raise ValueError(f"rope:fastest must be above 0 and at most pi, half a turn a patch; got {self.fastest}")
        if self.train_shift < 0:
            raise ValueError(f"rope:train_shift must be at least 0; got {self.train_shift}")
        for name in ("train_jitter", "train_rescale"):
            if getattr(self, name) < 1:
                raise ValueError(f"rope:{name} is a factor of at least 1; got {getattr(self, name)}")


class Rotary(Rotation):
    """Plane f turns by w_f (x cos t_f + y sin t_f), with t_f the direction of the plane and w_f its frequency.

    By default axial RoPE as in RoPE-ViT (arXiv:2403.13298): half of the planes turn with x, half with y, and
    w_f = temperature^(-f / (d/4)), so weights of timm's ViT-RoPE models ("cat", x before y) see the same rotation.
    preset=dinov3 is that of DINOv3 (arXiv:2508.10104) and timm's `RotaryEmbeddingDinoV3`: y first, halves, places from -1
    to 1 times 2 pi. `directions` are spread over half a turn, each with all frequencies; spread=spiral deals out those of
    axial RoPE in pairs, so that only directions at a right angle share them (Spiral RoPE, arXiv:2602.03227, has both);
    spread=golden turns the direction by pi over the golden ratio from plane to plane, slowest first (golden gate RoPE).
    Raises ValueError unless head_dim is divisible by twice the number of directions, for spread=spiral by four times.
    """

    name = "rope"
    Options = RotaryOptions
    summary = "rotary: half of the channels turn with x, half with y; or in more directions, or as in DINOv3"
    source = "arXiv:2104.09864, 2D as in arXiv:2403.13298"
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    variants: ClassVar[dict[str, str]] = {
        "preset=dinov3": "places from -1 to 1, y first, halves, and sizes drawn in training: DINOv3, arXiv:2508.10104",
        "directions=4": "four directions instead of x and y: Spiral RoPE with the same frequencies in all, arXiv:2602.03227",
        "spread=golden": "a direction for every plane by the golden ratio: golden gate RoPE, jerryxio.ng/posts/nd-rope",
    }
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.layout = self.options.layout
        parts = {"uniform": 1, "spiral": 2, "golden": 0}[self.options.spread] * self.options.directions
        check_head_dim("rope", num_heads, head_dim, max(parts, 1))

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "tokens planes"]:
        first, second = self._moved(self._places(grid, like))
        o, planes = self.options, self.head_dim // 2
        if o.spread == "golden":
            plane = torch.arange(planes, device=first.device).to(first.dtype)
            lengths = o.fastest * o.temperature ** (plane / max(planes - 1, 1) - 1)
            turned = plane * (math.pi / GOLDEN_RATIO)
            return first[:, None] * (lengths * turned.cos()) + second[:, None] * (lengths * turned.sin())
        turns = [direction * math.pi / o.directions for direction in range(o.directions)]
        along = [first * round(math.cos(t), 15) + second * round(math.sin(t), 15) for t in turns]  # a right angle is exact
        return torch.cat([place[:, None] * own for place, own in zip(along, self._frequencies(first), strict=True)], dim=-1)

    def _frequencies(self, like: Tensor) -> list[Float[Tensor, " planes"]]:
        """Those of each direction: the same for all, or in a spiral those of two directions, dealt out two at a time."""
        o, half = self.options, self.options.directions // 2
        count = self.head_dim // (4 if o.spread == "spiral" else 2 * o.directions)
        frequencies = o.fastest * o.temperature ** (-torch.arange(count, device=like.device).to(like.dtype) / count)
        if o.spread == "uniform":
            return [frequencies] * o.directions
        return 2 * [dealt.flatten() for dealt in frequencies.unflatten(0, (-1, half, 2)).unbind(1)]

    def _places(self, grid: Grid, like: Tensor) -> list[Tensor]:
        """Both coordinates of every token, (N,) each, in the order of the options."""
        x, y = places(grid, self.grid, self.options.beyond, like)
        if self.options.coordinates != "patches":  # 2 pi (2 (i + 1/2) / length - 1)
            height, width = grid
            sides = {"separate": (width, height), "min": (min(grid),) * 2, "max": (max(grid),) * 2}[self.options.coordinates]
            x, y = ((2 * (place + 0.5) / side - 1) * (2 * math.pi) for place, side in zip((x, y), sides, strict=True))
        return [x, y] if self.options.order == "xy" else [y, x]

    def _moved(self, coordinates: list[Tensor]) -> list[Tensor]:
        """Random augmentation of places in training: a shift, then a stretch of each axis and of both, in DINOv3's order."""
        o = self.options
        if not self.training:
            return coordinates
        unit = 1.0 if o.coordinates == "patches" else 2 * math.pi
        shift, jitter, rescale = [0.0, 0.0], [1.0, 1.0], [1.0]
        if o.train_shift:
            shift = _drawn(2, o.train_shift)
        if o.train_jitter > 1:
            jitter = _drawn(2, math.log(o.train_jitter), exp=True)
        if o.train_rescale > 1:
            rescale = _drawn(1, math.log(o.train_rescale), exp=True)
        moved = zip(coordinates, shift, jitter, strict=True)
        return [(place + unit * step) * factor * rescale[0] for place, step, factor in moved]


def _drawn(count: int, bound: float, exp: bool = False) -> list[Tensor]:
    """Numbers uniform within a bound, or their exponentials, drawn on the CPU for every device."""
    numbers = torch.empty(count, device="cpu").uniform_(-bound, bound)
    return list((numbers.exp() if exp else numbers).unbind())


@dataclass(frozen=True)
class RotaryMixedOptions:
    """`temperature`, `init`: lengths and directions of the first frequencies, drawn per head or x and y; `beyond`: `places`."""

    temperature: float = 10.0
    init: Literal["random", "axes"] = "random"
    beyond: Beyond = "extrapolate"

    def __post_init__(self) -> None:
        check_positive("rope_mixed:temperature", self.temperature)


class RotaryMixed(Rotation):
    """RoPE-mixed (arXiv:2403.13298): plane f turns by x w^x_f + y w^y_f with learned w, (2, h, d/2), one per head and layer.

    At the start w has the lengths temperature^(-f / (d/4)), twice: along a direction drawn for every head, and along
    the one at a right angle to it, as in RoPE-ViT and timm. w[0] goes with x. Raises ValueError unless head_dim is
    divisible by 4.
    """

    name = "rope_mixed"
    Options = RotaryMixedOptions
    summary = "rotary with learned 2D frequencies per head"
    source = "arXiv:2403.13298"
    facts = Facts(translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        check_head_dim("rope_mixed", num_heads, head_dim)
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


# --- polar -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoPEOptions:
    """`temperature`: the longest wavelength is nearly 2 pi times it, in patches; `beyond`: see `places`."""

    temperature: float = 100.0
    beyond: Beyond = "extrapolate"

    def __post_init__(self) -> None:
        check_positive("pope:temperature", self.temperature)


class PoPE(AttentionEncoding):
    """sum_c softplus(q_ic) softplus(k_nc) cos((p_n - p_i) w_c + delta_c) in the place of q_i . k_n: PoPE (arXiv:2509.10534).

    Content is the length of a channel and place its angle, so neither is taken for the other. Half of the channels turn with
    x, half with y, each with w_c = temperature^(-c / (d/2)), c from 0; delta, (h, d), is learned and 0 at the start. The
    source keeps it between -2 pi and 0, which is every angle, too. PoPE is for text; two axes and `temperature` 100 are
    ours. The bias is the difference to q_i . k_n, so pairs with a prefix token keep their product. Raises ValueError unless
    head_dim is even.
    """

    name = "pope"
    Options = PoPEOptions
    summary = "polar: softplus of q and k as lengths, places as angles, instead of their product"
    source = "arXiv:2509.10534, 2D here"
    facts = Facts(content_dependent=True, translation=True)

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        check_head_dim("pope", num_heads, head_dim, directions=1)
        self.phase = nn.Parameter(torch.zeros(num_heads, head_dim))

    def rotate(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        """Returns q and k unchanged: the bias contains the rotation. Overridden so that no other rotation can be joined."""
        return q, k

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        with no_autocast(q):
            angles = self._angles(grid, q)  # (N, d)
            delayed = angles + full_precision(self.phase)[:, None]  # (h, N, d)
            q_full, k_full = full_precision(q), full_precision(content.k)
            q_length, k_length = F.softplus(q_full), F.softplus(k_full)
            query_side = torch.cat([q_length * angles.cos(), q_length * angles.sin(), -q_full], dim=-1)
            key_side = torch.cat([k_length * delayed.cos(), k_length * delayed.sin(), k_full], dim=-1)
            return AttentionBias(Factors(query_side / math.sqrt(self.head_dim), key_side), dtype=q.dtype)

    def _angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "tokens head_dim"]:
        x, y = places(grid, self.grid, self.options.beyond, like)
        each = self.head_dim // 2
        frequencies = self.options.temperature ** (-torch.arange(each, device=x.device).to(x.dtype) / each)
        return torch.cat([x[:, None] * frequencies, y[:, None] * frequencies], dim=-1)
