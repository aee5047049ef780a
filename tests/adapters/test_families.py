"""The rules of docs/hosts on every further family of hosts: each test is one rule, on all of them."""

import copy
import json
import pickle

import pytest
import timm
import torch
from family_cases import FAMILIES, batch_of, found, make_family
from host_cases import TIMM, description, open_gains
from timm.models.beit import Attention as BeitAttention
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from sape2 import attach, detach, encoding_parameters, load_adapter, save_adapter
from sape2.adapters.attached import attached_encodings
from sape2.adapters.attention import Attached, Window, as_additive
from sape2.encodings.content import Content

ALL = pytest.mark.parametrize("name", FAMILIES)


def attached_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Attached)}


BOTH = "cpe+sape2"  # behind a block and in attention


def opened(name, encoding="sape2"):
    model = attach(make_family(name), encoding)
    open_gains(model)
    return model


@ALL
def test_logits_stay_at_first_and_detach_brings_everything_back(name):
    model, batch = make_family(name), batch_of(name)
    with torch.no_grad():
        before, state, expected = description(model), copy.deepcopy(model.state_dict()), found(model, batch)
        attach(model, "cpe+sape2+rpe", trainable="encoding")
        torch.testing.assert_close(found(model, batch), expected, rtol=1e-12, atol=1e-12)
        assert {key for key in model.state_dict() if ".sape2." not in key} == set(state)
        open_gains(model)
        assert (found(model, batch) - expected).abs().max() > 1e-3 * expected.std()
        detach(model)
        assert description(model) == before
        assert list(model.state_dict()) == list(state)
        assert torch.equal(found(model, batch), expected)


@ALL
def test_attention_is_the_host_s_own_with_the_bias_in_its_product(name):
    """Each attached attention against its host's forward, in whose fused product the bias of its q and k is added."""
    model, batch = opened(name), batch_of(name)
    for module in attached_modules(model).values():
        module.fused_attn = True  # of timm's
        calls = []
        hook = module.register_forward_hook(lambda *call, seen=calls: seen.append(call[1:]), with_kwargs=True)
        with torch.no_grad():
            found(model, batch)
            hook.remove()
            args, keywords, output = calls[-1]
            expected = host_forward(module, args, keywords)
        tolerance = 1e-5 if name.endswith("eager") else 1e-9  # the host's eager softmax is in float32
        torch.testing.assert_close(first(output), first(expected), rtol=tolerance, atol=tolerance)


def host_forward(module, args, keywords):
    plain = F.scaled_dot_product_attention
    fused = SamVisionSdpaAttention if module.host_class is SamVisionAttention else module.host_class
    host, x = fused.forward, args[0] if args else keywords["hidden_states"]
    unturned, biases = [], []

    def product(q, k, v, attn_mask=None, **options):
        if not biases:
            unturned.extend([q, k])
            return plain(q, k, v, attn_mask=attn_mask, **options)
        bias = biases[0].reshape((*q.shape[:-1], -1)) if q.dim() == 3 else biases[0]
        mask = 0 if attn_mask is None else as_additive(attn_mask, q.dtype)
        return plain(q, k, v, attn_mask=bias + mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", product)
        with pytest.MonkeyPatch.context() as first_pass:
            if getattr(module, "rope", None) is not None:
                first_pass.setitem(module._modules, "rope", None)
            host(module, *args, **keywords | not_turned(keywords))
        heads = len(unturned[0]) // len(x) if unturned[0].dim() == 3 else None
        q, k = unturned if heads is None else (each.unflatten(0, (-1, heads)) for each in unturned)
        mask = keywords.get("mask", args[1] if len(args) > 1 else None)
        biases.append(module.bias_map(q, k, None, x.flatten(1, -2), window_of(module, x, mask)))
        return host(module, *args, **keywords)


def window_of(module, x, mask):
    """The window of a call, and which of its patches a shifted window keeps together."""
    if x.dim() == 4:
        return Window(tuple(x.shape[1:3]))
    if not hasattr(module, "window_size") and not hasattr(module, "relative_position_bias"):
        return None
    if module.host_class is BeitAttention:  # its window is the image
        return None
    grid = getattr(getattr(module, "relative_position_bias", module), "window_size", None)
    return Window(grid, None if mask is None else (mask == 0).repeat(len(x) // len(mask), 1, 1).unsqueeze(1))


def not_turned(keywords):
    if keywords.get("position_embeddings") is None:
        return {"rope": None} if "rope" in keywords else {}
    cos, sin = keywords["position_embeddings"]
    return {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@ALL
def test_an_encoding_reads_the_input_of_the_host_s_attention(name, monkeypatch):
    """What it reads stands somewhere in that input, with 0 at places without a token."""
    model, batch, read, inputs = opened(name, "pape:parabolas=2"), batch_of(name), [], []
    read_tokens = Content.read_tokens
    monkeypatch.setattr(Content, "read_tokens", lambda *args: read.append(read_tokens(*args)) or read[-1])
    for module in attached_modules(model).values():
        module.register_forward_pre_hook(
            lambda m, args, keywords: inputs.append((args or list(keywords.values()))[0]), with_kwargs=True
        )
    with torch.no_grad():
        found(model, batch)
    given = torch.cat([each.flatten(0, -2) for each in inputs if each.shape[-1] == inputs[0].shape[-1]])
    for tokens in read[: len(inputs)]:
        rows = tokens.flatten(0, 1)
        rows = rows[rows.any(-1)] if rows.shape[-1] == given.shape[-1] else rows[:0]
        assert all((given == row).all(-1).any() for row in rows)
    assert len(read) >= len(inputs)


@ALL
def test_only_the_image_tower_gets_an_encoding(name):
    modules = attached_modules(attach(make_family(name), "sape2"))
    assert modules
    assert not any(part in key for key in modules for part in ("text", "decoder"))


@ALL
def test_gradients_reach_the_tables_and_with_encoding_nothing_else(name):
    model, batch = attach(make_family(name).train(), "sape2", trainable="encoding"), batch_of(name)
    theirs = {id(p) for p in encoding_parameters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == theirs
    optimizer = torch.optim.SGD(encoding_parameters(model), lr=0.1)
    for _ in range(2):  # tables wait for the gain
        optimizer.zero_grad()
        torch.manual_seed(0)
        found(model, batch).square().sum().backward()
        optimizer.step()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert {id(p) for p in attached_encodings(model)[0].parameters()} <= with_gradient <= theirs


@ALL
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for saving in (False, True):
        model, batch = opened(name, BOTH).train(), batch_of(name)
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(saving)
        elif saving and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        found(model, batch).square().sum().backward()
        gradients.append([p.grad for p in encoding_parameters(model) if p.grad is not None])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)


@ALL
def test_an_adapter_is_a_file_for_another_copy(name, tmp_path):
    model, batch = opened(name, "cpe+sape2:share=true+rpe"), batch_of(name)
    save_adapter(model, tmp_path)
    other = load_adapter(make_family(name), tmp_path, trainable="encoding")
    with torch.no_grad():
        torch.testing.assert_close(found(other, batch), found(model, batch), rtol=1e-6, atol=1e-6)
        assert torch.equal(found(detach(other), batch), found(make_family(name), batch))


@ALL
def test_copies_and_pickles_are_models_of_their_own(name):
    model, batch = opened(name, BOTH), batch_of(name)
    with torch.no_grad():
        expected = found(model, batch)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(found(other, batch), expected)
            open_gains(other)
            assert not torch.equal(found(other, batch), expected)
            assert not attached_modules(detach(other))
        assert torch.equal(found(model, batch), expected)


@ALL
def test_tables_stay_whole_in_a_host_of_half_precision(name):
    model, batch = attach(make_family(name).bfloat16(), BOTH), batch_of(name)
    batch = {key: value.bfloat16() if getattr(value, "dtype", None) == torch.float64 else value for key, value in batch.items()}
    with torch.no_grad():
        assert found(model, batch).dtype == torch.bfloat16
    assert {p.dtype for p in encoding_parameters(model)} == {torch.float32}


LINEAR = r".*(q_proj|query|qkv)"


@ALL
@pytest.mark.parametrize("lora_first", [True, False], ids=["lora first", "attach first"])
def test_lora_and_an_encoding_learn_together_and_come_apart(name, lora_first, tmp_path):
    peft = pytest.importorskip("peft")
    host, batch = make_family(name), batch_of(name)
    wrap = lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LINEAR))  # noqa: E731
    both = wrap(host) if lora_first else wrap(attach(host, BOTH))
    if lora_first:
        attach(host, BOTH)
    for parameter in encoding_parameters(host):
        parameter.requires_grad_(True)
    before = {key: p.detach().clone() for key, p in both.named_parameters()}
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        found(host.train(), batch).square().mean().backward()
        optimizer.step()
    moved = {key for key, p in both.named_parameters() if not torch.equal(p, before[key])}
    assert {".sape2." in key for key in moved} == {True, False}
    assert all("lora_" in key or ".sape2." in key for key in moved)
    save_adapter(host, tmp_path)
    with torch.no_grad():
        expected = found(host.eval(), batch)
        merged = both.merge_and_unload()
        torch.testing.assert_close(found(merged, batch), expected)
        torch.testing.assert_close(found(load_adapter(detach(merged), tmp_path), batch), expected, rtol=1e-5, atol=1e-5)


# --- what is peculiar to some of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Siglip2", "timm.NaFlex", "timm.NaFlex.rope"])
@pytest.mark.parametrize("encoding", ["sape2+cope", "rpe", "cpe", "cpe:padding=circular"])
def test_an_image_of_a_padded_batch_gets_what_it_gets_alone(name, encoding):
    model, batch = opened(name, encoding), batch_of(name)
    counts = batch["spatial_shapes"].prod(-1) if name == "Siglip2" else batch["patch_valid"].sum(-1)
    with torch.no_grad():
        together = found(model, batch)
        for image, count in enumerate(counts.tolist()):
            alone = {
                key: value[image : image + 1] if key == "spatial_shapes" else value[image : image + 1, :count]
                for key, value in batch.items()
            }
            expected = together[image : image + 1]
            expected = expected[:, :count] if name == "Siglip2" else expected
            torch.testing.assert_close(found(model, alone), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoding", ["sape2", "cpe"])
def test_the_order_in_which_mae_shuffles_patches_changes_none_of_them(encoding):
    model, batch = opened("MAE", encoding), batch_of("MAE")
    with torch.no_grad():
        shuffled = model(**batch)
        plain = model(**batch | {"noise": torch.arange(15.0).expand(2, -1)}).last_hidden_state[:, 1:]
    order = shuffled.ids_restore[..., None].expand_as(plain)
    torch.testing.assert_close(shuffled.last_hidden_state[:, 1:].gather(1, order), plain)


@pytest.mark.parametrize(("name", "grids"), [("timm.SAM", [[2, 2], [3, 4]]), ("timm.Swin", [2, 3]), ("Sam", [[3, 3], [6, 6]])])
def test_tables_are_for_the_grid_that_a_layer_attends_over(name, grids, tmp_path):
    model = attach(make_family(name), "rpe_contextual")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["grid"] == grids
    if name != "timm.Swin":
        with pytest.raises(ValueError, match="attend over several grids"):
            attach(make_family(name), "sape2", grid=(4, 4))


@pytest.mark.parametrize("kind", ["getter", "hook"])
def test_a_model_that_only_says_features_takes_an_encoding_inside(kind):
    sizes = TIMM | {"num_classes": 0, "features_only": True, "out_indices": (1,)}
    model = timm.create_model("vit_tiny_patch16_224", feature_cls=kind, **sizes)
    inside = model.model if kind == "getter" else model["body"]
    x = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        expected = model.eval()(x)[0].clone()
        attach(inside, "sape2")
        torch.testing.assert_close(model(x)[0], expected)
        open_gains(inside)
        assert (model(x)[0] - expected).abs().max() > 1e-3


@ALL
@pytest.mark.usefixtures("as_users_call_it")
def test_attached_families_compile(name):
    torch._dynamo.reset()
    model, batch = opened(name, BOTH), batch_of(name)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(found(compiled, batch), found(model, batch), rtol=1e-9, atol=1e-9)


NOT_ALONE = {"timm.NaFlex", "timm.NaFlex.rope"}  # timm branches on values: not exported without an encoding either


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in {"Siglip2", *NOT_ALONE}])
@pytest.mark.usefixtures("as_users_call_it")
def test_attached_families_export(name):
    model, batch = opened(name, BOTH), batch_of(name)
    with torch.no_grad():
        program = torch.export.export(model, (), batch, strict=False)
        torch.testing.assert_close(found(program.module(), batch), found(model, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("as_users_call_it")
def test_an_export_of_several_grids_in_a_batch_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="several grids in one batch cannot be exported"):
        torch.export.export(opened("Siglip2"), (), batch_of("Siglip2"), strict=False)
