"""The attention, biases and tokens of every layer for a batch of images, from one pass through the model.

All that looks into layers comes through here: measures batch by batch, `inspect.look` with a single image. Only the N grid
tokens are measured: prefix tokens (class, registers) are dropped and the rest of each attention row is scaled to sum to 1
again (ViT, arXiv:2010.11929, does so before it measures distances). All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.grid import Grid, num_prefix_tokens
from sape2.evaluation.base import MappedModel, as_mapped, evaluating, placed


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, counted from 1: all tokens `before` it, (B, T, D), and all that the model gave (`maps`).

    What is measured of it is made in float64 when it is first asked for.
    """

    number: int
    grid: Grid
    before: Float[Tensor, "batch all_tokens dim"]
    maps: dict[str, Tensor]

    @property
    def num_prefix(self) -> int:
        return num_prefix_tokens(self.before.shape[1], self.grid)

    @cached_property
    def entering(self) -> Float[Tensor, "batch tokens dim"]:
        return double(self.before[:, self.num_prefix :])

    @cached_property
    def leaving(self) -> Float[Tensor, "batch tokens dim"]:
        return double(self.maps["tokens"][:, self.num_prefix :])

    @cached_property
    def attention(self) -> Float[Tensor, "batch heads tokens tokens"]:
        among_all = double(self.maps["attention"][:, :, self.num_prefix :, self.num_prefix :])
        return among_all / among_all.sum(-1, keepdim=True)

    @cached_property
    def bias(self) -> Float[Tensor, "batch heads tokens tokens"] | None:
        """None where the encoding adds none."""
        return double(self.maps["bias"]) if "bias" in self.maps else None


def mapped(model: nn.Module, measure: str = "this measurement") -> MappedModel:
    """The model, which can be looked into; raises ValueError for one that cannot."""
    found = as_mapped(model)
    if found is None:
        raise ValueError(
            f"{measure} looks into the layers of a model, which must have embed, maps and num_prefix_tokens "
            f"(sape2.evaluation.base.MappedModel); {type(model).__name__} has not"
        )
    return found


def grid_of(model: nn.Module, images: Tensor) -> Grid:
    """The grid of tokens that the model makes of these images."""
    with evaluating(model):
        return mapped(model).embed(placed(images, model))[1]


def layers_of(model: nn.Module, images: Tensor) -> Iterator[Layer]:
    """The layers one after the other; only one at a time is held in float64."""
    with evaluating(model):
        images = placed(images, model)
        tokens, grid = mapped(model).embed(images)
        maps = mapped(model).maps(images)
    return as_layers(tokens, grid, maps)


def as_layers(tokens: Float[Tensor, "batch all_tokens dim"], grid: Grid, maps: Sequence[dict[str, Tensor]]) -> Iterator[Layer]:
    """The layers of a pass, of which `tokens` are what enters the first, and `maps` what each one gave."""
    for number, layer in enumerate(maps, start=1):
        yield Layer(number, grid, tokens, layer)
        tokens = layer["tokens"]


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if the device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
