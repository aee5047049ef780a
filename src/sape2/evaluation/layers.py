"""What the layers of a model did with a batch of images: the view that measurements of attention share.

Everything is about the N grid tokens: prefix tokens (class, registers) are dropped and what is left of an attention row
is scaled to sum to 1 again (ViT, arXiv:2010.11929, does so before it measures distances). All in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.evaluation.base import MappedModel
from sape2.grid import Grid


class Layer(NamedTuple):
    """One layer, counted from 1. `bias` is None where the encoding adds none; `maps` is all that the model gave."""

    number: int
    entering: Float[Tensor, "batch tokens dim"]
    leaving: Float[Tensor, "batch tokens dim"]
    attention: Float[Tensor, "batch heads tokens tokens"]
    bias: Float[Tensor, "batch heads tokens tokens"] | None
    maps: dict[str, Tensor]


def check_mapped(model: Any, measure: str) -> None:
    """Raises ValueError for a model that cannot be looked into."""
    if not isinstance(model, MappedModel):
        raise ValueError(
            f"{measure} looks into the layers of a model, which must have embed, maps and num_prefix_tokens "
            f"(sape2.evaluation.base.MappedModel); {type(model).__name__} has not"
        )


def device_of(model: MappedModel) -> torch.device:
    """Where images must go."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


@contextlib.contextmanager
def evaluating(model: MappedModel) -> Iterator[None]:
    """Evaluation mode inside, the mode that was before afterwards."""
    if not isinstance(model, nn.Module) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def embedded(model: MappedModel, images: Tensor) -> tuple[Float[Tensor, "batch tokens dim"], Grid]:
    """The grid tokens that enter the first layer, and their grid."""
    with evaluating(model), torch.no_grad():
        tokens, grid = model.embed(images.to(device_of(model)))
    return double(tokens[:, model.num_prefix_tokens :]), grid


def layers_of(model: MappedModel, images: Tensor) -> Iterator[Layer]:
    """The layers one after the other; only one at a time is held in float64."""
    entering, _ = embedded(model, images)
    with evaluating(model), torch.no_grad():
        maps = model.maps(images.to(device_of(model)))
    first = model.num_prefix_tokens
    for number, layer in enumerate(maps, start=1):
        attention = double(layer["attention"][:, :, first:, first:])
        bias = double(layer["bias"]) if "bias" in layer else None
        leaving = double(layer["tokens"][:, first:])
        yield Layer(number, entering, leaving, attention / attention.sum(-1, keepdim=True), bias, layer)
        entering = leaving


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU if the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
