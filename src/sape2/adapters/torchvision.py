"""torchvision: VisionTransformer, whose attention is `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import VisionTransformer

from sape2.adapters.attached import Host, Size
from sape2.adapters.pytorch import AttachedMultihead, check_multihead
from sape2.adapters.reasons import reason
from sape2.adapters.tokens import Tokens, inside


def find(model: nn.Module) -> Host:
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"attach knows torchvision's VisionTransformer; got {type(model).__name__}: {reason(model)}")
    found: list[Any] = [block.self_attention for block in model.encoder.layers]  # pyrefly: ignore
    attentions = [check_multihead(inside(each)) for each in found]
    side = model.image_size // model.patch_size
    return Host(
        name="torchvision VisionTransformer",
        layers=[(attention, AttachedMultihead) for attention in attentions],
        source=inside(model.conv_proj),
        tokens=Tokens(num_prefix=1),
        sizes=[Size(each.num_heads, each.head_dim, (side, side)) for each in attentions],
    )
