"""Attached models in the hands of other tools: optimisers, averages, files, traces, quantization, LoRA. Right, or told."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from export_cases import tiny
from host_cases import CASES, TIMM, TRANSFORMERS, images, make, open_gains, outputs
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import AttentionExtract, ModelEmaV3
from torch import nn
from torch.func import vmap
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

from sape2 import attach, create_model, detach, encoding_parameters, load_adapter, save_adapter
from sape2.adapters.attention import Attached
from sape2.encodings import AttentionEncoding, TokenEncoding

HOSTS = ["timm.vit.dinov2", "timm.eva.dinov3", "torchvision", "transformers.ViT.sdpa", "sape2.ape"]
SHARED = "sape2:share=true+rpe"


def opened(case, encoding="sape2", **options):
    model = attach(make(case), encoding, **options)
    open_gains(model)
    return model


# --- optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOSTS)
def test_timm_s_factory_decays_nothing_of_an_encoding(case):
    model = attach(make(case), "rpe+sape2+cope")
    theirs = {id(p) for p in encoding_parameters(model)}
    groups = [
        *create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups,
        *param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay()),
        *param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay()),
    ]
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed
    assert not theirs & decayed


@pytest.mark.parametrize("make_model", [lambda: attach(make("timm.vit.class"), "rpe+cope"), lambda: create_model(
    "vit_nano", encoding="ape+rpe+cope", image_size=16, depth=2, dim=16, num_heads=2)])  # fmt: skip
def test_names_of_a_wrapped_model_decay_no_table_either(make_model):
    peft = pytest.importorskip("peft")
    for wrap in (
        lambda model: torch.compile(model, backend="eager"),
        lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"])),
    ):
        model = make_model()
        theirs = {
            id(p) for part in model.modules() if isinstance(part, (TokenEncoding, AttentionEncoding)) for p in part.parameters()
        }
        wrapped = wrap(model).requires_grad_(True)
        groups = create_optimizer_v2(wrapped, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
        assert not theirs & {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}


def test_what_the_host_does_not_decay_stays_so_and_copies_speak_for_themselves():
    model = make("timm.vit.class")
    own = set(model.no_weight_decay())
    attach(model, "rpe")
    assert own < model.no_weight_decay()
    other = copy.deepcopy(model)
    assert detach(other).no_weight_decay() == own
    assert own < model.no_weight_decay()


# --- one name for each tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOSTS)
def test_shared_tables_have_one_name_and_load_under_any(case):
    model, x = opened(case, SHARED), images(case)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(each, x), outputs(model, x))
        assert each.state_dict().keys() == state.keys()
    by_all_names = dict(model.named_parameters(remove_duplicate=False))
    later = {name: tensor for name, tensor in by_all_names.items() if name not in state}
    assert later
    theirs = {id(tensor) for tensor in later.values()}
    under_later_names = {name: t for name, t in state.items() if id(by_all_names.get(name)) not in theirs} | later
    assert len(under_later_names) == len(state)
    for given in (state, under_later_names):
        other = attach(make(case), SHARED)
        other.load_state_dict(given)
        assert torch.equal(outputs(other, x), outputs(model, x))


@pytest.mark.parametrize("case", ["transformers.ViT.sdpa", "timm.vit.class"])
def test_a_part_of_a_model_has_one_name_for_each_too(case, tmp_path):
    model = opened(case, SHARED)
    tower = model.vit if case.startswith("transformers") else model.blocks
    state = tower.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    other = attach(make(case), SHARED)
    (other.vit if case.startswith("transformers") else other.blocks).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(encoding_parameters(model), encoding_parameters(other), strict=True))
    if case.startswith("transformers"):
        tower.save_pretrained(tmp_path)  # refuses a tensor of two names
        assert (tmp_path / "model.safetensors").exists()
    assert tower.state_dict().keys() == state.keys()
    hooks = [part._state_dict_hooks for part in detach(model).modules()]
    assert not any(hooks)


@pytest.mark.parametrize("make_model", [lambda: opened("timm.vit.class", SHARED), lambda: create_model(
    "vit_nano", encoding=SHARED, image_size=16, depth=3, dim=16, num_heads=2)])  # fmt: skip
def test_a_moving_average_moves_a_shared_table_once(make_model):
    model = make_model()
    average = ModelEmaV3(model, decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(model)
    for name, found in average.module.named_parameters():
        torch.testing.assert_close(found, before[name] + 0.5)


@pytest.mark.parametrize("encoding", ["rpe:share=true", SHARED, "cope:share=true"])
def test_save_pretrained_and_the_way_back(encoding, tmp_path, caplog):
    model, x = opened("transformers.ViT.sdpa", encoding).float(), images("transformers").float()
    expected = outputs(model, x)
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path)
    logger = __import__("logging").getLogger("transformers")
    logger.addHandler(caplog.handler)
    loaded = type(model).from_pretrained(tmp_path).eval()
    logger.removeHandler(caplog.handler)
    assert "sape2" in caplog.text  # transformers says itself which keys it leaves out
    assert "UNEXPECTED" in caplog.text
    assert not torch.allclose(outputs(loaded, x), expected, atol=1e-4)
    torch.testing.assert_close(outputs(load_adapter(loaded, tmp_path), x), expected)


def test_our_own_vit_is_not_saved_with_what_its_config_does_not_say(tmp_path):
    model, x = opened("sape2.ape", "rpe").float(), images("sape2").float()
    expected = outputs(model, x)
    with pytest.raises(ValueError, match="attached, 'rpe'"):
        model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path)
    detach(model).save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(load_adapter(type(model).from_pretrained(tmp_path), tmp_path), x), expected)


def test_an_adapter_does_not_load_over_another(tmp_path):
    model = opened("timm.vit.class", "rpe")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="'rpe' attached"):
        load_adapter(model, tmp_path)


# --- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["no_effect", "as_is"])
def test_a_feature_extractor_of_torchvision_sees_the_encoding(start):
    model, x = make("torchvision").float(), images("torchvision").float()
    attach(model, "sape2", start=start)
    if start == "as_is":
        open_gains(model)
    seen = []
    model.encoder.layers.encoder_layer_1.mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    extractor = create_feature_extractor(
        model, ["encoder.layers.encoder_layer_1.mlp", "encoder.layers.encoder_layer_0.self_attention"]
    )
    torch.testing.assert_close(extractor(x)["encoder.layers.encoder_layer_1.mlp"], seen[0])


def test_a_symbolic_trace_of_timm_s_vit_computes_the_same():
    model = timm.models.VisionTransformer(**TIMM).eval()
    attach(model, "sape2")
    open_gains(model)
    graph = torch.fx.GraphModule(model, Leaves().trace(model))
    assert sum(isinstance(module, Attached) for module in graph.modules()) == 2
    x = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("encoding", ["ape+sape2", "sincos+cpe+rope", "none"])
@pytest.mark.parametrize(
    "options", [{"pool": "class", "num_registers": 2}, {"gradient_checkpointing": True, "layer_scale": 0.1}]
)
def test_a_feature_extractor_reads_our_own_vit(encoding, options):
    model = create_model(
        "vit_nano", encoding=encoding, image_size=(8, 12), patch_size=4, depth=2, dim=16, num_heads=2, **options
    )
    x, seen = torch.randn(2, 3, 8, 12), []
    handle = model.eval().blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    assert torch.equal(create_feature_extractor(model, ["blocks.0"])(x)["blocks.0"], seen[0])
    open_gains(attach(model, "rpe"))
    assert torch.equal(create_feature_extractor(model, ["head"])(x)["head"], model(x))


@pytest.mark.parametrize("case", ["timm.vit.class", "timm.eva.dinov3"])
def test_attention_maps_of_timm_are_read_from_its_dropout(case):
    """`fused_attn` is the host's own choice; where it is off, hooks on `attn_drop` see the weights."""
    model, x = opened(case, "rpe"), images(case)
    fused = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(model, method="hook")(x)
    assert [each.sum(-1).allclose(torch.ones((), dtype=each.dtype)) for each in maps.values()] == [True, True]
    torch.testing.assert_close(model(x), fused)
    weights = next(iter(maps.values()))
    detach(model)
    assert not torch.allclose(next(iter(AttentionExtract(model, method="hook")(x).values())), weights, atol=1e-4)


class Leaves(torch.fx.Tracer):
    """Patches are made under checks of their size, which no symbolic trace passes."""

    def is_leaf_module(self, module, name):
        return super().is_leaf_module(module, name) or isinstance(module, timm.layers.PatchEmbed)


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "torchvision", "sape2.ape"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_users_call_it")
def test_a_jit_trace_computes_the_same_on_other_images(case):
    model, x = opened(case, "sape2+rpe"), images(case)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), model(other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["timm.vit.dynamic", "timm.eva.dinov3", "transformers.Dinov2.sdpa", "sape2.rope"])
@pytest.mark.parametrize("size", [(8, 96), (32, 24), (16, 16)])
@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_refuses_images_of_another_size(case, size):
    """It has the grid as numbers, and positions of one grid on another would be wrong without a word."""
    model, x = opened(case), images(case)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False, strict=False)
        with pytest.raises(RuntimeError, match="sum exactly"):
            traced(torch.randn(*x.shape[:2], *size, dtype=x.dtype))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("transformers")])
@pytest.mark.usefixtures("as_users_call_it")
def test_attached_models_of_transformers_export(case):
    """There the host makes a mask that keeps all, and none in an ordinary call."""
    model, x = opened(case), images(case)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    other = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    torch.testing.assert_close(program.module()(other).logits, model(other).logits)


@pytest.mark.usefixtures("as_users_call_it")
def test_a_padding_mask_exports_too():
    model, x = opened("transformers.ViT.sdpa"), images("transformers")
    mask = torch.ones(2, 10, dtype=torch.bool)
    program = torch.export.export(model, (x,), {"attention_mask": mask}, strict=False)
    mask[:, 7:] = False
    torch.testing.assert_close(program.module()(x, attention_mask=mask).logits, model(x, attention_mask=mask).logits)


@pytest.mark.parametrize("case", ["timm.vit.class", "torchvision", "transformers.ViT.sdpa", "sape2.ape"])
@pytest.mark.filterwarnings("ignore")
def test_a_script_is_refused_with_what_does_the_same(case):
    with pytest.raises(ValueError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(attach(make(case), "sape2"))


@pytest.mark.filterwarnings("ignore")
def test_a_script_of_our_own_vit_is_refused_so_too():
    with pytest.raises(ValueError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(make("sape2.ape"))


@pytest.mark.parametrize("case", HOSTS)
@pytest.mark.usefixtures("as_users_call_it")
def test_hosts_compile_with_and_without_gradients(case):
    torch._dynamo.reset()
    model, x = opened(case), images(case)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(outputs(compiled, x), outputs(model, x), rtol=1e-6, atol=1e-6)
    model.requires_grad_(False)
    torch.testing.assert_close(outputs(compiled, x), outputs(model, x), rtol=1e-6, atol=1e-6)


# --- what would have no effect, or no values --------------------------------------------------------------------------


@pytest.mark.parametrize("patch", ["accelerate", "by hand"])
def test_a_forward_on_the_module_itself_is_told_since_it_hides_that_of_the_class(patch):
    model = make("timm.vit.class")
    attention = model.blocks[1].attn
    if patch == "accelerate":
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(attention, hooks.ModelHook())
    else:
        attention.forward = attention.forward
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has a forward of its own"):
        attach(model, "sape2")
    assert list(model.state_dict()) == before
    del attention.forward
    detach(attach(model, "sape2"))


@pytest.mark.parametrize("case", HOSTS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_that_accelerate_keeps_elsewhere_are_there_when_an_encoding_needs_them(case, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = opened(case, "sape2+log_cpb"), images(case)
    with torch.no_grad():
        expected = outputs(model, x)
        if place == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in encoding_parameters(model))
        torch.testing.assert_close(outputs(model, x), expected)
    assert all(parameter.is_meta for parameter in encoding_parameters(model))


@pytest.mark.parametrize("encoding", ["rpe", "sape2", "rope_mixed", "forget", "log_cpb"])
@pytest.mark.parametrize("is_attached", [False, True])
def test_a_pruned_encoding_learns_and_is_what_a_file_says(is_attached, encoding):
    def pruned():
        model = attach(make("timm.vit.avg"), encoding, start="as_is") if is_attached else make(f"sape2.{encoding}")
        parts = [part for each in model.modules() if isinstance(each, AttentionEncoding) for part in each.modules()]
        tensors = [(part, name) for part in dict.fromkeys(parts) for name, _ in part.named_parameters(recurse=False)]
        prune.global_unstructured(tensors, prune.RandomUnstructured, amount=0.5)
        return model

    model, other, x = pruned(), pruned(), images("timm.vit.avg")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


def test_an_encoding_is_not_put_where_it_would_have_no_values():
    with torch.device("meta"):
        model = timm.models.VisionTransformer(**TIMM)
    with pytest.raises(ValueError, match=r"meta device.*after from_pretrained"):
        attach(model, "sape2")
    assert not hasattr(model, "sape2_attachment")


def test_a_class_that_another_tool_changed_is_told_before_anything_is_detached():
    model, x = opened("torchvision"), images("torchvision")
    attention = model.encoder.layers[1].self_attention
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Identity())
    expected = outputs(model, x)
    with pytest.raises(ValueError, match=r"MultiheadAttention was changed again, to Parametrized.*take that off before detach"):
        detach(model)
    assert torch.equal(outputs(model, x), expected)
    nn.utils.parametrize.remove_parametrizations(attention, "in_proj_weight")
    assert type(detach(model).encoder.layers[1].self_attention) is nn.MultiheadAttention


@pytest.mark.parametrize("case", HOSTS)
def test_a_model_mapped_over_images_by_torch_func_gives_what_they_get_together(case):
    model, x = opened(case, "sape2+rpe").float(), images(case).float()  # in float64 no fused kernel is taken
    learned = list(encoding_parameters(model))
    mapped, together = vmap(lambda image: outputs(model, image[None])[0])(x), outputs(model, x)
    torch.testing.assert_close(mapped, together, rtol=1e-3, atol=1e-3)
    for found, expected in zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (mapped, together)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_something_attached_to_a_part_or_around_it_is_told():
    model = make("transformers.ViT.sdpa")
    attach(model.vit, "rpe")
    with pytest.raises(ValueError, match="to a part of this model"):
        attach(model, "sape2")
    detach(model.vit)
    attach(model, "rpe")
    with pytest.raises(ValueError, match="to one around it"):
        attach(model.vit, "sape2")


def test_a_replica_of_our_own_attention_joins_its_own_parts():
    """As `nn.DataParallel` makes replicas: with what the module keeps, and other parts in the place of its own."""
    model = opened("sape2.ape", "rpe")
    model(images("sape2.ape"))
    attention = model.blocks[0].attn
    replica = attention._replicate_for_data_parallel()
    for name in ("encoding", "sape2"):
        replica._modules[name] = getattr(attention, name)._replicate_for_data_parallel()
    both = replica.both()
    assert both._is_replica
    assert all(not any(part is own for own in attention.both().parts) for part in both.parts)
    assert attention.both() is attention.both()


# --- quantized hosts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm.vit.class", "timm.eva.eva02", "transformers.ViT.sdpa", "torchvision"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_host_of_quantized_layers_takes_an_encoding(case):
    model, x = make(case).float(), images(case).float()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected = outputs(model, x)
    attach(model, "sape2")
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-3, atol=1e-3)
    assert {p.dtype for p in encoding_parameters(model)} == {torch.float32}
    open_gains(model)
    assert (outputs(model, x) - expected).abs().max() > 1e-3
    assert torch.equal(outputs(detach(model), x), expected)


@pytest.mark.parametrize("encoding", ["sape2", "fire+log_cpb", "rpe_contextual+forget"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantizing_after_attach_leaves_the_encoding_as_it_is(encoding):
    model, x = opened("timm.vit.class", encoding).float(), images("timm").float()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert [type(part) for part in quantized.blocks[0].attn.sape2.modules()] == [
        type(part) for part in model.blocks[0].attn.sape2.modules()
    ]
    open_gains(model, std=0.0)
    without = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (outputs(quantized, x) - outputs(without, x)).abs().max() > 1e-3


class Whole(nn.Linear):
    """A linear layer as packages of quantization have them: weights of whole numbers and a scale."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.scale = layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_weights_of_whole_numbers_leave_the_tables_in_float32():
    model, x = make("transformers.ViT.sdpa").float(), images("transformers").float()
    for layer in model.vit.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.attention, name, Whole(getattr(layer.attention, name)))
    expected = outputs(model, x)
    attach(model, "sape2", trainable="encoding")
    assert {p.dtype for p in encoding_parameters(model)} == {torch.float32}
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-4)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], **options))


def fit(model, x):
    """What moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        outputs(model.train(), x).square().sum().backward()
        optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_lora_in_the_network_of_an_encoding_takes_part():
    peft = pytest.importorskip("peft")
    model = tiny("fire")
    x = torch.randn(1, 3, 16, 16)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    with_it = tuned(x)
    with tuned.disable_adapter():
        assert not torch.allclose(tuned(x), with_it, atol=1e-6)
    torch.testing.assert_close(tuned.merge_and_unload()(x), with_it)


WITH_LORA = ["timm.vit.class", "timm.eva.dinov3", *(f"transformers.{name}.sdpa" for name in TRANSFORMERS)]


@pytest.mark.parametrize("case", WITH_LORA)
@pytest.mark.parametrize("order", ["lora first", "attach first"])
def test_lora_and_an_encoding_learn_together_and_come_apart(case, order, tmp_path):
    host, x = make(case), images(case)
    if order == "lora first":
        both = lora(host)
        attach(host, "sape2")
    else:
        both = lora(attach(host, "sape2"))
        for parameter in encoding_parameters(host):
            parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moved = fit(both, x)
        save_adapter(host, tmp_path)
    assert any("lora_" in name for name in moved)
    assert any(".sape2." in name for name in moved)
    assert all("lora_" in name or ".sape2." in name for name in moved)
    expected = outputs(both.eval(), x)
    merged = both.merge_and_unload()
    torch.testing.assert_close(outputs(merged, x), expected)
    detach(merged)
    torch.testing.assert_close(outputs(load_adapter(merged, tmp_path), x), expected, rtol=1e-5, atol=1e-5)


def test_an_encoding_that_lora_froze_is_told_once_in_training_and_when_saved(tmp_path):
    host, x = make("transformers.ViT.sdpa"), images("transformers")
    both = lora(attach(host, "sape2", trainable="encoding"))
    outputs(both.eval(), x)
    with pytest.warns(UserWarning, match=r"'sape2' .*get_peft_model"):
        moved = fit(both, x)
    assert not any(".sape2." in name for name in moved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs(both.train(), x)
    with pytest.warns(UserWarning, match="attached 'sape2'"):
        save_adapter(host, tmp_path)


@pytest.mark.parametrize(("encoding", "start"), [("none", "no_effect"), ("alibi", "as_is"), ("rope", "as_is")])
def test_an_encoding_without_parameters_is_not_taken_for_a_frozen_one(encoding, start, tmp_path):
    model, x = attach(make("timm.vit.avg"), encoding, start=start), images("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs(model.train(), x).sum().backward()
        save_adapter(model, tmp_path)
    again = load_adapter(make("timm.vit.avg"), tmp_path)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again.eval(), x), outputs(model.eval(), x))


@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        ("sape2", {"modules_to_save": ["sape2"]}),
        ("sape2", {"modules_to_save": ["inner"]}),
        ("rpe_contextual+cope", {"modules_to_save": ["parts.0"]}),
        ("rpe", {"target_parameters": ["inner.table"]}),
    ],
)
def test_an_encoding_that_peft_wraps_whole_or_in_part_is_refused(encoding, options, tmp_path):
    host, x = make("transformers.ViT.sdpa"), images("transformers")
    both = lora(attach(host, encoding), **options)
    for act in (lambda: outputs(both, x), lambda: save_adapter(host, tmp_path)):
        with pytest.raises(ValueError, match="get_peft_model"):
            act()
    detach(both.unload())


def adapted(model, kind):
    """The model under an adapter of peft."""
    peft = pytest.importorskip("peft")
    target = {"target_modules": ["q_proj", "v_proj"]}
    configs = {
        "LoRA": lambda: peft.LoraConfig(r=2, **target),
        "LoRA and classifier": lambda: peft.LoraConfig(r=2, modules_to_save=["classifier"], **target),
        "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, **target),
        "IA3": lambda: peft.IA3Config(feedforward_modules=[], **target),
    }
    return peft.get_peft_model(model, configs[kind]())


KINDS = ["LoRA", "LoRA and classifier", "DoRA", "IA3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["adapter first", "attach first"])
def test_an_adapter_of_peft_is_read_back_onto_a_host_with_an_encoding(kind, order, tmp_path):
    """peft's own file holds its adapter, `save_adapter` the encoding; both go onto a fresh host in either order, and merge."""
    peft = pytest.importorskip("peft")
    host, x = make("transformers.ViT.sdpa"), images("transformers")
    if order == "adapter first":
        both = adapted(host, kind)
        attach(host, "sape2")
    else:
        both = adapted(attach(host, "sape2"), kind)
        for parameter in encoding_parameters(host):
            parameter.requires_grad_(True)
    open_gains(host, std=0.3)
    moved = fit(both, x)
    assert {".sape2." in name for name in moved} == {True, False}
    assert any("classifier" in name for name in moved) == (kind == "LoRA and classifier")
    expected = outputs(both.eval(), x)
    both.save_pretrained(tmp_path / "peft")
    save_adapter(host, tmp_path / "sape2")

    again = make("transformers.ViT.sdpa")
    if order == "adapter first":
        read = peft.PeftModel.from_pretrained(again, tmp_path / "peft")
        load_adapter(again, tmp_path / "sape2")
    else:
        read = peft.PeftModel.from_pretrained(load_adapter(again, tmp_path / "sape2"), tmp_path / "peft")
    torch.testing.assert_close(outputs(read.eval(), x), expected, rtol=1e-5, atol=1e-5)
    merged = read.merge_and_unload()
    torch.testing.assert_close(outputs(merged, x), expected, rtol=1e-5, atol=1e-5)
    assert not any(".sape2." in name for name in detach(merged).state_dict())


@pytest.mark.parametrize(
    ("target", "attach_first"),
    [(["self_attention"], False), (["mlp.0", "mlp.3"], False), (["mlp.0", "mlp.3"], True)],
    ids=["attention", "mlp, lora first", "mlp, attach first"],
)
@pytest.mark.filterwarnings("ignore")
def test_lora_and_an_encoding_learn_together_in_torchvision(target, attach_first, tmp_path):
    """The attention there is one `nn.MultiheadAttention`, which peft wraps whole, so LoRA in it comes before `attach`."""
    peft = pytest.importorskip("peft")
    host, x = make("torchvision"), images("torchvision")
    plain = outputs(host, x)
    wrap = lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target))  # noqa: E731
    both = wrap(attach(host, "sape2")) if attach_first else wrap(host)
    if not attach_first:
        attach(host, "sape2")
    torch.testing.assert_close(outputs(both.eval(), x), plain)
    for parameter in encoding_parameters(host):
        parameter.requires_grad_(True)
    moved = fit(both, x)
    assert {kind for kind in ("lora_", ".sape2.") if any(kind in name for name in moved)} == {"lora_", ".sape2."}
    others = [name for name in moved if "lora_" not in name and ".sape2." not in name]
    assert all("self_attention" in name for name in others)  # to these peft adds LoRA in a call and takes it off, with rounding
    expected = outputs(both.eval(), x)
    save_adapter(host, tmp_path)
    merged = both.merge_and_unload()
    torch.testing.assert_close(outputs(merged, x), expected)
    torch.testing.assert_close(outputs(load_adapter(detach(merged), tmp_path), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", HOSTS)
@pytest.mark.parametrize("attach_first", [True, False])
def test_lora_in_the_patch_projection_comes_before_or_after(attach_first, case):
    peft = pytest.importorskip("peft")
    host, x = make(case), images(case)
    plain = outputs(host, x)
    name = next(name for name, part in host.named_modules() if isinstance(part, nn.Conv2d))
    if attach_first:
        attach(host)
    both = peft.get_peft_model(host, peft.LoraConfig(target_modules=[name]))
    if not attach_first:
        attach(host)
    torch.testing.assert_close(outputs(both.eval(), x), plain)
    torch.testing.assert_close(outputs(both.merge_and_unload(), x), plain)


def test_lora_around_an_attached_multihead_attention_is_refused_by_peft():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        peft.get_peft_model(attach(make("torchvision"), "sape2"), peft.LoraConfig(r=2, target_modules=["self_attention"]))
