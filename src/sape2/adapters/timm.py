"""timm: VisionTransformer, Eva, Beit, VisionTransformerRelPos, VisionTransformerSAM, SwinTransformer and NaFlexVit.

The forwards below are those of timm 1.0.31 with the attention product replaced: projections, norms, gates, rotation,
grouped keys, the bias of the host, dropout and masks are the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, PatchDropout, PatchDropoutWithIndices, apply_rot_embed_cat, to_2tuple
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import beit, swin_transformer, vision_transformer_sam
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from sape2.adapters.attached import Host, Size
from sape2.adapters.attention import Attached, Window, shifted, softmax_weights
from sape2.adapters.layouts import Layout, Scattered, grids_of
from sape2.adapters.reasons import known_reason, reason
from sape2.adapters.tokens import Tokens, grid_of_output, inside
from sape2.encodings.grid import as_grid

HOSTS = (
    VisionTransformer,
    Eva,
    beit.Beit,
    VisionTransformerRelPos,
    vision_transformer_sam.VisionTransformerSAM,
    swin_transformer.SwinTransformer,
    NaFlexVit,
)


class _Attached(Attached):
    """Those of timm compute attention in one operation or, without `fused_attn`, in steps with a module that hooks read."""

    def attend(
        self: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        rotated: tuple[Tensor, Tensor] | None = None,
        tokens: Tensor | None = None,
        window: Window | None = None,
        **options: Any,
    ) -> Tensor:
        if self.fused_attn:
            return super().attend(q, k, v, mask=mask, rotated=rotated, tokens=tokens, window=window, **options)
        bias = self.bias_map(q, k, mask, tokens, window)
        q, k = rotated or self.rotate(q, k, window)
        return self.attn_drop(softmax_weights(q, k, bias).to(v.dtype)) @ v


class AttachedAttention(_Attached, Attention):
    """timm's `Attention` with an encoding."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return _forward_with(self, x, _mask(x, attn_mask, is_causal))


class _AttachedRope(_Attached):
    """Those of timm that may turn queries and keys themselves."""

    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = _project(self, x)
        rotated = None if rope is None else (_turn(self, q, rope).type_as(v), _turn(self, k, rope).type_as(v))
        mask = _mask(x, attn_mask, is_causal)
        return _finish(self, x, self.attend(q, k, v, dropout=_dropout(self), mask=mask, rotated=rotated, tokens=x))


class AttachedAttentionRope(_AttachedRope, AttentionRope):
    """timm's `AttentionRope` with an encoding."""


class AttachedEvaAttention(_AttachedRope, EvaAttention):
    """timm's `EvaAttention` with an encoding."""


class AttachedBeitAttention(_Attached, beit.Attention):
    """The `Attention` of timm's BEiT with an encoding beside its own bias."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        own = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        return _forward_with(self, x, own if shared_rel_pos_bias is None else shared_rel_pos_bias + (0 if own is None else own))


class AttachedRelPosAttention(_Attached, RelPosAttention):
    """timm's `RelPosAttention` with an encoding beside its own bias."""

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return _forward_with(self, x, shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias())


class AttachedSAMAttention(_Attached, vision_transformer_sam.Attention):
    """The `Attention` of timm's SAM with an encoding beside its own bias or rotation; x is a window or the whole grid."""

    def forward(self: Any, x: Tensor) -> Tensor:
        grid = as_grid(x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        q, k, v = _project(self, tokens)
        bias = rotated = None
        if self.use_rel_pos:
            tables = (self.rel_pos_h, self.rel_pos_w)
            bias = vision_transformer_sam.get_decomposed_rel_pos_bias(q.flatten(0, 1), *tables, grid, grid)
            bias = bias.unflatten(0, (-1, self.num_heads))
        elif self.rope is not None:
            rope = self.rope.get_embed()
            rotated = apply_rot_embed_cat(q, rope).type_as(v), apply_rot_embed_cat(k, rope).type_as(v)
        output = self.attend(q, k, v, dropout=_dropout(self), mask=bias, rotated=rotated, tokens=tokens, window=Window(grid))
        return _finish(self, tokens, output).unflatten(1, grid)


class AttachedWindowAttention(_Attached, swin_transformer.WindowAttention):
    """The `WindowAttention` of timm's Swin with an encoding beside its own bias: each window is a grid."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _forward_with(self, x, *shifted(self._get_rel_pos_bias(), mask, self.window_size, len(x)))


ATTACHED: dict[type[nn.Module], type[Attached]] = {
    each.host_class: each
    for each in (
        AttachedAttention,
        AttachedAttentionRope,
        AttachedEvaAttention,
        AttachedBeitAttention,
        AttachedRelPosAttention,
        AttachedSAMAttention,
        AttachedWindowAttention,
    )
}


class AttachedPatchDropout(PatchDropout):
    """timm's `PatchDropout`, which tells which patches stay."""

    sape2_tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        return _drop(self, x)[0]


class AttachedPatchDropoutWithIndices(PatchDropoutWithIndices):
    """timm's `PatchDropoutWithIndices`, which tells which patches stay."""

    sape2_tokens: Tokens

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return _drop(self, x)


DROPOUTS = {PatchDropout: AttachedPatchDropout, PatchDropoutWithIndices: AttachedPatchDropoutWithIndices}


def _drop(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    output, kept = patch_dropout_forward(x, module.prob, module.num_prefix_tokens, module.ordered, module.training)
    if kept is not None:
        module.sape2_tokens.keep(kept)
    return output, kept


def _forward_with(module: Any, x: Tensor, mask: Tensor | None, window: Window | None = None) -> Tensor:
    """Attention under an encoding and a mask or a bias of the host."""
    q, k, v = _project(module, x)
    return _finish(module, x, module.attend(q, k, v, dropout=_dropout(module), mask=mask, tokens=x, window=window))


def _project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, h, T, d), before rotation; grouped keys and values repeated for their queries."""
    if module.qkv is not None:
        qkv = module.qkv(x)
        if getattr(module, "q_bias", None) is not None:
            qkv = qkv + torch.cat([module.q_bias, module.k_bias, module.v_bias])
        q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        projections = (module.q_proj(x), module.k_proj(x), module.v_proj(x))
        q, k, v = (each.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for each in projections)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    if (groups := getattr(module, "num_kv_groups", 1)) > 1:
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    return q, k, v


def _turn(module: Any, vectors: Tensor, rope: Tensor) -> Tensor:
    num_prefix = module.num_prefix_tokens
    turned = apply_rot_embed_cat(vectors[:, :, num_prefix:], rope, half=module.rotate_half)
    return torch.cat([vectors[:, :, :num_prefix], turned], dim=2)


def _dropout(module: Any) -> float:
    return module.attn_drop.p if module.training else 0.0


def _mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """As in timm, a causal mask takes the place of a given one."""
    total = x.shape[1]
    return torch.ones(total, total, dtype=torch.bool, device=x.device).tril() if is_causal else attn_mask


def _finish(module: Any, x: Tensor, output: Tensor) -> Tensor:
    output = output.transpose(1, 2).flatten(2)
    if hasattr(module, "norm"):
        output = module.norm(output)
    if getattr(module, "gate", None) is not None:
        output = output * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(output))


# --- where -----------------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Host:
    """Raises ValueError for a model whose attention is not one of those above."""
    name = type(model).__name__
    if not isinstance(model, HOSTS):
        known = ", ".join(each.__name__ for each in HOSTS)
        raise ValueError(f"attach knows timm's {known} and what is made of them; got {name}: {reason(model)}")
    stages: Any = model.layers if isinstance(model, swin_transformer.SwinTransformer) else [model]
    blocks = [block for stage in stages for block in stage.blocks]
    attentions = [_attention(block) for block in blocks]
    naflex = isinstance(model, NaFlexVit)
    embeds: Any = model.embeds if naflex else model.patch_embed
    source = embeds if naflex else inside(getattr(embeds, "proj", None))
    if not isinstance(source, (nn.Conv2d, NaFlexEmbeds)):
        raise ValueError(f"attach reads the grid off the convolution patch_embed.proj; this {name} has {type(source).__name__}")
    dropout: Any = getattr(model, "patch_drop", None)
    whole: Any = embeds.pos_embed_grid_size if naflex else embeds.grid_size
    return Host(
        name=f"timm {name}",
        layers=[(attention, ATTACHED[type(attention)]) for attention in attentions],
        source=source,
        tokens=Tokens(getattr(model, "num_prefix_tokens", 0), read=_of_naflex if naflex else grid_of_output),
        sizes=[_size(block.attn, getattr(block, "window_size", None) or whole) for block in blocks],
        rotates=any(getattr(part, "rope", None) is not None for part in (model, *attentions)),
        drops=(dropout, DROPOUTS[type(dropout)]) if type(dropout) in DROPOUTS else None,
    )


def _of_naflex(embeds: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> Layout:
    """Whole images of one grid, or patches with coordinates (y, x), each image on a grid of its own, padded."""
    grid = output[1]
    if grid is not None:
        return as_grid(*grid)
    valid = keywords["patch_valid"].bool()
    yx = keywords["patch_coord"] * valid[..., None]
    sizes = yx.amax(1) + 1
    return Scattered(grids_of(sizes), yx[..., 0] * sizes[:, 1:] + yx[..., 1], valid)


def _size(attention: Any, grid: Any) -> Size:
    """`grid`: that of the images, or of a window, which may be a number for both sides."""
    values = attention.qkv.out_features // 3 if attention.qkv is not None else attention.q_proj.out_features
    return Size(attention.num_heads, values // attention.num_heads, grid and to_2tuple(grid))


def _attention(block: nn.Module) -> Any:
    attention: Any = getattr(block, "attn", None)
    name = type(attention).__name__
    if type(attention) not in ATTACHED:
        why = known_reason(attention) or known_reason(block) or f"known are {', '.join(each.__name__ for each in ATTACHED)}"
        what = type(block).__name__ if attention is None else f"{type(block).__name__} with the attention {name}"
        raise ValueError(f"attach cannot put a bias into {what}: {why}")
    head_dim = _size(attention, None).head_dim
    if abs(attention.scale - head_dim**-0.5) > 1e-9:
        raise ValueError(f"attach needs logits scaled by 1/sqrt({head_dim}); this {name} scales by {attention.scale}")
    return attention
