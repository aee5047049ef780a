"""The attention, biases and tokens of every layer for a batch of images, the input of measurements of attention.

Only the N grid tokens are kept: prefix tokens (class, registers) are dropped and the rest of each attention row is
scaled to sum to 1 again (ViT, arXiv:2010.11929, does so before it measures distances). All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.grid import Grid
from sape2.evaluation.base import MappedModel, as_mapped, evaluating


class Layer(NamedTuple):
    """One layer, counted from 1. `bias` is None where the encoding adds none; `maps` is all that the model gave."""

    number: int
    entering: Float[Tensor, "batch tokens dim"]
    leaving: Float[Tensor, "batch tokens dim"]
    attention: Float[Tensor, "batch heads tokens tokens"]
    bias: Float[Tensor, "batch heads tokens tokens"] | None
    maps: dict[str, Tensor]


def mapped(model: nn.Module, measure: str = "this measurement") -> MappedModel:
    """The model, which can be looked into; raises ValueError for one that cannot."""
    found = as_mapped(model)
    if found is None:
        raise ValueError(
            f"{measure} looks into the layers of a model, which must have embed, maps and num_prefix_tokens "
            f"(sape2.evaluation.base.MappedModel); {type(model).__name__} has not"
        )
    return found


def embedded(model: nn.Module, images: Tensor) -> tuple[Float[Tensor, "batch tokens dim"], Grid]:
    """The grid tokens that enter the first layer, and their grid."""
    seen = mapped(model)
    with evaluating(model) as device:
        tokens, grid = seen.embed(images.to(device))
    return double(tokens[:, seen.num_prefix_tokens :]), grid


def layers_of(model: nn.Module, images: Tensor) -> Iterator[Layer]:
    """The layers one after the other; only one at a time is held in float64."""
    entering, _ = embedded(model, images)
    seen = mapped(model)
    with evaluating(model) as device:
        maps = seen.maps(images.to(device))
    first = seen.num_prefix_tokens
    for number, layer in enumerate(maps, start=1):
        attention = double(layer["attention"][:, :, first:, first:])
        bias = double(layer["bias"]) if "bias" in layer else None
        leaving = double(layer["tokens"][:, first:])
        yield Layer(number, entering, leaving, attention / attention.sum(-1, keepdim=True), bias, layer)
        entering = leaving


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if the device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
