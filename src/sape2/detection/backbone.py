"""A plain ViT as the backbone of a detector: most blocks attend within windows, a few over the whole grid.

ViTDet (arXiv:2203.16527) pads the grid to whole windows. Encodings that count patches, SaPE2 and CoPE, would count the
padding, so here nothing is padded: the grid is cut into windows of w x w and smaller rests on the right and below.
Axes: B batch, N = H * W tokens in row-major order (no prefix tokens), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sape2.config import ModelConfig
from sape2.encodings import create_encodings
from sape2.encodings.grid import Grid
from sape2.models.vit import Block, ViT


class WindowedViT(nn.Module):
    """Images (B, C, height, width), sides multiples of the patch -> features (B, D, H, W) of the last block.

    `num_global` evenly spread blocks, the last one among them, attend to all patches, the others to those of their own
    window of `window` x `window` patches (None: all blocks are global). Encodings of window blocks are made for the grid of
    a window. The ViT has neither class token nor registers, and no read-out. Raises ValueError for a model that has.
    """

    def __init__(self, config: ModelConfig, window: int | None = None, num_global: int = 4) -> None:
        super().__init__()
        if config.pool != "mean" or config.num_registers:
            raise ValueError(
                "a backbone takes no prefix tokens, which would stand in no window; use pool=mean and num_registers=0, "
                f"got pool={config.pool}, num_registers={config.num_registers}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 patch, or None for global attention in every block; got {window}")
        self.config, self.window = config, window
        self.global_blocks = frozenset(range(config.depth) if window is None else spread(config.depth, num_global))
        self.vit = ViT(config)
        del self.vit.fc_norm, self.vit.head
        if window is not None:
            self._make_window_encodings(window)

    def _make_window_encodings(self, window: int) -> None:
        config, (height, width) = self.config, self.config.grid
        grid = (min(window, height), min(window, width))
        _, layers = create_encodings(config.encoding, config.num_heads, config.head_dim, grid, config.depth)
        for index, (block, encoding) in enumerate(zip(self.vit.layers(), layers, strict=True)):
            if index not in self.global_blocks:
                block.attn.encoding = encoding

    def no_weight_decay(self) -> set[str]:
        """Names of what must not decay besides norms and biases, as `ViT.no_weight_decay`."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        x, grid = self.vit.embed(images)
        for index, block in enumerate(self.vit.layers()):
            run = partial(run_block, block, grid=grid, window=None if index in self.global_blocks else self.window)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = run(x)
            for encoding in self.vit.token_encodings:
                if encoding.after_block == index:
                    x = encoding(x, grid)
        return x.transpose(1, 2).unflatten(-1, grid)


def spread(depth: int, count: int) -> list[int]:
    """The last block of each of `count` equal parts of `depth` blocks: 2, 5, 8, 11 for 12 and 4."""
    if not 0 <= count <= depth:
        raise ValueError(f"num_global must be 0 to the number of blocks, {depth}; got {count}")
    return [round((part + 1) * depth / count) - 1 for part in range(count)]


def run_block(
    block: Block, x: Float[Tensor, "batch tokens dim"], grid: Grid, window: int | None
) -> Float[Tensor, "batch tokens dim"]:
    """The block of `sape2.models.vit` with attention inside windows; drop path still drops whole images."""
    if window is None:
        return block(x, grid)
    x = x + block.drop_path(block.ls1(in_windows(block.norm1(x), grid, window, block.attn)))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


# --- windows ---------------------------------------------------------------------------------------------------------


def in_windows(
    x: Float[Tensor, "batch tokens dim"], grid: Grid, window: int, function: Callable[[Tensor, Grid], Tensor]
) -> Float[Tensor, "batch tokens dim"]:
    """`function(tokens, grid)` on every window by itself, in one call for each shape of window; there are at most four."""
    rows = []
    for row in x.unflatten(1, grid).split(pieces(grid[0], window), dim=1):  # (B, h, W, D)
        parts = []
        for part in row.split(pieces(grid[1], window), dim=2):
            height, width = part.shape[1:3]
            shape = (min(height, window), min(width, window))
            tokens = function(window_partition(part, shape).flatten(1, 2), shape)
            parts.append(window_reverse(tokens, shape, height, width))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows, dim=1).flatten(1, 2)


def pieces(length: int, window: int) -> list[int]:
    """The part of a side that whole windows fill, and what is left on the right or below; neither is 0."""
    return [piece for piece in (length - length % window, length % window) if piece]
