"""attach and detach on the real libraries: no effect at the start, the bias where it belongs, the original back."""

import copy
import io
import re
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from host_cases import CASES, HF, TIMM, description, images, make, make_transformers, open_gains, outputs, randomised
from torch import nn
from torch.nn import functional as F

from sape2 import attach, create_model, detach, encoding_parameters
from sape2.adapters.attached import attached_encodings
from sape2.adapters.attention import Attached
from sape2.adapters.start import Gained
from sape2.encodings import AttentionEncoding
from sape2.encodings.content import Content

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def attached_modules(model):
    return [module for module in model.modules() if isinstance(module, Attached)]


# --- start and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_attach_changes_nothing_at_first_and_detach_restores_everything(case):
    model, x = make(case), images(case)
    before, state, expected = description(model), copy.deepcopy(model.state_dict()), outputs(model, x)
    assert attach(model, "cpe+sape2", trainable="encoding") is model
    tolerance = 1e-5 if case.endswith("eager") else 1e-12  # the host's eager softmax is in float32
    torch.testing.assert_close(outputs(model, x), expected, rtol=tolerance, atol=tolerance)
    assert len(attached_modules(model)) == 2
    assert {key for key in model.state_dict() if ".sape2." not in key} == set(state)
    open_gains(model)
    assert (outputs(model, x) - expected).abs().max() > 1e-3 * expected.std()
    assert detach(model) is model
    assert description(model) == before
    assert list(model.state_dict()) == list(state)
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_host_s_own_under_the_bias_as_its_mask(case):
    """Each attached attention against the forward of its host class, given the bias of its encoding as a mask."""
    model, x = attach(make(case), "sape2"), images(case)
    open_gains(model)
    for module in attached_modules(model):
        calls, biases = [], []
        hooks = [
            module.register_forward_pre_hook(lambda m, args, kw, seen=calls: seen.append((args, kw)), with_kwargs=True),
            module.register_forward_hook(lambda m, args, output, seen=calls: seen.append(output)),
        ]
        make_bias = type(module.sape2).make_bias
        with pytest.MonkeyPatch.context() as patch:
            record = lambda *args, seen=biases, of=make_bias: (seen.append(args), of(*args))[1]  # noqa: E731
            patch.setattr(type(module.sape2), "make_bias", record)
            outputs(model, x)
        for hook in hooks:
            hook.remove()
        (args, keywords), output = calls
        content = next(content for encoding, content in biases if encoding is module.sape2)
        q, k, grid = content.q, content.k, content.grid
        torch.testing.assert_close(torch.cat([q, k]), projected(module, args, q.shape[2]))
        assert tuple(grid) == (x.shape[-2] // 8, x.shape[-1] // 8)
        prefix = output_tokens(output) - grid[0] * grid[1]
        mask = F.pad(module.sape2.bias(q, k, grid).dense(), (prefix, 0, prefix, 0))
        expected = host_forward(module, args, keywords, mask)
        tolerance = 1e-5 if case.endswith("eager") else 1e-10
        torch.testing.assert_close(first(output), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_an_encoding_reads_the_input_of_the_host_s_attention(case):
    """No effect at first; then the bias is that of the very tokens that the host projects to queries and keys."""
    model, x = make(case), images(case)
    expected = outputs(model, x)
    attach(model, "pape:parabolas=2")
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-5, atol=1e-5)
    open_gains(model)
    for module in attached_modules(model):
        inputs, read = [], []
        hook = module.register_forward_pre_hook(lambda m, args, seen=inputs: seen.append(args[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Content, "read_tokens", lambda content, *_, seen=read: seen.append(content.tokens) or content.tokens)
            changed = outputs(model, x)
        hook.remove()
        tokens = inputs[0] if inputs[0].shape[0] == len(x) else inputs[0].transpose(0, 1)
        assert any(torch.equal(found, tokens[:, -found.shape[1] :]) for found in read)
    assert (changed - expected).abs().max() > 1e-3 * expected.std()


def test_a_host_that_hands_no_tokens_on_is_told_what_is_missing():
    model = attach(make("timm.vit.avg"), "pape")
    model.patch_embed(images("timm.vit.avg"))
    with pytest.raises(ValueError, match=r"pape reads the normed input of the block .* \(batch, tokens, 16\)"):
        attached_modules(model)[0].bias_map(*torch.randn(2, 2, 2, 13, 8).double())


def first(output):
    return output[0] if isinstance(output, tuple) else output


def output_tokens(output):
    return first(output).shape[1]


def projected(module, args, tokens):
    """Queries and keys of the last `tokens` tokens straight from the weights, in the heads of the host, not rotated."""
    x = args[0][:, -tokens:]
    if hasattr(module, "in_proj_weight"):
        weights = module.in_proj_weight.chunk(3)[:2]
        q, k = (x @ w.T + b for w, b in zip(weights, module.in_proj_bias.chunk(3), strict=False))
    elif getattr(module, "qkv", None) is not None:
        q, k = (x @ module.qkv.weight.T).chunk(3, dim=-1)[:2]
        bias = module.qkv.bias if module.qkv.bias is not None else torch.cat([module.q_bias, module.k_bias, module.v_bias])
        q, k = (t + b for t, b in zip((q, k), bias.chunk(3), strict=False))
    else:
        names = ("q_proj", "k_proj") if hasattr(module, "q_proj") else ("query", "key")
        q, k = (getattr(module, name)(x) for name in names)
    q, k = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    return torch.cat([q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)])


def host_forward(module, args, keywords, mask):
    host = module.host_class
    if host.__module__.startswith("sape2"):  # has no mask: the literal product instead
        q, k, v = module.project(args[0])
        encoded = module.encoding.rotate(q[:, :, 1:], k[:, :, 1:], args[1])
        q, k = (torch.cat([t[:, :, :1], turned], 2) for t, turned in zip((q, k), encoded, strict=True))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        return module.proj((weights @ v).transpose(1, 2).flatten(2))
    if host is nn.MultiheadAttention:
        plain = copy.deepcopy(module)
        plain.__class__ = host
        return plain(*args, need_weights=False, attn_mask=mask.flatten(0, 1))[0]
    keywords = {key: value for key, value in keywords.items() if key not in ("attn_mask", "attention_mask")}
    if not host.__module__.startswith("transformers"):
        return first(host.forward(module, args[0], attn_mask=mask, **keywords))
    with pytest.MonkeyPatch.context() as patch:  # into its product: DINOv2 takes no mask before transformers 5.18
        backend = module.functions.get_interface(module.config._attn_implementation, module.library.eager_attention_forward)
        masked = lambda host, q, k, v, _, **options: backend(host, q, k, v, mask, **options)  # noqa: E731
        patch.setattr(type(module.functions), "get_interface", lambda *asked: masked)
        return first(host.forward(module, args[0], **keywords))


def test_a_model_of_this_package_equals_one_made_with_both_encodings():
    made = randomised(create_model("vit_nano", encoding="ape+sape2:sign=learned", image_size=16, depth=2)).eval()
    attached = attach(create_model("vit_nano", encoding="ape", image_size=16, depth=2), "sape2").eval()
    names = {".encoding.gain": ".sape2.gain", ".encoding.table": ".sape2.inner.table"}
    state = made.state_dict()
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    attached.load_state_dict(state)
    x = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(attached(x), made(x))
    torch.testing.assert_close(attached.maps(x)[0]["bias"], made.maps(x)[0]["bias"])
    assert {name for name in attached.state_dict() if ".sape2." in name} <= attached.no_weight_decay()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm.vit.avg", "timm.eva.dinov3", "torchvision", "transformers.ViT.sdpa", "sape2.ape"])
def test_gradients_reach_the_encoding_and_with_encoding_nothing_else(case):
    for trainable in ("all", "encoding"):
        model, x = attach(make(case).train(), "sape2", trainable=trainable), images(case)
        theirs = {id(p) for p in encoding_parameters(model)}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        moved = copy.deepcopy(model.state_dict())
        for _ in range(2):  # tables wait for the gain
            optimizer.zero_grad()
            outputs(model, x).square().sum().backward()
            optimizer.step()
        with_gradient = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        first_layer = {id(p) for p in attached_encodings(model)[0].parameters()}
        assert len(first_layer) == 3  # gain and two tables
        assert first_layer <= with_gradient
        assert (with_gradient <= theirs) == (trainable == "encoding")
        if trainable == "encoding":
            assert all(torch.equal(value, moved[key]) for key, value in model.state_dict().items() if ".sape2." not in key)


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "transformers.Dinov2.sdpa", "sape2.ape"])
def test_gradient_checkpointing_changes_no_gradient_even_with_crops_of_several_sizes(case):
    crops = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((24, 32), (24, 24), (16, 16))]
    gradients = []
    for saving in (False, True):
        model = attach(make(case), "sape2").train()
        open_gains(model)
        if case.startswith("sape2"):
            model.config = model.config.__class__(**vars(model.config) | {"gradient_checkpointing": saving})
        elif case.startswith("timm"):
            model.set_grad_checkpointing(saving)
        elif saving:
            model.gradient_checkpointing_enable()
        for _ in range(2):
            sum(outputs(model, x).square().sum() for x in crops).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_refuses_to_guess_between_grids_of_equally_many_patches(reentrant):
    timm.layers.config.set_reentrant_ckpt(reentrant)
    model = attach(make("timm.vit.dinov2"), "sape2").train()
    model.set_grad_checkpointing()
    losses = [model(torch.randn(1, 3, *size).double()).sum() for size in ((24, 32), (32, 24))]
    with pytest.raises(ValueError, match=r"one of the grids .* call backward between"):
        sum(losses).backward()
    for size in ((24, 32), (32, 24)):  # one after the other is fine
        model(torch.randn(1, 3, *size).double()).sum().backward()
    timm.layers.config.set_reentrant_ckpt(False)


@pytest.mark.parametrize("case", ["timm.vit.class", "timm.eva.dinov3", "transformers.ViT.sdpa", "torchvision"])
def test_half_precision_stays_half_and_tables_stay_whole(case):
    model, x = attach(make(case).bfloat16(), "sape2"), images(case).bfloat16()
    assert outputs(model, x).dtype == torch.bfloat16
    assert {p.dtype for p in encoding_parameters(model)} == {torch.float32}
    whole = attach(make(case).float(), "sape2")
    open_gains(whole, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(whole, x.float())
    torch.testing.assert_close(found.float(), outputs(whole, x.float()), rtol=0.1, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "transformers.Dinov2.sdpa", "torchvision"])
def test_compiled_models_agree_with_the_others_on_several_sizes(case):
    torch._dynamo.reset()
    model = attach(make(case).float(), "sape2")
    open_gains(model)
    compiled = torch.compile(model)
    sizes = [(24, 24)] if case == "torchvision" else [(24, 32), (24, 24), (32, 24)]
    for size in sizes:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(outputs(compiled, x), outputs(model, x), rtol=1e-4, atol=1e-4)
    outputs(compiled, x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    outputs(model, x).square().sum().backward()
    for one, other in zip(found, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# --- sizes, masks, dropped patches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm.vit.dynamic", "timm.eva.dinov3", "transformers.Dinov2.sdpa", "sape2.ape"])
def test_the_grid_is_that_of_the_images_not_a_square_root(case):
    model = attach(make(case), "sape2")
    open_gains(model)
    seen = []
    encoding = attached_modules(model)[0].sape2
    make_bias = encoding.make_bias
    encoding.make_bias = lambda content: (seen.append(tuple(content.grid)), make_bias(content))[1]
    for size in ((16, 32), (32, 16), (8, 64)):
        outputs(model, torch.randn(1, 3, *size).double())
    assert seen == [(2, 4), (4, 2), (1, 8)]


@pytest.mark.parametrize("case", ["timm.vit.dynamic", "timm.eva.dinov3"])
@pytest.mark.parametrize("encoding", ["sape2+rpe", "pape"])
def test_dropped_patches_are_those_that_a_mask_hides(case, encoding):
    """An attention on what patch dropout leaves, against all patches under a mask that hides the others."""
    model, x = make(case), images(case)
    if case.startswith("timm.eva"):
        model.patch_drop = timm.layers.PatchDropoutWithIndices(0.5, model.num_prefix_tokens)
    expected = dropped(model.train(), x)
    torch.testing.assert_close(dropped(attach(model, encoding), x), expected, rtol=1e-12, atol=1e-12)
    open_gains(model)
    attention, prefix, indices = model.blocks[0].attn, model.num_prefix_tokens, torch.tensor([[5, 0, 9, 2], [1, 11, 3, 4]])
    tokens, rope = torch.randn(2, prefix + 12, 16).double(), getattr(model, "rope", None)
    kept = torch.cat([torch.arange(prefix).expand(2, -1), indices + prefix], dim=1)
    mask = torch.zeros(2, 1, 1, prefix + 12, dtype=torch.bool).scatter(3, kept[:, None, None], True)
    turns = {} if rope is None else {"rope": rope.get_embed((3, 4))}
    model.patch_embed(x)
    whole = attention(tokens, attn_mask=mask, **turns)
    model.sape2_attachment.tokens.keep(indices)
    if rope is not None:
        turns = {"rope": turns["rope"][indices][:, None]}
    part = attention(tokens.gather(1, kept[..., None].expand(-1, -1, 16)), **turns)
    torch.testing.assert_close(part, whole.gather(1, kept[..., None].expand(-1, -1, 16)))


def dropped(model, x):
    torch.manual_seed(3)
    return model(x)


def test_a_mask_of_pairs_joins_the_bias_and_what_it_hides_is_not_counted():
    model, x = attach(make("timm.vit.avg"), "sape2"), images("timm.vit.avg")
    open_gains(model)
    mask = torch.rand(13, 13) > 0.3
    mask.fill_diagonal_(True)
    attention = model.blocks[0].attn
    tokens = torch.randn(2, 13, 16).double()
    model.patch_embed(x)
    heads = attention.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)[:2, :, :, 1:]
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    for kept, options in ((mask, {"attn_mask": mask}), (causal, {"is_causal": True})):
        seen = Content(heads[0], heads[1], (3, 4), visible=kept[None, None, 1:, 1:])
        additive = torch.zeros(13, 13, dtype=torch.float64).masked_fill(~kept, float("-inf"))
        added = F.pad(attention.sape2.make_bias(seen).dense(), (1, 0, 1, 0)) + additive
        expected = attention.host_class.forward(attention, tokens, attn_mask=added)
        torch.testing.assert_close(attention(tokens, **options), expected)
        torch.testing.assert_close(attention(tokens, attn_mask=additive), expected)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ["rpe:beyond=clamp", "sape2:normalize=sqrt_length+cope", "forget"])
def test_padded_images_get_the_result_of_whole_ones(back_end, encoding):
    """ViT on 24x24 with the last row of patches hidden, against 16x24, positions off."""
    model = make(f"transformers.ViT.{back_end}")
    nn.init.zeros_(model.vit.embeddings.position_embeddings)
    attach(model, encoding)
    open_gains(model)
    x, mask = torch.randn(1, 3, 24, 24).double(), torch.tensor([[1] * 7 + [0] * 3])
    whole = model.vit(x[:, :, :16], interpolate_pos_encoding=True).last_hidden_state
    padded = model.vit(x, attention_mask=mask).last_hidden_state[:, :7]
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.vit(x).last_hidden_state[:, :7], whole, atol=1e-3)


# --- the back ends of transformers -----------------------------------------------------------------------------------


def test_back_ends_can_be_changed_afterwards_and_agree():
    model, x = attach(make("transformers.ViT.sdpa"), "sape2"), images("transformers")
    open_gains(model)
    with_sdpa = outputs(model, x)
    model.set_attn_implementation("eager")
    found = model(x, output_attentions=True)
    torch.testing.assert_close(found.logits, with_sdpa, rtol=1e-5, atol=1e-5)
    assert found.attentions[0].shape == (2, 2, 10, 10)
    detach(model)
    assert not torch.allclose(model(x, output_attentions=True).attentions[0], found.attentions[0], atol=1e-3)


def test_back_ends_without_a_bias_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="'flex_attention' cannot carry an attached encoding: its masks are compiled before"):
        attach(make_transformers("ViT", "flex_attention"), "sape2")
    model = attach(make("transformers.ViT.sdpa"), "sape2")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match='Use "sdpa" or "eager"'):  # the whole model would first compile its mask, for a minute
        model.vit.layers[0].attention(torch.zeros(1, 10, 16).double())


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "torchvision", "transformers.ViT.sdpa", "sape2.ape"])
def test_copies_and_pickles_are_whole_models_of_their_own(case):
    model, x = attach(make(case), "sape2", trainable="encoding"), images(case)
    open_gains(model)
    expected = outputs(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(other, x), expected)
        open_gains(other)
        assert not torch.equal(outputs(other, x), expected)
        detach(other)
        assert all(p.requires_grad for p in other.parameters())
        assert not attached_modules(other)
        assert torch.equal(outputs(model, x), expected)
    assert len(attached_modules(model)) == 2


# --- what enters how -------------------------------------------------------------------------------------------------


UNDER_A_GAIN = ["sape2", "sape2:sign=minus", "alibi", "rpe", "sape2:readout=direct,count=between"]
UNDER_A_GAIN += ["key_table", "log_cpb", "fire", "forget", "pape", "lookhere:outside=far"]


@pytest.mark.parametrize("name", UNDER_A_GAIN)
def test_a_bias_enters_under_a_gain_of_zero(name):
    (encoding, *_) = attached_encodings(attach(make("timm.vit.avg"), name)).values()
    assert isinstance(encoding, Gained)
    assert not encoding.gain.any()
    assert all(p.any() for p in encoding.inner.parameters())


@pytest.mark.parametrize("name", UNDER_A_GAIN)
def test_what_stands_under_a_gain_changes_nothing_and_learns_from_the_second_step_on(name):
    model, x = make("timm.vit.avg"), images("timm.vit.avg")
    expected = outputs(model, x)
    attach(model, name, trainable="encoding")
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.SGD(encoding_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs(model, x).square().sum().backward()
        optimizer.step()
    (first, *_) = attached_encodings(model).values()
    assert all(p.grad is not None and p.grad.any() for p in first.parameters())
    assert torch.equal(outputs(detach(model), x), expected)


@pytest.mark.parametrize("name", ["cope", "rpe_contextual", "rpe_decomposed"])
def test_tables_that_start_at_zero_need_no_gain_and_learn_at_the_first_step(name):
    model, x = make("timm.vit.avg"), images("timm.vit.avg")
    expected = outputs(model, x)
    attach(model, name)
    assert not any(isinstance(encoding, Gained) for encoding in attached_encodings(model).values())
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-12, atol=1e-12)
    outputs(model, x).square().sum().backward()
    assert all(p.grad.any() for p in encoding_parameters(model))


def test_a_bias_that_hides_patches_enters_only_as_it_is():
    model, x = make("timm.vit.avg"), images("timm.vit.avg")
    expected = outputs(model, x)
    with pytest.raises(ValueError, match=r'lookhere hides patches.*lookhere:outside=far, or give start="as_is"'):
        attach(model, "rpe+lookhere")
    assert torch.equal(outputs(model, x), expected)
    assert not torch.allclose(outputs(attach(model, "lookhere", start="as_is"), x), expected, atol=1e-3)


def test_a_reset_closes_the_gains_again():
    model, x = make("timm.vit.class"), images("timm.vit.class")
    before = model(x)
    attach(model, "sape2+rpe:share=true")
    open_gains(model)
    for module in model.modules():
        if isinstance(module, AttentionEncoding):
            module.reset_parameters()
    torch.testing.assert_close(model(x), before)


def test_joined_encodings_get_a_gain_each_and_schedules_hold():
    model = attach(timm.models.VisionTransformer(**TIMM | {"depth": 4}), "sape2:every=2,share=true+rpe+cope")
    encodings = attached_encodings(model)
    assert [sorted(type(part).__name__ for part in encoding.parts) for encoding in encodings.values()] == [
        ["CoPE", "Gained"],
        ["CoPE", "Gained", "Gained"],
        ["CoPE", "Gained"],
        ["CoPE", "Gained", "Gained"],
    ]
    shared = [{id(part) for part in encodings[layer].parts} for layer in (1, 3)]
    assert len(shared[0] & shared[1]) == 1
    model(torch.randn(1, 3, 24, 32))
    alone = attach(timm.models.VisionTransformer(**TIMM | {"depth": 4}), "sape2:every=2,share=true")
    assert list(attached_encodings(alone)) == [1, 3]
    assert len(list(encoding_parameters(alone))) == 3
    assert type(alone.blocks[0].attn) is timm.layers.Attention


def test_a_rotation_enters_only_as_it_is():
    model, x = make("timm.vit.avg"), images("timm.vit.avg")
    expected = outputs(model, x)
    for name in ("rope+sape2", "rope_mixed", "pope"):
        with pytest.raises(ValueError, match=r'turns q and k, which no gain can start from nothing.*start="as_is"'):
            attach(model, name)
    attach(model, "rope", start="as_is")
    turned = outputs(model, x)
    assert (turned - expected).abs().max() > 1e-2
    everything = torch.ones(13, 13, dtype=torch.bool)  # the way that a mask takes rotates as well
    torch.testing.assert_close(model(x, attn_mask=everything), turned)
    hf = attach(make("transformers.ViT.sdpa"), "rope", start="as_is")
    assert (outputs(hf, images("transformers")) - outputs(detach(hf), images("transformers"))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="turns q and k itself; a second rotation, 'rope_mixed'"):
        attach(make("timm.eva.eva02"), "rope_mixed", start="as_is")


# --- mistakes --------------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    pass


def swin_v2():
    return timm.models.SwinTransformerV2(32, 4, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=2, window_size=4)


def features_only(name):
    return timm.create_model(name, features_only=True, out_indices=(1,), **TIMM | {"num_classes": 0})


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (Unknown, {}, "attach knows models of timm, torchvision, transformers, sape2; got test_attach.Unknown"),
        (lambda: nn.Sequential(make("timm.vit.avg")), {}, "Attach before wrapping or compiling"),
        (swin_v2, {}, "timm's VisionTransformer, Eva, .* got SwinTransformerV2: its logits are cosines"),
        (lambda: features_only("vit_tiny_patch16_224"), {}, r"FeatureGetterNet: .*attach to the one inside, model\.model"),
        (
            lambda: timm.models.VisionTransformer(**TIMM, attn_layer="diff"),
            {},
            "the attention DiffAttention: it subtracts one softmax from another",
        ),
        (
            lambda: timm.models.VisionTransformer(**TIMM, block_fn=timm.models.vision_transformer.ParallelScalingBlock),
            {},
            "into ParallelScalingBlock: attention and MLP share one projection",
        ),
        (lambda: make("timm.vit.avg"), {"encoding": "ape+cpe+sape2"}, "Leave ape and sincos out: attach 'cpe\\+sape2'$"),
        (lambda: make("timm.vit.avg"), {"encoding": "sincos"}, "Leave ape and sincos out$"),
        (lambda: make("timm.vit.avg"), {"encoding": "sapes"}, "unknown encoding 'sapes'"),
        (lambda: make("timm.vit.avg"), {"trainable": "tables"}, "trainable must be one of all, encoding; got 'tables'"),
        (lambda: make("timm.vit.avg"), {"start": "zero"}, "start must be one of no_effect, as_is; got 'zero'"),
        (lambda: make("timm.vit.avg"), {"encoding": None}, 'an encoding is a text such as "sape2"'),
        (lambda: make("timm.vit.avg"), {"grid": 4}, "grid needs two positive integers"),
        (lambda: make("timm.vit.avg"), {"grid": ()}, "grid needs two positive integers"),
        (
            lambda: make("timm.vit.avg"),
            {"encoding": "rope", "start": "as_is", "trainable": "encoding"},
            "'rope' has no parameters here, .* nothing that learns",
        ),
        (lambda: attach(make("timm.vit.avg"), "rpe"), {}, "has 'rpe' attached already; detach it first"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_what_cannot_be_is_refused_with_the_reason_and_nothing_changes(make_model, options, message):
    model = make_model()
    before = description(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert description(model) == before


def of_timm(name, **options):
    return lambda: timm.create_model(name, **options)


def of_torchvision(name):
    return lambda: getattr(torchvision.models, name)()


def of_transformers(name, **sizes):
    transformers = pytest.importorskip("transformers")
    return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))


COSINES, KEYS, QUERIES = "its logits are cosines", "its keys are pooled", "it pools queries"
WITHOUT = "it has no attention, so there is nothing that a position encoding could enter"
VIT = {key: value for key, value in HF.items() if key != "num_labels"} | {"image_size": 24, "patch_size": 8}


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (of_timm("hiera_tiny_224"), f"got Hiera: {QUERIES}"),
        (of_timm("levit_128s"), f"got LevitDistilled: {QUERIES}"),
        (of_timm("cait_xxs24_224"), "got Cait: its logits are mixed between heads"),
        (of_timm("maxvit_tiny_tf_224"), "got MaxxVit: MaxViT also attends over patches that lie apart"),
        (of_timm("twins_svt_small"), f"got Twins: {KEYS}"),
        (of_timm("convit_tiny"), "got ConVit: its first layers add a softmax of positions"),
        (of_timm("volo_d1_224"), "got VOLO: its outlook attention has no keys"),
        (of_timm("csatv2"), "got CSATv2: one of its attentions is a gate of one channel"),
        (of_timm("davit_tiny"), "got DaVit: half of its layers attend over channels"),
        (of_timm("xcit_nano_12_p16_224"), "got Xcit: it attends over channels"),
        (of_timm("mvitv2_tiny"), f"got MultiScaleVit: {KEYS}"),
        (of_timm("pvt_v2_b0"), f"got PyramidVisionTransformerV2: {KEYS}"),
        (of_timm("swinv2_cr_tiny_224"), f"got SwinTransformerV2Cr: {COSINES}"),
        (of_timm("resnet18"), f"got ResNet: {WITHOUT}"),
        (of_timm("crossvit_tiny_240"), r"its attention \(Attention, .*\) is none of those that this was written for"),
        (of_timm("vit_tiny_patch16_224", features_only=True, feature_cls="hook"), r'FeatureHookNet: .*model\["body"\]'),
        (of_timm("swin_tiny_patch4_window7_224", features_only=True, feature_cls="list"), "FeatureListNet: .*'getter'"),
        (of_torchvision("swin_t"), "its attention is a function that takes no further bias; SwinTransformer of timm"),
        (of_torchvision("swin_v2_t"), f"got SwinTransformer: {COSINES}"),
        (of_torchvision("maxvit_t"), "got MaxVit: it also attends over patches that lie apart"),
        (of_torchvision("resnet18"), f"got ResNet: {WITHOUT}"),
        (of_transformers("Swinv2", embed_dim=8, depths=[1], num_heads=[1], image_size=32), f"got Swinv2Model: {COSINES}"),
        (of_transformers("Hiera", embed_dim=8, image_size=[32, 32], depths=[1] * 4), f"got HieraModel: {QUERIES}"),
        (of_transformers("DPT", **VIT), "got DPTModel: .* DPT with DINOv2 as its backbone_config takes encodings"),
        (of_transformers("Data2VecVision", **VIT), "got Data2VecVisionModel: .* BEiT itself takes encodings"),
        (of_transformers("PvtV2"), f"got PvtV2Model: {KEYS}"),
        (of_transformers("Segformer"), f"got SegformerModel: {KEYS}"),
        (of_transformers("TimmWrapper", architecture="test_vit"), r"attach to that, model\.timm_model"),
        (of_transformers("ConvNext"), f"got ConvNextModel: {WITHOUT}"),
        (of_transformers("Bert", **HF, vocab_size=9), r"its attention \(BertAttention, .*\) is none of those"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("as_users_call_it")
def test_every_model_that_takes_no_encoding_is_told_why(make_model, reason):
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match=reason):
        attach(model)


def test_there_is_nothing_to_detach_from_a_plain_model():
    with pytest.raises(ValueError, match="nothing is attached to this VisionTransformer"):
        detach(make("timm.vit.avg"))


NEEDED = next(line for line in PROJECT["optional-dependencies"]["hosts"] if line.startswith("transformers")).split(">=")[1]


@pytest.mark.parametrize("version", ["4.57.1", "5.8.1"])
def test_an_old_transformers_is_refused_naming_the_extra_and_the_version_of_pyproject(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)  # by path: transformers puts another module in its place
    needed = re.escape(f"needs transformers {NEEDED} or newer; got {version}: pip install 'sape2[hosts]'")
    with pytest.raises(ImportError, match=needed):
        attach(make("transformers.ViT.sdpa"), "sape2")


@pytest.mark.parametrize("version", [NEEDED, "5.10.0.dev0", "6.0.0"])
def test_a_transformers_as_new_as_needed_is_taken(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    assert attached_modules(attach(make("transformers.ViT.sdpa"), "sape2"))
