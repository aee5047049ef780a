"""The vision transformer in which all encodings are compared: same patch embedding, blocks and head for every encoding.

Parameter names are timm's, and weights of a timm `VisionTransformer` of the same shape load with the same function. A state
dict does not say the number of heads, the activation, the eps of norms, the pooling or the sides of the grid: these must be
the same, which is told when positions of timm are loaded.
Axes: B batch, T = P + N tokens (class token, registers, then the grid in row-major order), D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sape2.attention import Attention
from sape2.config import ModelConfig, check_image_size, model_config
from sape2.encodings import AttentionEncoding, TokenEncoding, create_encodings
from sape2.encodings.base import encoding_names, without_decay
from sape2.encodings.grid import Grid, as_grid, of_one_size
from sape2.encodings.names import name_once
from sape2.encodings.nodes import OneNode
from sape2.encodings.precision import full_precision, no_autocast
from sape2.machine import drawn_seed, uncompiled
from sape2.models import hub
from sape2.runs.run import Run


class PatchProjection(nn.Conv2d):
    """A convolution that computes in float32 or better on a CPU.

    oneDNN's bfloat16 convolutions on AMX give other numbers, or none: for one column of five patches or more, and for
    patches of 16x16 in 4 channels (torch 2.14; of the kind of pytorch/pytorch#163347 and #169688).
    """

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        if input.device.type != "cpu":
            return super().forward(input)
        bias = None if self.bias is None else full_precision(self.bias)
        with no_autocast(input):
            return self._conv_forward(full_precision(input), full_precision(self.weight), bias)


class PatchEmbed(OneNode, nn.Module):
    """Non-overlapping patches, each projected to the width, in the precision of the weights; also returns their grid."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.proj = PatchProjection(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Float[Tensor, "batch tokens dim"], Grid]:
        if images.shape[1] != self.in_channels:
            raise ValueError(f"the model takes {self.in_channels} channels; got images of shape {tuple(images.shape)}")
        grid = check_image_size(as_grid(images.shape[-2], images.shape[-1]), self.patch_size)
        # As in timm, autocast lowers the products, not the residual stream, which has the precision of the weights.
        return self.proj(of_one_size(images)).flatten(2).transpose(1, 2).to(self.proj.weight.dtype), grid


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); LayerScale and drop path are options of the model."""

    def __init__(self, config: ModelConfig, encoding: AttentionEncoding, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(
            config.dim,
            config.num_heads,
            encoding,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            attention_dropout=config.attention_dropout,
            dropout=config.dropout,
        )
        self.ls1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio), drop=config.dropout)
        self.ls2 = _layer_scale(config)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _draw(parameter: Tensor | None, init: Callable[..., Tensor], *arguments: float, **keywords: Any) -> None:
    """Draws on the CPU, whatever the device of the parameter, so that a seed gives the same weights everywhere."""
    if parameter is not None and not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(init(torch.empty(parameter.shape, device="cpu"), *arguments, **keywords))


def _layer_scale(config: ModelConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, init_values=config.layer_scale)


class ViT(nn.Module):
    """Images (B, C, height, width) of any size that is a multiple of the patch -> logits (B, num_classes)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        seed = drawn_seed()
        tokens, layers = create_encodings(config.encoding, config.num_heads, config.head_dim, config.grid, config.depth)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.dim)
        if config.pool == "class":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, config.dim))
        self.token_encodings: nn.ModuleList | list[TokenEncoding] = nn.ModuleList(tokens)
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, layer, rate) for layer, rate in zip(layers, rates, strict=True))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6) if config.pool == "class" else nn.Identity()
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6) if config.pool == "mean" else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes)
        self.register_load_state_dict_pre_hook(_fold_timm_positions)
        name_once(self)
        self.reset_parameters(seed)

    @property
    def num_prefix_tokens(self) -> int:
        return (self.config.pool == "class") + self.config.num_registers

    def reset_parameters(self, seed: int | None = None) -> None:
        """Truncated normal of std 0.02 for linear weights, 0 for their biases, PyTorch's own form for the patches.

        Draws from `seed` alone, so that models of one seed differ in their encodings and in nothing else; None: a new one.
        Encodings and norms have a `reset_parameters` of their own; when a model is made, they have drawn already.
        """
        generator = torch.Generator().manual_seed(drawn_seed() if seed is None else seed)
        encodings = [m for m in self.modules() if isinstance(m, (TokenEncoding, AttentionEncoding))]
        theirs = {id(part) for encoding in encodings for part in encoding.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in theirs:
                _draw(module.weight, nn.init.trunc_normal_, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.patch_embed.proj
        bound = patches.weight[0].numel() ** -0.5
        for parameter in (patches.weight, patches.bias):
            _draw(parameter, nn.init.uniform_, -bound, bound, generator=generator)
        for name in ("cls_token", "reg_token"):
            if hasattr(self, name):
                _draw(getattr(self, name), nn.init.normal_, std=1e-6, generator=generator)

    def no_weight_decay(self) -> set[str]:
        """Names of what must not decay besides norms and biases: tokens and everything of an encoding."""
        return without_decay({"cls_token", "reg_token", *encoding_names(self)})

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which names belong to which layer, as timm asks for it to give layers rates of their own (`layer_decay`)."""
        first = r"(?:.*\.)?(?:cls_token|reg_token|patch_embed|token_encodings)\b"
        with_the_last = (99999,)  # as timm has it
        return {"stem": first, "blocks": [(r"(?:.*\.)?blocks\.(\d+)\.", None), (r"(?:.*\.)?norm\.", with_the_last)]}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.pool(self.features(images)))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """All tokens after the last block and `norm`."""
        x, grid = self.embed(images)
        for index, block in enumerate(self.blocks):
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
            x = self._encode_tokens(x, grid, after_block=index)
        return self.norm(x)

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Float[Tensor, "batch tokens dim"], Grid]:
        """The tokens that enter the first block, prefix tokens first, and their grid."""
        x, grid = self.patch_embed(images)
        x = self._encode_tokens(x, grid, after_block=None)
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        return torch.cat([*(token.to(x.dtype) for token in prefix), x], dim=1), grid

    def _encode_tokens(self, x: Tensor, grid: Grid, after_block: int | None) -> Tensor:
        for encoding in self.token_encodings:
            if encoding.after_block == after_block:
                num_prefix = 0 if after_block is None else self.num_prefix_tokens
                x = torch.cat([x[:, :num_prefix], encoding(x[:, num_prefix:], grid)], dim=1)
        return x

    def layers(self) -> Iterator[Block]:
        """The blocks, those inside where each is compiled alone."""
        return (block for block in map(uncompiled, self.blocks) if isinstance(block, Block))

    def pool(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        pooled = x[:, 0] if self.config.pool == "class" else x[:, self.num_prefix_tokens :].mean(1)
        return self.fc_norm(pooled)

    def save_pretrained(
        self, folder: str | Path, run: str | Path | None = None, weights: str = "last", license: str | None = None
    ) -> None:
        """Writes config.json, model.safetensors and a model card, filled from a run folder and one of its weights if given."""
        hub.save_pretrained(self, folder, None if run is None else Run.open(run), weights, license)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> ViT:
        """The model of a folder or of a hub id, in evaluation mode; raises FileNotFoundError or ValueError in one line."""
        return hub.load_pretrained(cls, source, revision)

    def maps(self, images: Float[Tensor, "batch channels height width"]) -> list[dict[str, Tensor]]:
        """A dict for every layer: its output `tokens`, (B, T, D), `attention`, (B, h, T, T), and the encoding's maps."""
        return self.maps_from(*self.embed(images))

    def maps_from(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> list[dict[str, Tensor]]:
        """The maps of tokens that enter the first block."""
        layers = []
        for index, block in enumerate(self.layers()):
            maps = block.attn.maps(block.norm1(x), grid)
            x = self._encode_tokens(block(x, grid), grid, after_block=index)
            layers.append(maps | {"tokens": x})
        return layers


def create_model(name: str, **config: Any) -> ViT:
    """A new model of a named size (`config.MODELS`) with changes of `ModelConfig`, for example

    `create_model("vit_small", encoding="ape+sape2", image_size=32, patch_size=4, num_classes=10)`.
    """
    return ViT(model_config(name, **config))


def _fold_timm_positions(model: ViT, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """timm keeps one `pos_embed` (1, P + N, D) or (1, N, D): ours is a table (H, W, D); the rest joins its prefix tokens.

    A class token is only ever used with its position added, so folding changes no output.
    """
    table_key = next(
        (f"{prefix}token_encodings.{i}.table" for i, e in enumerate(model.token_encodings) if hasattr(e, "resampled")), None
    )
    if f"{prefix}pos_embed" not in state or table_key is None:
        return
    position = state.pop(f"{prefix}pos_embed")[0]
    height, width = model.config.grid
    num_prefix = len(position) - height * width
    if num_prefix not in (0, model.num_prefix_tokens):
        raise ValueError(
            f"pos_embed has {len(position)} rows, which fits neither the grid {height}x{width} nor that grid "
            f"with {model.num_prefix_tokens} prefix tokens; resample it first"
        )
    warnings.warn(
        f"weights of timm do not say all that a model computes: here {height}x{width} is the grid of their {height * width} "
        f"positions, {model.config.num_heads} the number of heads, exact GELU the activation, 1e-6 the eps of norms, and "
        f"{model.config.pool!r} the pooling; if the other model has the same, its logits are the same",
        stacklevel=2,
    )
    state[table_key] = position[num_prefix:].unflatten(0, (height, width))
    start = 0
    for name in ("cls_token", "reg_token"):
        if num_prefix and f"{prefix}{name}" in state:
            token = state[f"{prefix}{name}"]
            state[f"{prefix}{name}"] = token + position[start : start + token.shape[1]]
            start += token.shape[1]
