"""An encoding of the tokens behind the first block of a host: the convolution on its patches, under a gain of 0."""

import pytest
import torch
from family_cases import FAMILIES, batch_of, found, make_family
from host_cases import CASES, images, make, open_gains, outputs
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from sape2 import attach, create_model, detach, encoding_parameters, load_adapter, save_adapter
from sape2.adapters import find_host
from sape2.adapters.after import AfterBlock, block_around


def behind_a_block(model):
    (found,) = [(name, module) for name, module in model.named_modules() if isinstance(module, AfterBlock)]
    return found


def seen_by(model, call):
    """What the first block gave and what the model went on with, in (B, T, D)."""
    _, after = behind_a_block(model)
    calls = []
    hook = after.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    with torch.no_grad():
        call(model)
    hook.remove()
    return [each.flatten(1, -2) for each in calls[0]]


def literally(after, patches, grid):
    """x + g conv(x), tap by tap, on patches (B, N, D) in row-major order; 0 outside."""
    height, width = grid
    image = patches.unflatten(1, grid)
    total = after.encoding.conv.bias.expand_as(image).clone()
    for row in range(height):
        for column in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        tap = after.encoding.conv.weight[:, 0, dy + 1, dx + 1]
                        total[:, row, column] += tap * image[:, row + dy, column + dx]
    return patches + after.gain * total.flatten(1, 2)


@pytest.mark.parametrize("case", CASES)
def test_patches_get_the_convolution_of_what_the_first_block_gives_and_other_tokens_stay(case):
    model, x = attach(make(case), "cpe"), images(case)
    open_gains(model)
    name, after = behind_a_block(model)
    assert "0" in name
    assert "1" not in name
    given, taken = seen_by(model, lambda model: outputs(model, x))
    grid = x.shape[-2] // 8, x.shape[-1] // 8
    prefix = given.shape[1] - grid[0] * grid[1]
    assert torch.equal(taken[:, :prefix], given[:, :prefix])
    torch.testing.assert_close(taken[:, prefix:], literally(after, given[:, prefix:], grid))


SEVERAL = ("Siglip2", "timm.NaFlex", "timm.NaFlex.rope")  # grids in a batch, padded
WINDOWS = ("timm.SAM", "timm.SAM.rope", "Sam", "Sam.eager", "timm.Swin", "Swin")  # their grid is that of the image
SHUFFLED = ("MAE", "MAE.masked")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*SEVERAL, *SHUFFLED)])
def test_in_every_family_patches_get_the_convolution_on_the_whole_image(name):
    model, batch = attach(make_family(name), "cpe"), batch_of(name)
    open_gains(model)
    _, after = behind_a_block(model)
    given, taken = seen_by(model, lambda model: found(model, batch))
    patch = 4 if name in ("Sam", "Sam.eager", "timm.Swin", "Swin") else 8
    height, width = batch["x" if "x" in batch else "pixel_values"].shape[-2:]
    first, last = (0, given.shape[1]) if name in WINDOWS else after.tokens.ends(given.shape[1])
    torch.testing.assert_close(taken[:, first:last], literally(after, given[:, first:last], (height // patch, width // patch)))
    assert torch.equal(taken[:, :first], given[:, :first])
    assert torch.equal(taken[:, last:], given[:, last:])


@pytest.mark.parametrize("name", SEVERAL)
def test_padding_stays_as_it_is(name):
    model, batch = attach(make_family(name), "cpe"), batch_of(name)
    open_gains(model)
    given, taken = seen_by(model, lambda model: found(model, batch))
    valid = batch["patch_valid"] if "patch_valid" in batch else batch["pixel_attention_mask"].bool()
    prefix = given.shape[1] - valid.shape[1]
    assert torch.equal((given != taken).any(-1), F.pad(valid, (prefix, 0)))


def test_a_patch_that_was_dropped_is_0_for_its_neighbours():
    model = VisionTransformer(img_size=24, patch_size=8, embed_dim=16, depth=2, num_heads=2, patch_drop_rate=0.5).double()
    attach(model.train(), "cpe")
    open_gains(model)
    _, after = behind_a_block(model)
    kept = []
    keep = type(after.tokens).keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(after.tokens), "keep", lambda tokens, indices: kept.append(indices) or keep(tokens, indices))
        given, taken = seen_by(model, lambda model: model(torch.randn(2, 3, 24, 24).double()))
    (indices,) = kept
    index = indices[..., None].expand(-1, -1, 16)
    whole = torch.zeros(2, 9, 16).double().scatter(1, index, given[:, 1:])
    torch.testing.assert_close(taken[:, 1:], literally(after, whole, (3, 3)).gather(1, index))


def test_the_model_is_that_of_this_package_with_the_convolution_inside():
    sizes = {"image_size": (16, 24), "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2}
    whole = create_model("vit_nano", encoding="ape+cpe", **sizes).eval()
    plain = create_model("vit_nano", encoding="ape", **sizes).eval()
    theirs = whole.state_dict()
    plain.load_state_dict({key: value for key, value in theirs.items() if not key.startswith("token_encodings.1")})
    attach(plain, "cpe", start="as_is")
    after = behind_a_block(plain)[1]
    assert after.gain is None
    after.encoding.load_state_dict(whole.token_encodings[1].state_dict())
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(plain(x), whole(x))


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_it_stays_in_float32_whatever_the_host_computes_in(padding):
    model, x = attach(make("timm.vit.class").float(), f"cpe:padding={padding}"), images("timm.vit.class").float()
    open_gains(model)
    _, after = behind_a_block(model)
    grid = x.shape[-2] // 8, x.shape[-1] // 8
    with torch.autocast("cpu", torch.bfloat16):
        given, taken = seen_by(model, lambda model: outputs(model, x))
    torch.testing.assert_close(taken[:, 1:], after._changed(given[:, 1:], grid))
    given, taken = seen_by(model.bfloat16(), lambda model: outputs(model, x.bfloat16()))  # the tables, too
    assert torch.equal(taken[:, 1:], after.float()._changed(given[:, 1:].float(), grid).bfloat16())


@pytest.mark.parametrize("case", ["timm.vit.class", "torchvision", "transformers.ViT.sdpa", "sape2.ape"])
def test_what_read_the_block_before_attach_reads_what_the_next_one_gets(case):
    """As the hooks of transformers do, which stay from the first call with output_hidden_states on."""
    model, x, read = make(case), images(case), []
    block = block_around(model, find_host(model).layers[0][0])
    block.register_forward_hook(lambda module, args, output: read.append(output[0] if isinstance(output, tuple) else output))
    attach(model, "cpe")
    open_gains(model)
    _, taken = seen_by(model, lambda model: outputs(model, x))
    assert torch.equal(read[0], taken)


@pytest.mark.parametrize("case", ["timm.vit.class", "transformers.ViT.sdpa", "sape2.ape"])
def test_a_model_that_ran_compiled_before_has_it_too(case):
    model, x = make(case), images(case)
    compiled = torch.compile(model, backend="eager")
    before = outputs(compiled, x)
    attach(model, "cpe")
    open_gains(model)
    assert not torch.allclose(outputs(compiled, x), before)
    torch.testing.assert_close(outputs(compiled, x), outputs(model, x))
    torch.testing.assert_close(outputs(torch.compile(detach(model), backend="eager"), x), before)


def test_it_stands_inside_a_block_that_is_compiled_alone():
    model, x = make("timm.vit.class"), images("timm.vit.class")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    before = outputs(model, x)
    attach(model, "cpe")
    open_gains(model)
    found, block = outputs(model, x), model.blocks[0]._orig_mod
    assert not torch.allclose(found, before)
    model.blocks[0] = block
    torch.testing.assert_close(outputs(model, x), found)


def test_the_gain_learns_first_and_then_the_convolution():
    model, x = attach(make("timm.vit.avg"), "cpe", trainable="encoding"), images("timm.vit.avg")
    optimizer = torch.optim.SGD(encoding_parameters(model), lr=0.1)
    learned = []
    for _ in range(2):
        optimizer.zero_grad()
        outputs(model, x).square().sum().backward()
        learned.append([name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()])
        optimizer.step()
    prefix = "blocks.0.sape2."
    assert learned == [[f"{prefix}gain"], [f"{prefix}gain", f"{prefix}encoding.conv.weight", f"{prefix}encoding.conv.bias"]]
    assert {f"{prefix}encoding.conv.weight", f"{prefix}encoding.conv.bias", f"{prefix}gain"} <= model.no_weight_decay()


def test_a_reset_closes_the_gain_again():
    model, x = make("timm.vit.class"), images("timm.vit.class")
    before = model(x)
    attach(model, "cpe")
    open_gains(model)
    behind_a_block(model)[1].reset_parameters()
    torch.testing.assert_close(model(x), before)


def test_an_adapter_of_another_form_is_refused(tmp_path):
    save_adapter(attach(make("timm.vit.avg"), "cpe+sape2"), tmp_path)
    config = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(config.replace("cpe+sape2", "sape2"))
    model = make("timm.vit.avg")
    with pytest.raises(ValueError, match="does not hold this adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="nothing is attached"):
        detach(model)


def test_an_attached_model_takes_no_second_one():
    model = attach(make("timm.vit.avg"), "cpe")
    for part in (model, nn.Sequential(model), model.blocks):
        with pytest.raises(ValueError, match=r"attached already|knows models of"):
            attach(part, "sape2")


def test_heads_that_are_wider_together_than_the_tokens_are_refused_in_the_first_call():
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    attach(model, "cpe")
    behind_a_block(model)[1].encoding.dim = 24
    with pytest.raises(ValueError, match=r"made for tokens of 24 channels.* gives 16"):
        model(torch.randn(1, 3, 16, 16))


def test_an_attention_outside_of_blocks_has_none_around_it():
    holder = nn.Module()
    holder.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="no list of blocks around MultiheadAttention"):
        block_around(holder, holder.attention)


def test_fx_has_it_as_one_node():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = attach(make("torchvision"), "cpe+sape2"), images("torchvision")
    open_gains(model)
    features = create_feature_extractor(model, ["encoder.layers.encoder_layer_1"])
    expected = []
    model.encoder.layers[1].register_forward_hook(lambda module, args, output: expected.append(output))
    model(x)
    torch.testing.assert_close(features(x)["encoder.layers.encoder_layer_1"], expected[0])
