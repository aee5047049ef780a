"""Attention of a host under an attached encoding, which all hosts share.

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first), d head_dim.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from sape2.adapters.layouts import Scattered, bias_on, rotate_on
from sape2.adapters.tokens import Tokens
from sape2.attention import attend
from sape2.encodings.base import AttentionEncoding
from sape2.encodings.derivatives import is_transformed
from sape2.encodings.grid import Grid
from sape2.encodings.nodes import OneNode


class Window(NamedTuple):
    """The grid that one call of attention is for, and which pairs of its patches see each other."""

    grid: Grid
    visible: Bool[Tensor, "#batch #heads tokens tokens"] | None = None


class Attached(OneNode):
    """Mixed into the attention class of a host, which comes last, by a subclass that overrides `forward`."""

    host_class: ClassVar[type[nn.Module]]
    sape2: AttentionEncoding
    sape2_tokens: Tokens

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.host_class = cls.__bases__[-1]  # pyrefly: ignore

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        *,
        dropout: float,
        mask: Tensor | None = None,
        rotated: tuple[Tensor, Tensor] | None = None,
        tokens: Float[Tensor, "batch tokens dim"] | None = None,
        window: Window | None = None,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention with the encoding. `rotated`: q and k as the host turns them; the others: as `bias_map`."""
        if mask is None and rotated is None:
            layout = window.grid if window else self.sape2_tokens.layout_of(q.shape[-2])
            if not isinstance(layout, Scattered):
                return attend(q, k, v, layout, encoding_of(self), dropout, tokens=tokens)
        bias = self.bias_map(q, k, mask, tokens, window)
        return attend_with(*(rotated or self.rotate(q, k, window)), v, bias, dropout)

    def bias_map(
        self, q: Tensor, k: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None, window: Window | None = None
    ) -> Tensor | None:
        """The bias of all T tokens (0 for those that stand on no grid) plus a mask, in logits; q and k before any rotation.

        A mask broadcasts to (B, h, T, T); True keeps a pair, as a float it is added, and what it hides is not counted:
        `Content.visible`. `tokens`, (B, T, D), are what the host projects to q and k, for encodings that read them. `window`
        is for attention that the host calls for a grid of its own.
        """
        layout = window.grid if window else self.sape2_tokens.layout_of(q.shape[-2])
        first, last = self.sape2_tokens.ends(q.shape[-2])
        of_grid = None if tokens is None else tokens[:, first:last]
        visible = window.visible if window else seen_by(mask)
        if visible is not None:
            visible = visible.expand(*visible.shape[:-2], q.shape[-2], q.shape[-2])[..., first:last, first:last]
        bias = bias_on(layout, encoding_of(self), q[:, :, first:last], k[:, :, first:last], of_grid, visible)
        additive = None if mask is None else as_additive(mask, q.dtype)
        if bias is None:
            return additive
        matrix = F.pad(bias, (first, q.shape[-2] - last) * 2)  # (B or 1, h, T, T)
        matrix = matrix if matrix.dim() == 4 else matrix[None]
        return matrix if additive is None else matrix + additive

    def rotate(self, q: Tensor, k: Tensor, window: Window | None = None) -> tuple[Tensor, Tensor]:
        """q and k turned by the encoding; tokens that stand on no grid stay."""
        layout = window.grid if window else self.sape2_tokens.layout_of(q.shape[-2])
        first, last = self.sape2_tokens.ends(q.shape[-2])
        q_grid, k_grid = q[:, :, first:last], k[:, :, first:last]
        turned_q, turned_k = rotate_on(layout, encoding_of(self), q_grid, k_grid)
        if turned_q is q_grid:
            return q, k
        pairs = ((q, turned_q), (k, turned_k))
        turned = [torch.cat([t[:, :, :first], of_grid, t[:, :, last:]], -2) for t, of_grid in pairs]
        return turned[0], turned[1]


def encoding_of(module: Any) -> AttentionEncoding:
    """Raises ValueError if another library has put something in its place."""
    if not isinstance(module.sape2, AttentionEncoding):
        raise replaced(module.sape2)
    return module.sape2


def replaced(strange: nn.Module) -> ValueError:
    """The error for a part of peft in the place of an encoding."""
    return ValueError(
        f"a {type(strange).__name__} stands in the place of the attached encoding or of a part of it, as peft puts one there "
        "for modules_to_save and for whatever its targets match; leave sape2 out of them and attach after get_peft_model, "
        "which trains both"
    )


def attend_with(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Attention with a map as bias; in steps in torch.func, where the fused kernel refuses a mask with a gradient."""
    if not is_transformed(q):
        mask = None if bias is None else bias.to(v.dtype)
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, dropout_p=dropout)
    return F.dropout(softmax_weights(q, k, bias).to(v.dtype), dropout) @ v


def softmax_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Float[Tensor, "batch heads tokens tokens"]:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1)


def seen_by(mask: Shaped[Tensor, "*shape"] | None) -> Bool[Tensor, "#batch #heads #tokens #tokens"] | None:
    """Which pairs a mask of four axes or fewer keeps; of floats those above -65504, which hide in half precision as in any."""
    if mask is None:
        return None
    kept = mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float16).min
    return kept.reshape(*[1] * (4 - mask.dim()), *mask.shape)


def as_additive(mask: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where a boolean mask keeps a pair and -inf where it does not; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def shifted(bias: Tensor, mask: Tensor | None, grid: Grid, num_windows: int) -> tuple[Tensor, Window]:
    """The bias of Swin with its mask, (windows of an image, T, T), which keeps what a shift brings into one window apart."""
    if mask is None:
        return bias, Window(grid)
    mask = mask.repeat(num_windows // len(mask), 1, 1).unsqueeze(1)
    return bias + mask, Window(grid, mask == 0)
