"""The subjects that `sape2 cost` times in turn: attention with one encoding, or a whole model with it.

Its phases are `forward` and `forward_backward` of attention, `inference` and `training_step` of a model. Inputs are made when
a phase first runs, where a want of memory is caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from sape2.attention import attend, describe_path
from sape2.config import model_config
from sape2.encodings import AttentionEncoding, create_encoding
from sape2.encodings.grid import Grid, num_tokens
from sape2.evaluation.cost.measure import TrainingStep, forward, forward_backward, infer
from sape2.evaluation.cost.operations import count_macs, count_model_macs, on_meta
from sape2.models.vit import create_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN, NONE = "plain", "none"  # the yardsticks: attention written with products, and the same code without an encoding
PATCH_SIZE, NUM_CLASSES = 16, 1000  # of the models: a 14x14 grid is an image of 224 pixels


@dataclass(frozen=True)
class Point:
    """The conditions under which subjects are compared; `model` is a named size, of which attention has the heads."""

    level: str
    model: str
    dtype: str
    batch: int
    grid: Grid
    device: torch.device

    def __str__(self) -> str:
        what = "attention" if self.level == "attention" else self.model
        return f"{what}, {self.dtype}, batch {self.batch}, {self.grid[0]}x{self.grid[1]} tokens"


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, written with matrix products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return "products"


class EncodedAttention(nn.Module):
    """Attention of q, k, v under an encoding, without projections; the values stand for the tokens that it may read."""

    def __init__(self, encoding: AttentionEncoding, grid: Grid) -> None:
        super().__init__()
        self.encoding, self.grid = encoding, grid

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.grid, self.encoding, tokens=v.transpose(1, 2).flatten(2))

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return describe_path(q, k, v, self.grid, self.encoding, v.transpose(1, 2).flatten(2))


class Autocast(nn.Module):
    """The module under the mixed precision of a point."""

    def __init__(self, module: nn.Module, point: Point) -> None:
        super().__init__()
        self.module, self.point = module, point

    def forward(self, *inputs: Tensor) -> Tensor:
        with _autocast(self.point):
            return self.module(*inputs)


@dataclass(frozen=True)
class Subject:
    """A module, the MACs of one image, the step of each phase, and how attention is computed in a phase."""

    module: nn.Module
    macs: int
    steps: dict[str, Callable[[], object]]
    describe: Callable[[str], str]


def attention_subject(name: str, point: Point) -> Subject:
    """q, k, v -> output; under mixed precision q, k, v come in the low precision, as from a projection."""
    config, dtype = model_config(point.model), DTYPES[point.dtype]
    attention = PlainAttention() if name == PLAIN else _encoded(name, config.num_heads, config.head_dim, point.grid)
    module = Autocast(attention, point).to(point.device)
    shape = (point.batch, config.num_heads, num_tokens(point.grid), config.head_dim)
    shadow, one = on_meta(attention), [torch.empty(1, *shape[1:], device="meta") for _ in range(3)]

    @cache
    def inputs() -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, device=point.device, requires_grad=index < 3) for index in range(4)]

    def describe(phase: str) -> str:
        with torch.set_grad_enabled(phase == "forward_backward"), _autocast(point):
            return attention.describe(*inputs()[:3])

    steps: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(_in_mode(module, training=False), inputs()),
        "forward_backward": lambda: forward_backward(_in_mode(module, training=True), inputs()),
    }
    return Subject(module, count_macs(lambda: shadow(*one)), steps, describe)


def model_subject(name: str, point: Point) -> Subject:
    """A vision transformer on images of the size that makes the grid; a training step ends with AdamW."""
    size, dtype = (point.grid[0] * PATCH_SIZE, point.grid[1] * PATCH_SIZE), DTYPES[point.dtype]
    torch.manual_seed(0)
    model = create_model(point.model, encoding=name, image_size=size, patch_size=PATCH_SIZE, num_classes=NUM_CLASSES)
    module = Autocast(model, point).to(point.device)
    step, labels = TrainingStep(module), torch.zeros(point.batch, dtype=torch.long, device=point.device)

    @cache
    def images() -> Tensor:
        return torch.randn(point.batch, 3, *size, device=point.device)

    def describe(phase: str) -> str:
        """The path of every kind of layer that the model has."""
        training, tokens = phase == "training_step", model.num_prefix_tokens + num_tokens(point.grid)
        shape = (point.batch, model.config.num_heads, tokens, model.config.head_dim)
        kinds = {type(block.attn.encoding): block.attn.encoding for block in model.layers()}
        q, k, v = (torch.randn(shape, dtype=dtype, device=point.device, requires_grad=training) for _ in range(3))
        with torch.set_grad_enabled(training), _autocast(point):
            of = v.transpose(1, 2).flatten(2)
            return "; ".join(dict.fromkeys(describe_path(q, k, v, point.grid, kind, of) for kind in kinds.values()))

    steps: dict[str, Callable[[], object]] = {
        "inference": lambda: infer(_in_mode(module, training=False), images()),
        "training_step": lambda: step(images(), labels),
    }
    return Subject(module, count_model_macs(model, 3, size), steps, describe)


def _encoded(name: str, num_heads: int, head_dim: int, grid: Grid) -> EncodedAttention:
    encoding = create_encoding(name, num_heads, head_dim, grid)
    assert isinstance(encoding, AttentionEncoding)  # `attention_part` left the others out
    return EncodedAttention(encoding, grid)


def _autocast(point: Point) -> torch.autocast:
    return torch.autocast(point.device.type, DTYPES[point.dtype], enabled=point.dtype != "fp32")


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    return module if module.training == training else module.train(training)
