"""What a step would take is predicted without memory, close to what the allocator gives."""

import pytest
import torch
from memory import loss_gradients
from predicted_memory import predicted_peak
from torch import nn

from sape2 import create_encoding, create_model
from sape2.attention import module as attention
from sape2.evaluation.cost.measure import forward_backward
from sape2.evaluation.cost.memory import peak_bytes
from sape2.evaluation.cost.subjects import EncodedAttention


@pytest.mark.parametrize("name", ["none", "rpe_decomposed", "rope", "cope", "sape2", "sape2:readout=squared_distance"])
def test_prediction_is_close_to_the_allocator(name, monkeypatch):
    monkeypatch.setattr(attention, "choose_path", lambda *_: "products")  # what runs without memory
    grid = (12, 12)
    module = EncodedAttention(create_encoding(name, 4, 32, grid), grid)
    inputs = [torch.randn(2, 4, 144, 32, requires_grad=index < 3) for index in range(4)]
    measured = peak_bytes(lambda: forward_backward(module.train(), inputs))
    assert 0.75 * measured < predicted_peak(forward_backward, module, inputs) <= 1.05 * measured


def test_prediction_bounds_what_blocks_take():
    module = EncodedAttention(create_encoding("sape2", 4, 32, (12, 12)), (12, 12))
    inputs = [torch.randn(2, 4, 144, 32, requires_grad=index < 3) for index in range(4)]
    peak_bytes(lambda: forward_backward(module.train(), inputs))  # the workspace is there from now on
    assert peak_bytes(lambda: forward_backward(module, inputs)) <= predicted_peak(forward_backward, module, inputs)


def test_prediction_for_a_model_that_was_never_allocated(monkeypatch):
    monkeypatch.setattr(attention, "choose_path", lambda *_: "products")
    with torch.device("meta"):
        model = create_model("vit_nano", encoding="ape+sape2", image_size=32, patch_size=4, depth=1)
    predicted = predicted_peak(
        loss_gradients, model, [torch.empty(4, 3, 32, 32, device="meta"), torch.empty(4, dtype=torch.long, device="meta")]
    )
    real = create_model("vit_nano", encoding="ape+sape2", image_size=32, patch_size=4, depth=1)
    batch = [torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)]
    measured = peak_bytes(lambda: loss_gradients(real, batch))
    assert 0.75 * measured < predicted <= 1.05 * measured


def test_prediction_says_none_where_values_decide():
    def step(module, inputs):
        return inputs[0] * 2 if inputs[0].sum() > 0 else inputs[0]

    assert predicted_peak(step, nn.Identity(), [torch.ones(10)]) is None
