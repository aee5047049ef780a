"""A frozen model: same logits at its size, nothing of the grid left to compute, other sizes refused."""

import copy

import jaxtyping
import numpy as np
import pytest
import timm
import torch
from export_cases import EVERYTHING, largest, tiny
from host_cases import TIMM, open_gains, randomised
from torch import fx, nn

import sape2
from sape2.encodings import list_encodings
from sape2.models.frozen import Frozen, fold_constants, trace


@pytest.fixture(autouse=True, scope="module")
def _as_users_call_it():
    """Without the type checks of the tests: the sizes of a graph that is being traced are no ints."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


GRID_ARITHMETIC = {"arange", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_linear1d", "index", "cos", "sin", "exp2"}


@pytest.fixture(scope="module")
def frozen(_as_users_call_it):
    """(model, frozen) for an oblong size that is not that of training."""
    model = tiny(EVERYTHING[0])
    return model, sape2.freeze(model, (8, 20))


def operations(model: Frozen) -> list[str]:
    """Names of operations, without "aten." and the overload."""
    return [str(node.target).split(".")[1] for node in model.traced.graph.nodes if str(node.target).startswith("aten.")]


def test_logits_are_those_of_the_original_for_any_number_of_images(frozen):
    model, fixed = frozen
    for batch in (1, 3):
        images = torch.randn(batch, 3, 8, 20)
        assert largest(fixed(images) - model(images)) < 1e-4


def test_a_compiled_model_freezes():
    model, images = tiny("ape"), torch.randn(1, 3, 12, 16)
    fixed = sape2.freeze(torch.compile(model, backend="eager"), (12, 16))
    torch.testing.assert_close(fixed(images), model(images))


def test_nothing_that_depends_on_the_grid_alone_is_computed(frozen):
    assert GRID_ARITHMETIC & set(operations(frozen[1])) == set()
    assert {"gather", "sigmoid"} <= set(operations(frozen[1]))  # positions that depend on the content
    assert any(name.startswith("constant_") for name, _ in frozen[1].traced.named_buffers())


def test_the_check_for_grid_arithmetic_sees_it():
    traced = trace(tiny("rope"), torch.randn(2, 3, 8, 20))
    assert {"aten.arange.default", "aten.cos.default"} <= {str(node.target) for node in traced.graph.nodes}


def test_another_size_is_refused(frozen):
    with pytest.raises(ValueError, match=r"8x20.* 20x8"):
        frozen[1](torch.randn(1, 3, 20, 8))


def test_the_original_keeps_everything(frozen):
    model, _ = frozen
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(1, 3, 12, 12))


def test_a_frozen_model_is_read_from_the_file_it_was_saved_to(frozen, tmp_path):
    images = torch.randn(2, 3, 8, 20)
    torch.save(frozen[1], tmp_path / "frozen.pt")
    again = torch.load(tmp_path / "frozen.pt", weights_only=False)
    assert torch.equal(again(images), frozen[1](images))
    with pytest.raises(ValueError, match="frozen for images of 8x20"):
        again(torch.randn(2, 3, 8, 8))


def test_a_copy_of_a_frozen_model_is_one(frozen):
    images = torch.randn(2, 3, 8, 20)
    copied = copy.deepcopy(frozen[1]).eval()
    assert torch.allclose(copied(images), frozen[1](images), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in copied.parameters())


@pytest.mark.parametrize("size", [np.int64(8), [8, np.int64(8)]], ids=str)
def test_a_size_may_be_of_numpy_or_a_list(size):
    assert sape2.freeze(tiny("ape"), size).size == (8, 8)


def test_a_size_that_is_not_made_of_patches_is_refused():
    with pytest.raises(ValueError, match="10x20 pixels"):
        sape2.freeze(tiny("none"), (10, 20))


def test_a_model_without_patches_is_refused():
    with pytest.raises(ValueError, match="Linear"):
        sape2.freeze(nn.Linear(2, 2), 8)


def test_an_attached_host_model_freezes():
    model = randomised(
        timm.models.VisionTransformer(**TIMM | {"depth": 1, "dynamic_img_size": True, "global_pool": "avg"})
    ).eval()
    sape2.attach(model, "sape2")
    open_gains(model)
    fixed, images = sape2.freeze(model, (16, 40)), torch.randn(3, 3, 16, 40)
    assert largest(fixed(images) - model(images)) < 1e-3


class Counting(nn.Module):
    """Constants of every kind that folding meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        place = torch.arange(3.0)
        twice = place * 2  # folded
        noise = torch.rand(3)  # drawn anew in every call
        return x @ self.weight.t() + twice + (place + place) + 0 * noise


def test_folding_keeps_views_of_parameters_and_random_numbers_and_stores_equal_constants_once():
    module = torch.export.export(Counting(), (torch.ones(2, 3),)).module(check_guards=False)
    x = torch.randn(2, 3)
    before = module(x)
    fold_constants(module)
    assert torch.allclose(module(x), before)
    targets = [str(node.target) for node in module.graph.nodes]
    assert any("rand" in target for target in targets)
    assert not any("arange" in target for target in targets)
    assert [name for name, _ in module.named_buffers()] == ["constant_0"]
    assert isinstance(module, fx.GraphModule)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [*list_encodings(), "ape+sape2", "sape2:count=cyclic", "sape2:gates=constant"])
def test_every_encoding_freezes(encoding):
    model = tiny(encoding)
    fixed, images = sape2.freeze(model, (8, 20)), torch.randn(3, 3, 8, 20)
    assert largest(fixed(images) - model(images)) < 1e-4
