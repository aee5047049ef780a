"""Small models of every host that `attach` knows, with random weights large enough that a bias shows."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from sape2 import create_model, encoding_parameters

TIMM = {"img_size": (24, 32), "patch_size": 8, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 5}

TIMM_VIT: dict[str, dict[str, Any]] = {
    "class": {},
    "avg": {"global_pool": "avg"},
    "map": {"global_pool": "map"},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "dinov2": {"reg_tokens": 4, "init_values": 0.5, "no_embed_class": True, "dynamic_img_size": True},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
    "no_embed_class": {"no_embed_class": True},
    "no_positions": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "dynamic": {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_drop_rate": 0.5},
    "post_norm": {"block_fn": timm.models.vision_transformer.ResPostBlock, "pre_norm": True},
}
ROPE = {"use_rot_pos_emb": True, "attn_type": "rope"}
TIMM_EVA: dict[str, dict[str, Any]] = {
    "eva": {},
    "eva02": {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True},
    "fused": {"use_rot_pos_emb": True, "global_pool": "token"},
    "vit_rope": ROPE | {"rope_type": "cat", "init_values": 0.5},
    "vit_rope_mixed": ROPE | {"rope_type": "mixed", "use_abs_pos_emb": False},
    "dinov3": ROPE
    | {
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "use_abs_pos_emb": False,
        "dynamic_img_size": True,
    },
    "grouped": ROPE | {"qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
    "post_norm": {"use_rot_pos_emb": True, "use_post_norm": True},
}
TRANSFORMERS = ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"]
CASES = [
    *(f"timm.vit.{name}" for name in TIMM_VIT),
    *(f"timm.eva.{name}" for name in TIMM_EVA),
    "torchvision",
    *(f"transformers.{name}.{back_end}" for name in TRANSFORMERS for back_end in ("sdpa", "eager")),
    "sape2.ape",
    "sape2.rope",
]


def make(case: str) -> nn.Module:
    """The model of a case, in float64 and evaluation mode."""
    library, _, rest = case.partition(".")
    torch.manual_seed(0)
    if library == "timm":
        kind, name = rest.split(".")
        model = (
            timm.models.VisionTransformer(**TIMM | TIMM_VIT[name])
            if kind == "vit"
            else timm.models.Eva(**TIMM | TIMM_EVA[name])
        )
    elif library == "torchvision":
        sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "num_classes": 5}
        model = torchvision.models.VisionTransformer(image_size=24, patch_size=8, **sizes)
    elif library == "transformers":
        model = make_transformers(*rest.split("."))
    else:
        model = create_model("vit_nano", encoding=rest, image_size=(24, 32), patch_size=8, dim=16, depth=2, num_heads=2)
    return randomised(model).double().eval()


def make_transformers(name: str, back_end: str = "sdpa") -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**HF, image_size=(24, 24), patch_size=8)
    return getattr(transformers, f"{name}ForImageClassification")._from_config(config, attn_implementation=back_end)


def randomised(model: Any, std: float = 0.5) -> Any:
    """Normal weights, so that logits of attention differ by about 1 and norms matter."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def images(case: str, batch: int = 2) -> Tensor:
    """Oblong where the host takes it."""
    square = case.startswith(("torchvision", "transformers"))
    return torch.randn(batch, 3, 24, 24 if square else 32, dtype=torch.float64)


def outputs(model: nn.Module, x: Tensor, **keywords: Any) -> Tensor:
    found = model(x, **keywords)
    return getattr(found, "logits", found)


def open_gains(model: nn.Module, std: float = 1.0) -> None:
    """Random values for everything that `attach` brought, gains too."""
    for parameter in encoding_parameters(model):
        nn.init.normal_(parameter, std=std)


def description(model: nn.Module) -> dict[str, tuple]:
    """Everything of a model that must come back: classes, plain attributes, parts, parameters with flags, hooks, mode."""
    return {
        name: (
            type(module),
            sorted(key for key in vars(module) if key != "_modules"),
            list(module._modules),
            [(key, p.requires_grad, id(p)) for key, p in module.named_parameters(recurse=False)],
            (len(module._forward_hooks), len(module._forward_pre_hooks)),
            module.training,
        )
        for name, module in model.named_modules()
    }
