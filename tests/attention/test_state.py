"""What a call of attention leaves behind, and what may change around it, must not change a result without a word."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sape2 import create_encoding
from sape2.attention import attend, choose_path, module, paths
from sape2.attention.kernels import blocks, workspace
from sape2.evaluation.base import _resampled_counts
from sape2.studies.probes.profile import is_trained

GRID = (2, 3)
NAMES = ["sape2:sign=learned,gate_scale=learned", "rope+sape2", "rpe+cope", "sape2:readout=squared_distance"]


@pytest.fixture(autouse=True)
def _own_buffers(monkeypatch):
    monkeypatch.setattr(blocks, "WORKSPACE", workspace.Workspace())


def made(name="sape2", num_prefix=1):
    encoding = create_encoding(name, num_heads=2, head_dim=4, grid=GRID).double()
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, std=0.5)
    return encoding, [t.requires_grad_() for t in torch.randn(3, 1, 2, num_prefix + 6, 4, dtype=torch.float64)]


@pytest.mark.parametrize("keep", [True, False])
def test_attention_trains_after_inference_mode_and_after_fake_tensors(keep, monkeypatch):
    monkeypatch.setattr(paths, "KEPT_ELEMENTS", 2**25 if keep else 0)
    encoding, qkv = made()
    with torch.inference_mode():
        expected = attend(*qkv, GRID, encoding)
    with FakeTensorMode(allow_non_fake_inputs=True):
        attend(*qkv, GRID, encoding.eval())  # in training it would look at its tables
    output = attend(*qkv, GRID, encoding)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert encoding.table_x.grad.any()
    assert all(type(buffer) is torch.Tensor and not buffer.is_inference() for buffer in blocks.WORKSPACE.buffers.values())


@pytest.mark.parametrize("cached", [lambda: _resampled_counts(3, 2, 0), lambda: is_trained(2)])
def test_no_other_cache_keeps_tensors_of_inference_mode(cached):
    _resampled_counts.cache_clear()
    is_trained.cache_clear()
    with torch.inference_mode():
        assert not cached().is_inference()


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right(name):
    encoding, qkv = made(name)

    def call(*tensors):
        return attend(*tensors[:3], GRID, encoding)

    tensors = (*qkv, *encoding.parameters())
    assert choose_path(qkv[0], encoding) == "blocks"
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_many_gradients_at_once_are_those_of_one_after_another(name):
    """`is_grads_batched`, which `torch.autograd.functional.jacobian(vectorize=True)` uses."""
    encoding, qkv = made(name)
    output, inputs = attend(*qkv, GRID, encoding), [*qkv, *encoding.parameters()]
    directions = torch.randn(3, *output.shape, dtype=output.dtype)
    at_once = torch.autograd.grad(output, inputs, directions, is_grads_batched=True, retain_graph=True)
    for index, direction in enumerate(directions):
        alone = torch.autograd.grad(output, inputs, direction, retain_graph=True)
        for gradients, expected in zip(at_once, alone, strict=True):
            torch.testing.assert_close(gradients[index], expected, rtol=1e-8, atol=1e-10)


def test_a_gradient_with_a_graph_equals_one_without_also_where_inputs_hang_together():
    """q is made of the table, as it is in every layer but the first where layers share a table."""
    encoding, (q, k, v) = made()
    found = []
    for create_graph in (False, True):
        output = attend(q * encoding.table_x.sum(), k, v, GRID, encoding).sin().sum()
        found.append(torch.autograd.grad(output, [q, k, v, *encoding.parameters()], create_graph=create_graph))
    torch.testing.assert_close(found[1], found[0])


def test_a_gradient_penalty_is_that_of_the_products(monkeypatch):
    encoding, qkv = made()
    found = []
    for path in ("products", "blocks"):
        monkeypatch.setattr(module, "choose_path", lambda *_, path=path: path)
        (slope,) = torch.autograd.grad(attend(*qkv, GRID, encoding).sin().sum(), qkv[0], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [*qkv, *encoding.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_a_hook_of_a_parameter_meets_its_gradient_once():
    encoding, qkv = made()
    (expected,) = torch.autograd.grad(attend(*qkv, GRID, encoding).sin().sum(), encoding.table_x)
    encoding.table_x.register_hook(lambda grad: grad / 2)
    (found,) = torch.autograd.grad(attend(*qkv, GRID, encoding).sin().sum(), encoding.table_x)
    torch.testing.assert_close(found, expected / 2)


class Call(nn.Module):
    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, *qkv):
        return attend(*qkv, GRID, self.encoding)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("keep", [True, False])
def test_the_backward_pass_uses_the_parameters_of_a_functional_call(keep, create_graph, monkeypatch):
    monkeypatch.setattr(paths, "KEPT_ELEMENTS", 2**25 if keep else 0)
    encoding, qkv = made()
    other = copy.deepcopy(encoding)
    nn.init.normal_(other.table_x)
    expected = torch.autograd.grad(attend(*qkv, GRID, other).sin().sum(), [qkv[0], *other.parameters()])
    given = {f"encoding.{name}": 1.0 * p for name, p in other.named_parameters()}
    output = torch.func.functional_call(Call(encoding), given, tuple(qkv)).sin().sum()
    found = torch.autograd.grad(output, [qkv[0], *other.parameters()], create_graph=create_graph)
    torch.testing.assert_close(found, expected)


def test_a_parameter_changed_before_the_backward_pass_is_an_error(monkeypatch):
    monkeypatch.setattr(paths, "KEPT_ELEMENTS", 0)
    encoding, qkv = made()
    output = attend(*qkv, GRID, encoding).sum()
    with torch.no_grad():
        encoding.table_x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_replica_of_data_parallel_has_the_gradients_of_its_tables():
    encoding, qkv = made()
    expected = torch.autograd.grad(attend(*qkv, GRID, encoding).sin().sum(), list(encoding.parameters()))
    replica = encoding._replicate_for_data_parallel()
    for name, parameter in encoding.named_parameters():
        setattr(replica, name, parameter * 1.0)  # as `nn.parallel.replicate` does: no parameter of the replica any more
    found = torch.autograd.grad(attend(*qkv, GRID, replica).sin().sum(), list(encoding.parameters()))
    torch.testing.assert_close(found, expected)
