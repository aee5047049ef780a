"""The subjects that `sape2 cost` times in turn: attention with one encoding, or a whole model with it.

A subject runs and describes each of its phases: for attention `forward` and `forward_backward`, for a model
`inference` and `training_step`. It makes its inputs when it first runs, where a want of memory is caught.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sape2.attention import attend, describe_path
from sape2.config import model_config
from sape2.encodings import AttentionEncoding, create_encoding
from sape2.encodings.grid import Grid, num_tokens
from sape2.evaluation.cost.measure import TrainingStep, count_parameters, forward, forward_backward, infer
from sape2.evaluation.cost.operations import count_operations, on_meta
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
    """The module under mixed precision, which for float32 is none."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(*inputs)


class AttentionSubject:
    """q, k, v -> output; under mixed precision q, k, v come in the low precision, as from a projection."""

    def __init__(self, name: str, point: Point) -> None:
        config, self.point, dtype = model_config(point.model), point, DTYPES[point.dtype]
        self.attention = PlainAttention() if name == PLAIN else _encoded(name, config.num_heads, config.head_dim, point.grid)
        self.module = Autocast(self.attention, dtype).to(point.device)
        shape = (point.batch, config.num_heads, num_tokens(point.grid), config.head_dim)
        self.shapes = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=index < 3) for index in range(4)]
        self.inputs: list[Tensor] = []
        self.parameters = count_parameters(self.module)
        shadow, one = on_meta(self.attention), [torch.empty(1, *shape[1:], device="meta") for _ in range(3)]
        self.operations = count_operations(lambda: shadow(*one))

    def run(self, phase: str) -> None:
        self.inputs = self.inputs or _normal(self.shapes, self.point.device)
        _set_training(self.module, phase == "forward_backward")
        (forward_backward if phase == "forward_backward" else forward)(self.module, self.inputs)

    def describe(self, phase: str) -> str:
        q, k, v = self.inputs[:3]
        with torch.set_grad_enabled(phase == "forward_backward"), _autocast(self.point):
            return self.attention.describe(q, k, v)


class ModelSubject:
    """A vision transformer on images of the size that makes the grid; a training step ends with AdamW."""

    def __init__(self, name: str, point: Point) -> None:
        self.point, size = point, (point.grid[0] * PATCH_SIZE, point.grid[1] * PATCH_SIZE)
        torch.manual_seed(0)
        self.model = create_model(point.model, encoding=name, image_size=size, patch_size=PATCH_SIZE, num_classes=NUM_CLASSES)
        self.module = Autocast(self.model, DTYPES[point.dtype]).to(point.device)
        self.step = TrainingStep(self.module)
        self.shapes = [torch.empty(point.batch, 3, *size, device="meta")]
        self.inputs: list[Tensor] = []
        self.labels = torch.zeros(point.batch, dtype=torch.long, device=point.device)
        self.parameters = count_parameters(self.module)
        shadow = on_meta(self.model)
        self.operations = count_operations(lambda: shadow(self.shapes[0][:1]))

    def run(self, phase: str) -> None:
        self.inputs = self.inputs or _normal(self.shapes, self.point.device)
        _set_training(self.module, phase == "training_step")
        if phase == "training_step":
            self.step(self.inputs[0], self.labels)
        else:
            infer(self.module, self.inputs[0])

    def describe(self, phase: str) -> str:
        """The path of every kind of layer that the model has."""
        config, training = self.model.config, phase == "training_step"
        shape = (
            self.point.batch,
            config.num_heads,
            self.model.num_prefix_tokens + num_tokens(self.point.grid),
            config.head_dim,
        )
        kinds = {type(block.attn.encoding): block.attn.encoding for block in self.model.layers()}
        dtype, device = DTYPES[self.point.dtype], self.point.device
        q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=training) for _ in range(3))
        with torch.set_grad_enabled(training), _autocast(self.point):
            tokens = v.transpose(1, 2).flatten(2)
            return "; ".join(dict.fromkeys(describe_path(q, k, v, self.point.grid, kind, tokens) for kind in kinds.values()))


Subject = AttentionSubject | ModelSubject


def _encoded(name: str, num_heads: int, head_dim: int, grid: Grid) -> EncodedAttention:
    encoding = create_encoding(name, num_heads, head_dim, grid)
    assert isinstance(encoding, AttentionEncoding)  # `attention_part` left the others out
    return EncodedAttention(encoding, grid)


def _normal(shapes: list[Tensor], device: torch.device) -> list[Tensor]:
    """Random tensors like those without memory."""
    return [torch.randn_like(like, device=device).requires_grad_(like.requires_grad) for like in shapes]


def _autocast(point: Point) -> torch.autocast:
    return torch.autocast(point.device.type, DTYPES[point.dtype], enabled=point.dtype != "fp32")


def _set_training(module: nn.Module, training: bool) -> None:
    if module.training != training:
        module.train(training)
