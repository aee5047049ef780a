"""What transformers and timm make of a tower (heads, backbones, whole models of two parts): attached through the wrapper."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from family_cases import SAM, SMALL, SWIN, TEXT, _images, _naflex, _naflex_batch, _packed, _pixels
from host_cases import description, open_gains, randomised
from torch import Tensor, nn

from sape2 import attach, detach
from sape2.adapters.attention import Attached

STAGES = {"out_features": ["stage1", "stage2"]}
MASKED = torch.tensor([[True, False, False] * 12, [False, True, True] * 12])


def head(name: str, config: str, **sizes: Any) -> nn.Module:
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**SMALL | sizes))


def over_a_tower(name: str, config: str, **sizes: Any) -> nn.Module:
    """Heads over the image tower of a config for both towers."""
    both = getattr(transformers, f"{config}Config")(text_config=TEXT, vision_config=SMALL, projection_dim=8, **sizes)
    return getattr(transformers, name)(both)


def siglip2() -> nn.Module:
    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 16}
    vision = {key: value for key, value in SMALL.items() if key != "image_size"} | {"num_patches": 9}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))


def sam() -> nn.Module:
    parts = {"hidden_size": 8, "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 8, "iou_head_hidden_dim": 8, "num_hidden_layers": 1}
    config = transformers.SamConfig(
        vision_config=SMALL | SAM | {"num_pos_feats": 4}, prompt_encoder_config=parts, mask_decoder_config=decoder
    )
    return transformers.SamModel(config)


def depth() -> nn.Module:
    inner = transformers.Dinov2Config(**SMALL, **STAGES, reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 0.5], "fusion_hidden_size": 8}
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=inner, **sizes, use_auxiliary_head=False))


# name: (makes the model, makes a batch)
WRAPPERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "Siglip2Model": (siglip2, lambda: _packed() | {"input_ids": torch.tensor([[1, 3, 4, 2], [1, 5, 2, 2]])}),
    "SamModel": (sam, lambda: _pixels(input_points=torch.rand(2, 1, 1, 2, dtype=torch.float64) * 24)),
    "CLIPForImageClassification": (lambda: over_a_tower("CLIPForImageClassification", "CLIP"), _pixels),
    "CLIPVisionModelWithProjection": (lambda: head("CLIPVisionModelWithProjection", "CLIPVision"), _pixels),
    "SiglipForImageClassification": (lambda: over_a_tower("SiglipForImageClassification", "Siglip"), _pixels),
    "Dinov2Backbone": (lambda: head("Dinov2Backbone", "Dinov2", **STAGES), lambda: _pixels(24, 40)),
    "DINOv3ViTBackbone": (lambda: head("DINOv3ViTBackbone", "DINOv3ViT", **STAGES), lambda: _pixels(24, 40)),
    "SwinBackbone": (
        lambda: transformers.SwinBackbone(transformers.SwinConfig(**SWIN, **STAGES)),
        lambda: _pixels(24, 36),
    ),
    "SwinForMaskedImageModeling": (
        lambda: transformers.SwinForMaskedImageModeling(
            transformers.SwinConfig(**SWIN | {"image_size": 24, "encoder_stride": 8})
        ),
        lambda: _pixels(bool_masked_pos=MASKED),
    ),
    "IJepaForImageClassification": (lambda: head("IJepaForImageClassification", "IJepa"), _pixels),
    "ViTMSNForImageClassification": (lambda: head("ViTMSNForImageClassification", "ViTMSN"), _pixels),
    "DPT on DINOv2": (depth, _pixels),
    "NaFlexVit, patches dropped": (lambda: _naflex(patch_drop_rate=0.5).train(), _images),
    "NaFlexVit, padded and dropped": (lambda: _naflex(patch_drop_rate=0.5).train(), _naflex_batch),
}


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of numbers that a model gives."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def given(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(7)  # of what is dropped
    with torch.no_grad():
        return tensors(model(**batch))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_tower_says_the_same_at_first_and_exactly_the_same_without(name):
    make, make_batch = WRAPPERS[name]
    torch.manual_seed(0)
    model, batch = randomised(make(), std=0.3).double(), make_batch()
    if not name.startswith("NaFlexVit"):
        model.eval()
    before, state, expected = description(model), copy.deepcopy(model.state_dict()), given(model, batch)
    assert expected
    attach(model, "sape2+cope", trainable="encoding")
    assert not any(
        part in key for key, module in model.named_modules() if isinstance(module, Attached) for part in ("text", "decoder")
    )
    for found, wanted in zip(given(model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    open_gains(model)
    assert any((found - wanted).abs().max() > 1e-3 for found, wanted in zip(given(model, batch), expected, strict=True))
    detach(model)
    assert description(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(found, wanted) for found, wanted in zip(given(model, batch), expected, strict=True))
