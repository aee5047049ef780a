"""The settings of a model: its named sizes, its image and its patches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sape2.config.checks import (
    LARGEST,
    Layers,
    Positive,
    Real,
    ShareBelow1,
    Size,
    SizeOr0,
    check_types,
    make_config,
    of_python,
    require,
    shown,
)
from sape2.config.names import unknown

MOST_MACS = 1e15  # of one image

# dim, depth, num_heads, mlp_ratio
MODELS: dict[str, tuple[int, int, int, float]] = {
    "vit_nano": (96, 4, 3, 4.0),
    "vit_micro": (192, 9, 12, 2.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """A vision transformer. One block serves every encoding: nothing here is tied to one.

    `image_size` is (height, width) in pixels; `layer_scale` is the initial value of the per-channel scale of each
    residual branch, None for no such scale; `pool` reads the class token, or the mean of the grid tokens.
    """

    name: str = "vit_small"
    encoding: str = "ape+sape2"
    image_size: tuple[int, int] = (32, 32)
    patch_size: Size = 4
    in_channels: Size = 3
    num_classes: Size = 10
    dim: Size = 384
    depth: Layers = 12
    num_heads: Size = 6
    mlp_ratio: Positive = 4.0
    pool: Literal["class", "mean"] = "class"
    num_registers: SizeOr0 = 0
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: Real | None = None
    dropout: ShareBelow1 = 0.0
    attention_dropout: ShareBelow1 = 0.0
    drop_path: ShareBelow1 = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require(max(self.image_size) <= LARGEST, f"model.image_size must be at most {LARGEST}; got {shown(self.image_size)}")
        require(
            self.dim % self.num_heads == 0,
            f"the width must be divisible by the number of heads; got dim={self.dim}, num_heads={self.num_heads}",
        )
        check_image_size(self.image_size, self.patch_size)
        require(
            int(self.dim * self.mlp_ratio) >= 1,
            f"the MLPs would have no channels: int(dim * mlp_ratio) is 0; got dim={self.dim}, mlp_ratio={self.mlp_ratio}",
        )
        require(
            self.least_macs <= MOST_MACS,
            f"one image in this model takes at least {self.least_macs:.0e} multiply-accumulates ({self.depth} layers of width "
            f"{self.dim} for {self.grid[0]}x{self.grid[1]} patches and {self.num_registers} registers), too many to train; "
            f"at most {MOST_MACS:.0e} are taken",
        )

    @property
    def least_macs(self) -> float:
        """Multiply-accumulates of the blocks for one image: N tokens in width D, depth (2 N² D + (4 + 2 r) N D²)."""
        tokens = self.grid[0] * self.grid[1] + self.num_registers
        return float(self.depth) * (2.0 * tokens**2 * self.dim + (4 + 2 * self.mlp_ratio) * tokens * float(self.dim) ** 2)

    @property
    def least_bytes(self) -> float:
        """Bytes of the weights of the blocks, in float32."""
        return 4.0 * self.depth * (4 + 2 * self.mlp_ratio) * float(self.dim) ** 2

    @property
    def label(self) -> str:
        """The name, marked with a star where the sizes are not those of the named model."""
        sizes = (self.dim, self.depth, self.num_heads, self.mlp_ratio)
        return self.name if MODELS.get(self.name) == sizes else f"{self.name}*"

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the training image in patches."""
        return check_image_size(self.image_size, self.patch_size)


def check_image_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The token grid of an image; raises ValueError unless both sides are positive multiples of the patch."""
    height, width = image_size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(  # made here alone: torch.compile makes one graph for all sizes only while none is written out
            f"an image of {height}x{width} pixels does not divide into patches of {patch_size}x{patch_size}; "
            f"choose sides that are multiples of {patch_size}, or another patch_size"
        )
    return height // patch_size, width // patch_size


def sizes_of(name: str) -> dict[str, Any]:
    """The settings that make the named size. Raises ValueError for unknown names."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return dict(zip(("dim", "depth", "num_heads", "mlp_ratio"), MODELS[name], strict=True))


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The named size with changes; `image_size` may be one int for a square. Raises ValueError for unknown names."""
    overrides = {key: of_python(value) for key, value in overrides.items()}
    if isinstance(overrides.get("image_size"), int):
        overrides["image_size"] = (overrides["image_size"],) * 2
    return make_config(ModelConfig, {"name": name} | sizes_of(name) | overrides, "model.")


def resized(model: ModelConfig, name: str) -> ModelConfig:
    """The recipe's model in another size: only the name, width, depth, heads and MLP ratio change."""
    return dataclasses.replace(model, name=name, **sizes_of(name))
