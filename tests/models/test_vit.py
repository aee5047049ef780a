"""The vision transformer: timm's weights and function, any size, one block for every encoding."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch

from sape2 import create_model
from sape2.config import MODELS
from sape2.models.vit import ViT

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "num_heads": 3}


def small(**changes):
    return create_model("vit_nano", **(SMALL | changes))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"pool": "mean"}, {"class_token": False, "global_pool": "avg"}),
        ({"num_registers": 2}, {"reg_tokens": 2}),
        ({"num_registers": 2}, {"reg_tokens": 2, "no_embed_class": True}),
        ({"layer_scale": 0.1, "qk_norm": True}, {"init_values": 0.1, "qk_norm": True}),
        ({"image_size": (16, 24), "qkv_bias": False}, {"img_size": (16, 24), "qkv_bias": False}),
    ],
    ids=str,
)
def test_against_timm_with_its_weights(ours, theirs):
    config = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3} | theirs
    original = timm.models.VisionTransformer(**config).eval()
    for parameter in original.parameters():  # timm starts biases and tokens near 0, which would hide a difference
        torch.nn.init.normal_(parameter, std=0.1)
    model = small(encoding="ape", **ours).eval()
    missing = model.load_state_dict(original.state_dict())
    assert not missing.missing_keys
    images = torch.randn(2, 3, *model.config.image_size)
    torch.testing.assert_close(model(images), original(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [{"act_layer": "quick_gelu"}, {"img_size": (16, 32)}, {"num_heads": 2}],
    ids=["activation", "orientation", "heads"],
)
def test_what_weights_of_timm_do_not_say_is_told(other):
    """All keys match, and another function is computed: nothing but a word can help there."""
    sizes = {"img_size": (32, 16), "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 1, "num_heads": 3}
    state = timm.models.VisionTransformer(**sizes | other).state_dict()
    ours = small(encoding="ape", image_size=(32, 16), depth=1)
    with pytest.warns(UserWarning, match=r"8x4.* 3 .*GELU"):
        ours.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:weights of timm")
@pytest.mark.parametrize("other", [{"qk_norm": True}, {"pre_norm": True}, {"init_values": 1e-5}, {"reg_tokens": 2}])
def test_what_weights_of_timm_say_is_refused(other):
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 1, "num_heads": 3}
    state = timm.models.VisionTransformer(**sizes | other).state_dict()
    with pytest.raises((RuntimeError, ValueError), match=r"norm|gamma|rows"):
        small(encoding="ape", image_size=16, depth=1).load_state_dict(state)


def test_weights_of_timm_for_another_grid_are_refused_with_the_numbers():
    original = timm.models.VisionTransformer(img_size=24, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(ValueError, match=r"pos_embed .*37.* 4x4"):
        small(encoding="ape").load_state_dict(original.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("encoding", ["ape+cpe", "rope+sape2", "log_cpb", "forget"])
def test_a_model_computes_in_the_type_of_its_weights(encoding, dtype):
    """As models of timm do, whatever the precision inside an encoding. A half type rounds logits of about 1 to 1e-2."""
    model, images = small(encoding=encoding).eval(), torch.rand(2, 3, 16, 24)
    expected = model(images)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=2e-2)
    logits.sum().backward()


@pytest.mark.parametrize(
    ("patch", "channels", "grid"), [(4, 3, (7, 1)), (2, 1, (30, 1)), (16, 4, (3, 5)), (4, 3, (1, 7))], ids=str
)
def test_patches_are_right_in_bfloat16_in_every_shape(patch, channels, grid):
    """What oneDNN on AMX is not; other CPUs pass without what is tested here."""
    images = torch.rand(2, channels, grid[0] * patch, grid[1] * patch)
    embed = small(patch_size=patch, image_size=2 * patch, in_channels=channels).patch_embed
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = embed(images)
    torch.testing.assert_close(tokens, embed(images)[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "numbers", [{"num_classes": np.int64(5)}, {"image_size": np.int64(16)}, {"image_size": (np.int32(16), 16)},
                {"drop_path": np.float32(0.25)}], ids=str
)  # fmt: skip
def test_numbers_of_numpy_are_numbers(numbers):
    plain = {name: 0.25 if name == "drop_path" else SMALL[name] for name in numbers}
    config, expected = small(**numbers).config, small(**plain).config
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(expected))


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_nano", 0.46), ("vit_micro", 2.70), ("vit_small", 21.3), ("vit_base", 85.2)]
)
def test_the_four_sizes_have_their_known_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = create_model(name, encoding="ape", image_size=32, patch_size=4, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert name in MODELS


@pytest.mark.parametrize("encoding", ["none", "ape", "sincos", "sape2", "ape+sape2", "sape2:every=2,share=true"])
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (24, 12)], ids=str)
def test_any_image_of_whole_patches_passes_and_every_parameter_learns(encoding, size):
    model = small(encoding=encoding, num_registers=1, pool="mean")
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_with_a_class_token_the_bias_of_the_last_layer_reaches_nothing():
    """The class token is not biased and the patches of the last layer are not read, in the paper's models too."""
    model = small(encoding="sape2", pool="class")
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    first, last = (block.attn.encoding.table_x.grad for block in model.blocks)
    assert first.any()
    assert not last.any()


def test_autocast_leaves_the_residual_stream_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small().embed(torch.randn(2, 3, 16, 16))[0].dtype == torch.float32


@pytest.mark.parametrize("size", [np.int64(16), np.array([16, 16]), torch.tensor([16, 16])], ids=["number", "array", "tensor"])
def test_numbers_of_other_libraries_are_numbers(size):
    assert small(image_size=size, num_classes=np.int64(5)).config == small().config


@pytest.mark.parametrize(("images", "message"), [((1, 3, 16, 18), "16x18"), ((1, 1, 16, 16), "3 channels")])
def test_images_that_do_not_fit_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(images))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ape+sape2", "rope+rpe"])
def test_one_compiled_graph_is_for_images_of_all_sizes(encoding):
    torch._dynamo.reset()
    model, images = small(encoding=encoding).eval(), torch.randn(2, 3, 16, 24)
    for side in (2, 3):
        torch._dynamo.mark_dynamic(images, side)  # raises where a size is made a number
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = small(encoding="ape+sape2")
    saving = ViT(plain.config.__class__(**(vars(plain.config) | {"gradient_checkpointing": True})))
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    for model in (plain, saving):
        model(images).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_models_of_one_seed_differ_in_their_encoding_only():
    states = []
    for encoding in ("none", "ape", "ape+sape2", "sape2:count=both"):
        torch.manual_seed(3)
        states.append({k: v for k, v in small(encoding=encoding).state_dict().items() if "encoding" not in k})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    torch.manual_seed(4)
    assert not torch.equal(small(encoding="none").state_dict()["head.weight"], states[0]["head.weight"])


@pytest.mark.parametrize("start", ["learned", "on the meta device"])
@pytest.mark.parametrize("encoding", ["ape+cpe+sape2:share=true", "rope_mixed+log_cpb"])
def test_what_resets_all_modules_leaves_nothing_learned_and_nothing_undrawn(encoding, start):
    """As trainings from the start, FSDP and `_init_weights` of transformers do it."""
    with torch.device("cpu" if start == "learned" else "meta"):
        model = create_model("vit_nano", encoding=encoding, **SMALL | {"image_size": (8, 12)}).to_empty(device="cpu")
    new = create_model("vit_nano", encoding=encoding, **SMALL | {"image_size": (8, 12)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e6)
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sizes = {name: parameter.abs().max() for name, parameter in new.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() <= 5 * sizes[name] + 0.1, name


def test_layer_scale_drop_path_and_the_rest_do_not_depend_on_the_encoding():
    def skeleton(encoding):
        model = small(encoding=encoding, layer_scale=1e-4, drop_path=0.2)
        return [str(module) for name, module in model.named_modules() if "encoding" not in name and not list(module.children())]

    assert skeleton("none") == skeleton("ape+sape2")


def test_tables_tokens_norms_and_biases_do_not_decay():
    from sape2.config import TrainConfig
    from sape2.training.optimisation import make_optimizer

    model = small(encoding="ape+sape2:sign=learned", num_registers=1)
    optimizer = make_optimizer(model, TrainConfig())
    decays = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    decaying = {name for name, p in model.named_parameters() if decays[id(p)]}
    assert {"token_encodings.0.table", "cls_token", "reg_token", "norm.weight", "head.bias"} & decaying == set()
    assert not any("encoding" in name for name in decaying)
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= decaying


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_timm_s_factory_gives_each_layer_its_rate_and_decays_no_token(wrap):
    model = small(encoding="ape+cpe+sape2:share=true", num_registers=1, depth=3)
    options = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.5}
    groups = timm.optim.create_optimizer_v2(wrap(model), **options).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert all(found[name] == (0.5**4, 0) for name in ("cls_token", "reg_token", "token_encodings.1.conv.weight"))
    assert [found[f"blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [(0.5**3, 0.05), (0.5**2, 0.05), (0.5, 0.05)]
    assert found["blocks.0.attn.encoding.table_x"] == (0.5**3, 0)
    assert found["norm.weight"] == (0.5, 0)
    assert found["head.weight"] == (1, 0.05)


def test_maps_give_every_layer_what_its_encoding_saw():
    model = small(encoding="ape+sape2:every=2").eval()
    images = torch.randn(2, 3, 8, 12)
    layers = model.maps(images)
    assert ["bias" in layer for layer in layers] == [False, True]
    assert layers[1]["positions_x"].shape == (2, 3, 6, 3)
    torch.testing.assert_close(model.head(model.pool(model.norm(layers[-1]["tokens"]))), model(images))


def test_the_ape_table_is_resampled_from_its_own_oblong_grid():
    model = small(encoding="ape", image_size=(8, 24))
    ape = model.token_encodings[0]
    assert ape.table.shape == (2, 6, 24)
    ramp = torch.linspace(0, 1, 6)[None, :, None].expand(2, 6, 24)
    torch.nn.init.zeros_(ape.table)
    ape.table.data += ramp
    resampled = ape.resampled((4, 12))
    assert resampled.shape == (4, 12, 24)
    assert (resampled[:, 1:, 0] - resampled[:, :-1, 0] > -1e-3).all()  # still a ramp along x, and along x only
    torch.testing.assert_close(resampled[0], resampled[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "dim=24, num_heads=5"),
        ({"image_size": 18}, "multiples of 4"),
        ({"encoding": "apes"}, "unknown encoding 'apes'"),
        ({"encoding": "sape2:every=9"}, "every=9.* 2 layers"),
        ({"depths": 2}, r"model\.depths"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match="'vit_huge'"):
        create_model("vit_huge")
