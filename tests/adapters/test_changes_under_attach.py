"""What may change under an attached model: threads, calls inside calls, copies, replaced parts. Right, or refused."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from host_cases import images, make, open_gains, outputs
from torch import nn

from sape2 import attach, attach_attention, detach, load_adapter, save_adapter, set_grid

WIDE, SQUARE = (16, 64), (32, 32)  # grids of 2x8 and 4x4: equally many patches


def opened(case="timm.vit.dinov2"):
    model = attach(make(case), "rpe")
    open_gains(model)
    return model


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(20)
    return found[0]


def test_a_call_of_another_thread_in_between_changes_nothing():
    model, wide, square = opened(), *(torch.randn(1, 3, *size).double() for size in (WIDE, SQUARE))
    with torch.no_grad():
        expected, others = model(wide), []

        def call(*_):
            if not others:
                others.append(None)
                others.append(in_thread(lambda: model(square)).detach())

        hook = model.blocks[0].register_forward_pre_hook(call)
        assert torch.equal(model(wide), expected)
        hook.remove()
        torch.testing.assert_close(others[1], model(square))


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "transformers.Dinov2.sdpa"])
def test_a_model_called_inside_a_hook_of_itself_goes_on_with_its_own_grid(case):
    model, wide, square = opened(case), *(torch.randn(1, 3, *size).double() for size in (WIDE, SQUARE))
    first = next(module for module in model.modules() if hasattr(module, "sape2_tokens"))
    with torch.no_grad():
        expected, calls = outputs(model, wide), []
        first.register_forward_hook(lambda *_: None if calls else (calls.append(1), outputs(model, square), None)[-1])
        assert torch.equal(outputs(model, wide), expected)
    assert calls


def test_an_inner_call_that_fails_leaves_the_outer_one_its_grid():
    model, wide = opened(), torch.randn(1, 3, *WIDE).double()
    with torch.no_grad():
        expected, calls = model(wide), []

        def fail(*_):
            if not calls:
                calls.append(1)
                with pytest.raises(AssertionError):
                    model(torch.randn(1, 3, 32, 33).double())

        model.blocks[0].register_forward_hook(fail)
        assert torch.equal(model(wide), expected)


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "timm.eva.dinov3", "transformers.ViT.sdpa", "torchvision"])
def test_a_projection_replaced_after_attach_is_refused_not_guessed(case):
    model, x = opened(case), images(case)
    outputs(model, x)
    owner, name = next(
        (module, name) for module in model.modules() for name, part in module.named_children() if isinstance(part, nn.Conv2d)
    )
    setattr(owner, name, nn.Conv2d(3, 16, 8, 8).double())
    with pytest.raises(ValueError, match="projection was replaced"):
        outputs(model, x)
    attach(detach(model), "rpe")
    outputs(model, x)


def test_checkpointing_in_a_thread_of_its_own_finds_the_grid_or_refuses():
    model = opened().train()
    wide, square = (torch.randn(1, 3, *size).double() for size in (WIDE, SQUARE))
    expected = torch.autograd.grad(model(wide).sum(), model.head.weight)
    model.set_grad_checkpointing()
    loss = in_thread(lambda: model(wide).sum())  # and backward in this one
    found = torch.autograd.grad(loss, model.head.weight)
    torch.testing.assert_close(found, expected)
    losses = in_thread(lambda: model(square).sum()), model(wide).sum()
    with pytest.raises(ValueError, match="one of the grids"):
        losses[0].backward()


@pytest.mark.parametrize("train", [True, False])
def test_what_is_remembered_for_checkpointing_does_not_grow_with_the_steps(train):
    model = opened("timm.vit.dynamic").train()  # patches are dropped, so every call has a layout of its own
    for _ in range(5):
        loss = model(torch.randn(1, 3, *WIDE).double()).sum()
        if train:
            loss.backward()
    assert sum(len(seen) for seen in model.sape2_attachment.tokens.seen.values()) <= 4


@pytest.mark.parametrize("case", ["timm.vit.dinov2", "torchvision", "sape2.ape"])
def test_a_block_in_several_layers_has_one_encoding_and_comes_apart(case, tmp_path):
    def tied():
        model = make(case)
        blocks = model.encoder.layers if case == "torchvision" else model.blocks
        blocks[1] = blocks[0]
        return model

    x = images(case)
    model = attach(tied(), "rpe")
    open_gains(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(load_adapter(tied(), tmp_path), x), outputs(model, x))
    assert torch.equal(outputs(detach(model), x), outputs(tied(), x))


def test_copies_made_within_a_call_start_afresh():
    model, wide, square = opened(), *(torch.randn(1, 3, *size).double() for size in (WIDE, SQUARE))
    with torch.no_grad():
        expected, copies = (model(wide), model(square)), []
        hook = model.blocks[0].register_forward_hook(
            lambda *_: copies or copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model.blocks[0].attn))])
        )
        model(wide)
        hook.remove()
        copies[0].blocks[0]._forward_hooks.clear()
        assert torch.equal(copies[0](square), expected[1])
        assert copies[1].sape2_tokens.layout is None
        assert torch.equal(model(wide), expected[0])


def test_two_towers_and_functional_calls_keep_their_own_grids():
    one, two = opened(), opened()
    wide, square = (torch.randn(1, 3, *size).double() for size in (WIDE, SQUARE))
    expected = one(wide)
    one.blocks[0].register_forward_hook(lambda *_: (two(square), None)[1])
    assert torch.equal(one(wide), expected)
    state = {name: value.detach() for name, value in two.state_dict().items()}
    other = opened()
    open_gains(other)
    torch.testing.assert_close(torch.func.functional_call(other, state, (wide,)), two(wide))


def test_threads_set_the_grid_of_a_plain_attention_each_for_itself():
    attention = attach_attention(nn.MultiheadAttention(16, 2, batch_first=True), "rpe", grid=(4, 4)).eval()
    open_gains(attention)
    x = torch.randn(1, 16, 16)

    def call(grid):
        set_grid(attention, grid)
        return attention(x, x, x)[0]

    set_grid(attention, (4, 4))
    square = attention(x, x, x)[0]
    wide = in_thread(lambda: call((2, 8)))
    assert torch.equal(attention(x, x, x)[0], square)
    assert not torch.allclose(wide, square)
    assert torch.equal(wide, call((2, 8)))


@pytest.mark.slow
def test_a_hook_after_compile_and_a_wrapped_model_run_as_before():
    model, x = opened(), torch.randn(1, 3, *WIDE).double()
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    compiled.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(compiled(x), expected * 2)
    torch.testing.assert_close(nn.DataParallel(model)(x), expected)
    assert timm.models.VisionTransformer in type(model).__mro__
