"""`sape2 inspect` on towers of every order of tokens: each token is that of its patch, or the model is refused."""

import pytest
import timm
import torch
import transformers
from family_cases import SMALL, make_family
from host_cases import TIMM, make_transformers, open_gains, randomised

from sape2 import attach
from sape2.evaluation.layers import layers_of
from sape2.inspect.backbone import open_backbone
from sape2.inspect.watched import Watched

pytestmark = pytest.mark.usefixtures("as_users_run_it")
SIZES = {"Yolos": (24, 32), "Beit": (24, 32)}
TOWERS = ["DINOv3", "CLIPVision", "SiglipVision", "IJepa", "ViTMSN", "Yolos", "Beit", "Beit.shared", "MAE", "Siglip2"]
OF_TIMM = ["timm.Beit", "timm.Beit.shared", "timm.RelPos", "timm.RelPos.shared"]
OF_TIMM += ["timm.NaFlex", "timm.NaFlex.rope", "timm.NaFlex.image"]
WINDOWS = ["Sam", "Sam.eager", "timm.SAM", "timm.SAM.rope"]
APART = {"DINOv3": 3, "CLIPVision": 1, "ViTMSN": 1, "Yolos": 4, "Beit": 1, "Beit.shared": 1, "MAE": 1}
APART |= {"timm.Beit": 1, "timm.Beit.shared": 1, "timm.RelPos.shared": 1, "timm.NaFlex.rope": 1, "timm.NaFlex.image": 1}


def watched(name):
    """A tower and its size."""
    size = SIZES.get(name, (24, 32) if name.startswith("timm") else (24, 24))
    model = make_family(name)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return Watched(model, torch.zeros(1, 3, *size, dtype=torch.float64)), size


@pytest.mark.parametrize("name", TOWERS + OF_TIMM + WINDOWS)
def test_another_patch_is_another_token_in_its_place_and_nowhere_else(name):
    model, size = watched(name)
    (height, width), patch = model.grid, size[0] // model.grid[0]
    image = torch.randn(3, *size, dtype=torch.float64)
    changed = image.repeat(1 + height * width, 1, 1, 1)
    for y in range(height):
        for x in range(width):
            changed[1 + y * width + x, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] += 1
    first = next(layers_of(model, changed))
    assert model.num_prefix_tokens == APART.get(name, 0)
    assert (first.num_prefix, first.grid) == (model.num_prefix_tokens, (height, width))
    differs = ((first.entering[1:] - first.entering[0]).abs() > 1e-9).any(-1)
    assert torch.equal(differs, torch.eye(height * width, dtype=torch.bool))


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in ("MAE", "Siglip2")])
def test_tokens_and_weights_are_what_transformers_returns(name):
    model, size = watched(name)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = model.model(images, output_attentions=True, output_hidden_states=True)
    total = found.hidden_states[0].shape[1]
    order = torch.arange(total)
    if name == "Yolos":  # class token, 12 patches, 3 detection tokens
        order = torch.cat([order[:1], order[13:], order[1:13]])
    assert model.has_attention
    for layer, state, weights in zip(layers_of(model, images), found.hidden_states, found.attentions, strict=False):
        torch.testing.assert_close(layer.before, state[:, order])
        torch.testing.assert_close(layer.maps["attention"], weights[:, :, order][..., order])


def test_mae_in_any_order_is_the_model_that_does_not_shuffle():
    model, size = watched("MAE")
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    layer = list(layers_of(model, images))[1]
    found = model.model(images, noise=torch.arange(9.0).expand(2, -1), output_attentions=True)
    exact = {"rtol": 1e-5, "atol": 1e-5}  # the softmax is in float32
    torch.testing.assert_close(layer.maps["tokens"], model.notes[-1]["tokens"], **exact)  # of the last call, as it came
    torch.testing.assert_close(layer.maps["attention"], found.attentions[1], **exact)


def test_siglip_2_gets_the_patches_of_its_image_processor():
    model, _ = watched("Siglip2")
    images, given = torch.randn(2, 3, 16, 24, dtype=torch.float64), []
    model.model.embeddings.register_forward_pre_hook(
        lambda module, args, keywords: given.append((args, keywords)), with_kwargs=True
    )
    layers = list(layers_of(model, images))
    (args, keywords) = given[0]
    values = [*args, *keywords.values()][0]
    expected = [images[:, :, y : y + 8, x : x + 8].permute(0, 2, 3, 1).flatten(1) for y in (0, 8) for x in (0, 8, 16)]
    torch.testing.assert_close(values, torch.stack(expected, dim=1))
    assert [layer.grid for layer in layers] == [(2, 3)] * 2


@pytest.mark.parametrize("name", WINDOWS)
def test_weights_within_windows_are_not_shown_as_those_of_the_grid(name):
    model, _ = watched(name)
    assert not model.has_attention


def test_a_hybrid_is_inspected_on_the_grid_behind_its_convolutions():
    model = Watched(timm.create_model("vit_tiny_r_s16_p8_224", img_size=96), torch.zeros(1, 3, 96, 96))
    assert (model.grid, model.num_prefix_tokens) == ((3, 3), 1)


# --- refused ---------------------------------------------------------------------------------------------------------


class ClassTokenLast(timm.models.VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x).roll(-1, dims=1)


class ByColumns(timm.models.VisionTransformer):
    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)], dim=1)


def deep_swin():
    sizes = {"patch_size": 4, "embed_dim": 8, "depths": (3, 1), "num_heads": (1, 2), "window_size": 2, "num_classes": 5}
    return timm.models.SwinTransformer(32, **sizes)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: ClassTokenLast(**TIMM), "row 0, column 0 changes token 0 of this ClassTokenLast, not token 1: its tokens are"),
        (lambda: ByColumns(**TIMM), "row 0, column 3 changes token 10 of this ByColumns, not token 4"),
        (lambda: attach(make_family("Yolos").float()), "with nothing attached"),
        (lambda: make_family("MAE.masked").float(), r"drops patches: 2 of 9 are left. Set mask_ratio to 0 in its config"),
        (deep_swin, "the blocks of this SwinTransformer stand in 2 stages. Models of stages"),
        (lambda: make_family("Swin").float(), r"layer 1 of this SwinModel gives .* Models of stages \(Swin, ConvNeXt, Hiera\)"),
        (
            lambda: transformers.Swinv2Model(
                transformers.Swinv2Config(embed_dim=8, depths=[1, 3], num_heads=[1, 2], image_size=32, window_size=4)
            ),
            "the blocks of this Swinv2Model stand in 2 stages",
        ),
    ],
    ids=["class token last", "columns", "attached", "masked", "first stage", "swin", "second stage"],
)
def test_other_orders_and_grids_are_refused_with_the_reason(make_model, message):
    model = make_model()
    config = getattr(model, "config", None)
    size = (24, 32) if isinstance(model, timm.models.VisionTransformer) else getattr(config, "image_size", 32)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    with pytest.raises(ValueError, match=message):
        Watched(model, torch.zeros(1, 3, *size))


def test_an_attached_model_is_inspected_as_it_computes():
    model = attach(make_transformers("ViT", "eager"), "rpe")
    randomised(model)
    open_gains(model)
    images = torch.randn(1, 3, 24, 24)
    layer = list(layers_of(Watched(model, torch.zeros(1, 3, 24, 24)), images))[1]
    expected = model(images, output_attentions=True).attentions[1]
    torch.testing.assert_close(layer.maps["attention"], expected)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("Siglip2VisionModel", (24, 24), {"num_patches": 9}),
        ("SamVisionModel", (24, 24), {"window_size": 0, "global_attn_indexes": [0, 1], "output_channels": 8, "mlp_dim": 24}),
        ("YolosModel", (24, 32), {"image_size": [24, 32], "num_detection_tokens": 3}),
        ("CLIPVisionModel", (24, 24), {}),
    ],
)
def test_a_folder_of_a_tower_is_opened_at_its_size(name, size, options, tmp_path):
    config = getattr(transformers, name.replace("Model", "Config"))(**SMALL | options)
    getattr(transformers, name)(config).save_pretrained(tmp_path / name)
    found = open_backbone(str(tmp_path / name))
    assert (found.image_size, found.model.grid) == (size, (size[0] // 8, size[1] // 8))
