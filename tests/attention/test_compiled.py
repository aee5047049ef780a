"""torch.compile: whole graphs of every encoding, with gradients on, off and of frozen weights, at sizes that change.

`eager` and `aot_eager` trace as the default back end does and make no machine code, so they are quick; the default is slow.
"""

import contextlib

import pytest
import torch
from encoding_cases import HEAD_DIM, HEADS, VARIANTS, randomised
from export_cases import EVERYTHING, tiny
from torch import nn

from sape2 import create_model
from sape2.attention import attend
from sape2.encodings import AttentionEncoding, create_encoding, list_encodings

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(autouse=True)
def _as_users_call_it(as_users_call_it):
    torch._dynamo.reset()


OTHERS = [*(name for name in VARIANTS if name not in list_encodings()), "cope:beyond=rescale", "sape2:beyond=rescale"]


class Layer(nn.Module):
    """What a model does with an encoding, and nothing else."""

    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, x, grid):
        if not isinstance(self.encoding, AttentionEncoding):
            return self.encoding(x, grid)
        q, k, v = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).expand(3, -1, -1, -1, -1)
        return attend(q, k, v, grid, self.encoding, tokens=x)


def gradients(call, module, x, *more):
    """The output, and the gradients of the input and of what learns."""
    x = x.clone().requires_grad_()
    output = call(x, *more)
    wanted = {"input": x} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.square().sum(), list(wanted.values()), allow_unused=True)
    return {"output": output.detach()} | dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", [*list_encodings(), *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_encoding_is_one_graph_with_the_same_values_and_gradients(name):
    layer = Layer(randomised(create_encoding(name, HEADS, HEAD_DIM, (3, 4))).requires_grad_()).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 12, HEADS * HEAD_DIM, dtype=torch.float64)
    torch.testing.assert_close(gradients(compiled, layer, x, (3, 4)), gradients(layer, layer, x, (3, 4)))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_the_default_compiles_without_gradients_and_frozen(mode):
    model = tiny("sape2").requires_grad_(mode != "frozen")
    images = torch.randn(2, 3, 12, 16)
    with MODES.get(mode, contextlib.nullcontext)():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", EVERYTHING)
def test_models_compile_in_every_mode_at_every_size(encoding):
    model = tiny(encoding).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((12, 16), (8, 20), (4, 12), (12, 4)):
        images = torch.randn(2, 3, *size).double()
        torch.testing.assert_close(gradients(compiled, model, images), gradients(model, model, images))
    for mode in MODES.values():
        with mode():
            torch.testing.assert_close(compiled(images), model(images))


def test_distances_of_zero_have_no_gradient_when_compiled_either():
    """All patches alike: every distance is 0, where a root has no derivative."""
    layer = Layer(randomised(create_encoding("sape2", HEADS, HEAD_DIM, (3, 4)))).eval()
    x = torch.ones(1, 12, HEADS * HEAD_DIM, dtype=torch.float64)
    found = gradients(torch.compile(layer, backend="aot_eager"), layer, x, (3, 4))
    assert all(value is None or value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found, gradients(layer, layer, x, (3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_machine_code_agrees(mode):
    model = create_model("vit_nano", encoding="sape2", image_size=16, patch_size=4, depth=1, dim=24, num_heads=2)
    compiled = torch.compile(model)
    for train in (False, True):
        model.train(train)
        with MODES[mode]():
            for size in ((16, 16), (24, 16), (4, 12)):
                images = torch.randn(2, 3, *size)
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-3)
