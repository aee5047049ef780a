"""One small model with random weights of each further family of hosts, and a batch that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from host_cases import HF, TIMM, randomised
from torch import Tensor, nn

Batch = dict[str, Any]
SMALL = {key: value for key, value in HF.items() if key != "num_labels"} | {"image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
SWIN = {"image_size": [24, 36], "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 3}
SAM = {"image_size": 24, "patch_size": 4, "output_channels": 8, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24}
MAE = {
    "decoder_hidden_size": 12,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 8,
}


def _pixels(height: int = 24, width: int = 24, **more: Any) -> Batch:
    return {"pixel_values": torch.randn(2, 3, height, width, dtype=torch.float64), **more}


def _hf(name: str, **sizes: Any) -> nn.Module:
    kind = next(kind for kind in (name, name.removesuffix("Model")) if hasattr(transformers, f"{kind}Config"))
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SMALL | sizes))


def _two_towers(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")
    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 16}
    return getattr(transformers, f"{name}Model")(config(text_config=text, vision_config=SMALL, projection_dim=8))


def _with_text(**more: Any) -> Batch:
    return _pixels(input_ids=torch.tensor([[1, 3, 4, 2], [1, 5, 2, 2]]), **more)


def _images(height: int = 24, width: int = 32) -> Batch:
    return {"x": torch.randn(2, 3, height, width, dtype=torch.float64)}


def _noise(tokens: int) -> Tensor:
    return torch.rand(2, tokens)


def _packed() -> Batch:
    """Images of 2x3 and 3x2 patches and of 4x2, padded to 8 tokens."""
    shapes = torch.tensor([[2, 3], [4, 2], [3, 2]])
    mask = (torch.arange(8) < shapes.prod(-1, keepdim=True)).long()
    values = torch.randn(3, 8, 3 * 8 * 8, dtype=torch.float64)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _naflex(**options: Any) -> nn.Module:
    sizes = {key: TIMM[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    config = timm.models.NaFlexVitCfg(**sizes, pos_embed_grid_size=(3, 4), **{"reg_tokens": 0, "class_token": False} | options)
    return timm.models.NaFlexVit(config, num_classes=5)


def _naflex_batch() -> Batch:
    packed = _packed()
    place, width = torch.arange(8).expand(3, -1), packed["spatial_shapes"][:, 1:]
    valid = packed["pixel_attention_mask"].bool()
    coordinates = torch.stack([place // width, place % width], dim=-1) * valid[..., None]
    return {"x": packed["pixel_values"], "patch_coord": coordinates, "patch_valid": valid}


# name: (makes the model, makes a batch)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "DINOv3": (lambda: _hf("DINOv3ViTModel", num_register_tokens=2), lambda: _pixels(24, 40)),
    "CLIPVision": (lambda: _hf("CLIPVisionModel"), lambda: _pixels(24, 40, interpolate_pos_encoding=True)),
    "CLIP": (lambda: _two_towers("CLIP"), _with_text),
    "SiglipVision": (lambda: _hf("SiglipVisionModel"), lambda: _pixels(24, 40, interpolate_pos_encoding=True)),
    "Siglip": (lambda: _two_towers("Siglip"), _with_text),
    "IJepa": (lambda: _hf("IJepaModel"), lambda: _pixels(24, 40, interpolate_pos_encoding=True)),
    "ViTMSN": (lambda: _hf("ViTMSNModel"), lambda: _pixels(24, 40, interpolate_pos_encoding=True)),
    "Yolos": (
        lambda: _hf("YolosModel", image_size=[24, 32], num_detection_tokens=3, use_mid_position_embeddings=True),
        lambda: _pixels(24, 40),
    ),
    "Beit": (
        lambda: _hf("BeitModel", use_relative_position_bias=True, image_size=[24, 32]),
        lambda: _pixels(24, 40),
    ),
    "Beit.shared": (lambda: _hf("BeitModel", use_shared_relative_position_bias=True), lambda: _pixels(24, 40)),
    "Swin": (lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)), lambda: _pixels(24, 36)),
    "Sam": (lambda: _hf("SamVisionModel", **SAM, attn_implementation="sdpa"), lambda: _pixels(24, 24)),
    "Sam.eager": (lambda: _hf("SamVisionModel", **SAM, attn_implementation="eager"), lambda: _pixels(24, 24)),
    "timm.Beit": (lambda: timm.models.Beit(**TIMM, use_rel_pos_bias=True, qkv_bias=True), _images),
    "timm.Beit.shared": (lambda: timm.models.Beit(**TIMM, use_shared_rel_pos_bias=True, use_abs_pos_emb=False), _images),
    "timm.RelPos": (lambda: timm.models.VisionTransformerRelPos(**TIMM, qk_norm=True, init_values=0.5), _images),
    "timm.RelPos.shared": (
        lambda: timm.models.VisionTransformerRelPos(**TIMM, rel_pos_type="bias", shared_rel_pos=True, class_token=True),
        _images,
    ),
    "timm.SAM": (
        lambda: timm.models.VisionTransformerSAM(
            **TIMM, use_rel_pos=True, window_size=2, global_attn_indexes=(1,), neck_chans=8
        ),
        _images,
    ),
    "timm.SAM.rope": (
        lambda: timm.models.VisionTransformerSAM(
            **TIMM, use_rope=True, window_size=2, global_attn_indexes=(1,), neck_chans=0, ref_feat_shape=((3, 4), (2, 2))
        ),
        _images,
    ),
    "MAE": (
        lambda: _hf("ViTMAEModel", mask_ratio=0.0),
        lambda: _pixels(24, 40, interpolate_pos_encoding=True, noise=_noise(15)),
    ),
    "MAE.masked": (
        lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SMALL, **MAE)),
        lambda: _pixels(noise=_noise(9)),
    ),
    "Siglip2": (lambda: _hf("Siglip2VisionModel", num_patches=9), _packed),
    "timm.NaFlex": (lambda: _naflex(), _naflex_batch),
    "timm.NaFlex.rope": (lambda: _naflex(rope_type="axial", reg_tokens=1), _naflex_batch),
    "timm.NaFlex.image": (lambda: _naflex(pos_embed="learned", class_token=True), _images),
    "timm.Swin": (
        lambda: timm.models.SwinTransformer(
            (32, 48), patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=(2, 3), num_classes=5
        ),
        lambda: _images(32, 48),
    ),
}


def make_family(name: str) -> nn.Module:
    """In float64 and evaluation mode."""
    torch.manual_seed(0)
    return randomised(FAMILIES[name][0](), std=0.3).double().eval()


def batch_of(name: str) -> Batch:
    torch.manual_seed(1)
    return FAMILIES[name][1]()


def found(model: nn.Module, batch: Batch) -> Tensor:
    """What the model says, as one tensor."""
    output: Any = model(**batch)
    if isinstance(output, Tensor):
        return output
    values = (getattr(output, key, None) for key in ("logits_per_image", "logits", "last_hidden_state"))
    return next(value for value in values if value is not None)
