"""Attention for plain PyTorch: a module for blocks of your own, and encodings in `nn.MultiheadAttention`."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.adapters.attached import Host, Size, Trainable, attachment_of, check_free, put_in
from sape2.adapters.attention import Attached, as_additive, softmax_weights
from sape2.adapters.start import Start
from sape2.adapters.tokens import Tokens
from sape2.attention import Attention
from sape2.encodings import TokenEncoding, create_encoding
from sape2.encodings.grid import Grid, check_grid, width_of_heads


class SaPEAttention(Attention):
    """Multi-head self-attention under any attention encoding.

    attn = SaPEAttention(dim=384, num_heads=6, encoding="sape2", grid=(14, 14))
    y = attn(x, grid=(14, 14))  # x: (B, P + 14 * 14, 384), any number P of prefix tokens

    `grid` is the training grid, which sizes the tables; the grid of a call may differ. Further keywords: `Attention`.
    """

    def __init__(self, dim: int, num_heads: int, encoding: str = "sape2", *, grid: Grid, **options: Any) -> None:
        module = create_encoding(encoding, num_heads, width_of_heads(dim, num_heads), grid)
        if isinstance(module, TokenEncoding):
            raise ValueError(f"{encoding} acts on the tokens, not in attention; add it to them before the first block")
        super().__init__(dim, num_heads, module, **options)


class AttachedMultihead(Attached, nn.MultiheadAttention):
    """torch's `nn.MultiheadAttention` with an encoding, for self-attention.

    `_qkv_same_embed_dim` reads False, because `nn.TransformerEncoderLayer` would otherwise pass this module by in
    evaluation and read its weights, without any bias.
    """

    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the host; `is_causal` is, as there, a hint about `attn_mask` and needs it."""
        _check_call(query, key, value, attn_mask, is_causal)
        batched = query.dim() == 3
        x = query if batched else query[None]
        x = x if self.batch_first or not batched else x.transpose(0, 1)  # (B, T, D)
        q, k, v = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mask = _merge(attn_mask, key_padding_mask, self.num_heads, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = softmax_weights(*self.rotate(q, k), self.bias_map(q, k, mask, x))
            output = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            output = self.attend(q, k, v, dropout=dropout, mask=mask, tokens=x)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], weights
        return output if self.batch_first else output.transpose(0, 1), weights


def _check_call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if query is not key or key is not value:
        raise ValueError("an attached encoding is for self-attention: give one tensor as query, key and value")
    if query.is_nested:
        raise ValueError("an attached encoding takes no nested tensors; give nn.TransformerEncoder enable_nested_tensor=False")
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True says that attn_mask is causal, but there is no attn_mask; give one")


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, like: Tensor) -> Tensor | None:
    """Both masks of the host, in which True hides, as one that is added, (B or 1, h or 1, T or 1, T)."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1])
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    additive = [as_additive(~mask if mask.dtype == torch.bool else mask, like.dtype) for mask in masks]
    return functools.reduce(operator.add, additive) if additive else None


def check_multihead(attention: nn.Module) -> nn.MultiheadAttention:
    """Raises ValueError unless it is a plain `nn.MultiheadAttention`."""
    if type(attention) is not nn.MultiheadAttention:
        raise ValueError(f"attach_attention needs an nn.MultiheadAttention; got {type(attention).__name__}")
    if not attention._qkv_same_embed_dim:
        raise ValueError("an attached encoding is for self-attention: kdim and vdim must be embed_dim")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError("add_bias_kv and add_zero_attn add keys that stand on no grid; make the attention without them")
    return attention


def attach_attention(
    attention: nn.MultiheadAttention,
    encoding: str = "sape2",
    *,
    grid: Grid,
    num_prefix_tokens: int = 0,
    trainable: Trainable = "all",
    start: Start = "no_effect",
) -> nn.MultiheadAttention:
    """`attach` for one `nn.MultiheadAttention` of your own block, in place; `detach` takes the encoding out.

    `grid` sizes the tables and is that of every call until `set_grid` says otherwise. Raises ValueError for what cannot be.
    """
    check_free(attention)
    attention, grid = check_multihead(attention), check_grid(grid)
    tokens = Tokens(num_prefix_tokens, given=grid)
    sizes = [Size(attention.num_heads, attention.head_dim, grid)]
    host = Host("nn.MultiheadAttention", [(attention, AttachedMultihead)], None, tokens, sizes)
    put_in(attention, host, encoding, trainable, start, [grid])
    return attention


def set_grid(attention: nn.MultiheadAttention, grid: Grid) -> None:
    """The grid of the calls that follow, for an attention of `attach_attention`; in models it is read off the images.

    Threads that set a grid keep their own; all others get the last one that was set.
    """
    attachment = attachment_of(attention)
    if attachment.tokens.given is None:
        raise ValueError("the grid of a model is read off the output of its patch projection; nothing needs to be set")
    attachment.tokens.give(check_grid(grid))
