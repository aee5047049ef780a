"""timm: VisionTransformer (DeiT, DINOv2, CLIP and SigLIP towers, ...) and Eva (EVA-02, ViT-RoPE, DINOv3, ...).

The forwards below are those of timm 1.0.31 with the attention product replaced: projections, norms, gates, rotation,
grouped keys, dropout and masks are the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sape2.adapters.attached import Attached, Host, Size, causal_mask
from sape2.adapters.tokens import Tokens

KNOWN = "VisionTransformer, Eva"
REASONS = {
    "DiffAttention": "it subtracts one softmax from another, and an added bias would mean something else in each",
    "NaFlexVit": "a batch holds images of several grids there, padded, and the grid of each does not reach attention",
}


class AttachedAttention(Attached, Attention):
    """timm's `Attention` with an encoding."""

    host_class = Attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        mask = _mask(self, x, attn_mask, is_causal)
        return _finish(self, x, self.attend(q, k, v, dropout=_dropout(self), mask=mask, tokens=x))


class AttachedAttentionRope(Attached, AttentionRope):
    """timm's `AttentionRope` with an encoding."""

    host_class = AttentionRope

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _forward_rope(self, x, rope, attn_mask, is_causal)


class AttachedEvaAttention(Attached, EvaAttention):
    """timm's `EvaAttention` with an encoding."""

    host_class = EvaAttention

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _forward_rope(self, x, rope, attn_mask, is_causal)


ATTACHED: dict[type[nn.Module], type[Attached]] = {
    each.host_class: each for each in (AttachedAttention, AttachedAttentionRope, AttachedEvaAttention)
}


def _forward_rope(module: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = _project(module, x)
    rotated = None
    if rope is not None:
        rotated = _turn(module, q, rope).type_as(v), _turn(module, k, rope).type_as(v)
    mask = _mask(module, x, attn_mask, is_causal)
    output = module.attend(q, k, v, dropout=_dropout(module), mask=mask, rotated=rotated, tokens=x)
    return _finish(module, x, output)


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
    q, k = module.q_norm(q), module.k_norm(k)
    groups = getattr(module, "num_kv_groups", 1)
    return q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _turn(module: Any, vectors: Tensor, rope: Tensor) -> Tensor:
    num_prefix = module.num_prefix_tokens
    turned = apply_rot_embed_cat(vectors[:, :, num_prefix:], rope, half=module.rotate_half)
    return torch.cat([vectors[:, :, :num_prefix], turned], dim=2)


def _dropout(module: Any) -> float:
    return module.attn_drop.p if module.training else 0.0


def _mask(module: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """As in timm, a causal mask takes the place of a given one. A mask with one row for all queries hides padded patches."""
    if is_causal:
        return causal_mask(x.shape[1], x.device)
    if attn_mask is not None and attn_mask.shape[-2] == 1:
        module.sape2_tokens.check_padding(attn_mask)
    return attn_mask


def _finish(module: Any, x: Tensor, output: Tensor) -> Tensor:
    output = module.norm(output.transpose(1, 2).flatten(2))
    if module.gate is not None:
        output = output * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(output))


# --- where -----------------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Host:
    """Raises ValueError for a model whose attention is not one of those above."""
    name = type(model).__name__
    if not isinstance(model, (VisionTransformer, Eva)):
        reason = f": {REASONS[name]}" if name in REASONS else ""
        raise ValueError(f"attach knows timm's {KNOWN} and what is made of them; got {name}{reason}")
    attentions = [_attention(block) for block in model.blocks]
    projection: Any = getattr(model.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise ValueError(
            f"attach reads the grid off the convolution patch_embed.proj; this {name} has {type(projection).__name__}"
        )
    grid = model.patch_embed.grid_size
    return Host(
        name=f"timm {name}",
        layers=[(attention, ATTACHED[type(attention)]) for attention in attentions],
        projection=projection,
        tokens=Tokens(model.num_prefix_tokens),
        sizes=[Size(each.num_heads, each.head_dim, grid and tuple(grid)) for each in attentions],
        rotates=getattr(model, "rope", None) is not None,
    )


def _attention(block: nn.Module) -> Any:
    attention: Any = getattr(block, "attn", None)
    name = type(attention).__name__
    if type(attention) not in ATTACHED:
        reason = REASONS.get(name, f"known are {', '.join(each.__name__ for each in ATTACHED)}")
        raise ValueError(f"attach cannot put a bias into {type(block).__name__} with the attention {name}: {reason}")
    if abs(attention.scale - attention.head_dim**-0.5) > 1e-9:
        raise ValueError(f"attach needs logits scaled by 1/sqrt({attention.head_dim}); this {name} scales by {attention.scale}")
    return attention
