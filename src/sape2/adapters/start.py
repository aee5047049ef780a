"""Prepares an encoding for a trained model: without effect at the start, but able to learn from there."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Composite
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content, Vectors
from sape2.encodings.grid import Grid, num_tokens
from sape2.encodings.precision import full_precision

Start = Literal["no_effect", "as_is"]
PROBE: Grid = (2, 3)  # one row and one column would do; oblong, so that axes cannot be confused


class Gained(AttentionEncoding):
    """gain_h b_in: any bias under one learned gain per head, 0 at the start.

    The tables inside stay as their encoding drew them, so the gain has a gradient at the first step and the tables have
    one from the second on.
    """

    def __init__(self, inner: AttentionEncoding, num_heads: int) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.facts, self.score_axes, self.reads_tokens = inner.facts, inner.score_axes, inner.reads_tokens
        self.gives_key_vectors = inner.gives_key_vectors
        self.gain = nn.Parameter(torch.zeros(num_heads))

    def reset_parameters(self) -> None:
        self.inner.reset_parameters()
        nn.init.zeros_(self.gain)

    def check_trainable(self) -> None:
        self.inner.check_trainable()

    def make_bias(self, content: Content) -> AttentionBias | None:
        bias = self.inner.make_bias(content)
        return None if bias is None else bias.scaled(full_precision(self.gain)[:, None, None])

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        maps = self.inner.make_maps(content)
        return maps | {"bias": (full_precision(self.gain)[:, None, None] * maps["bias"]).to(content.q.dtype)}

    def key_vectors(self, q: Vectors, grid: Grid) -> Float[Tensor, "heads tokens head_dim"]:
        return full_precision(self.gain)[:, None, None] * self.inner.key_vectors(q, grid)


def prepare(layers: list[AttentionEncoding], start: Start, num_heads: int, head_dim: int) -> list[AttentionEncoding]:
    """The encodings of all layers as they enter a model; a module that several layers share stays shared."""
    if start not in get_args(Start):
        raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {start!r}")
    if start == "as_is":
        return layers
    ready: dict[int, AttentionEncoding] = {}
    for layer in layers:
        if id(layer) not in ready:
            ready[id(layer)] = _without_effect(layer, num_heads, head_dim, ready)
    return [ready[id(layer)] for layer in layers]


def _without_effect(
    encoding: AttentionEncoding, num_heads: int, head_dim: int, ready: dict[int, AttentionEncoding]
) -> AttentionEncoding:
    """An encoding whose tables start at zero already is nothing at the start; any other bias gets a gain of 0."""
    if isinstance(encoding, Composite):
        for part in encoding.parts:
            ready.setdefault(id(part), _without_effect(part, num_heads, head_dim, ready))
        return Composite([ready[id(part)] for part in encoding.parts])
    if encoding.rotates:
        raise ValueError(
            f"{type(encoding).__name__} turns q and k, which no gain can start from nothing: a trained model would change at "
            'once. Attach a bias (sape2, rpe, cope, alibi, ...), or give start="as_is" to take the change and train on'
        )
    if encoding.hides:
        raise ValueError(
            f"{encoding.name} hides patches from each other, which no gain can start from nothing: attach {encoding.name}:"
            'outside=far, or give start="as_is" to take the change and train on'
        )
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, num_heads, num_tokens(PROBE), head_dim, generator=generator, device="cpu")
    bias = encoding.bias(q, k, PROBE, tokens=q.transpose(1, 2).flatten(2))
    return encoding if bias is None or not bias.dense().any() else Gained(encoding, num_heads)
