"""Measures the cost of one model: parameters, operations, speed and memory; and defines the steps that are timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.evaluation.base import LIMITS, LabelledImages, Row, count_images, drawn, evaluating, placed, row
from sape2.evaluation.cost.memory import peak_bytes
from sape2.evaluation.cost.operations import count_model_macs
from sape2.evaluation.cost.timing import alternate, spread

MIB = 2**20


def cost(model: nn.Module, data: LabelledImages, limit: int | None = None) -> list[Row]:
    """Parameters and MACs of one image, images per second and peak memory of inference.

    Speed and memory are those of one batch in eval mode, 64 images or `limit`; the speed is the median of seven passes.
    """
    images, _ = next(drawn(data, count_images(data, limit, "cost")).batches(LIMITS["cost"]))
    macs = count_model_macs(model, images.shape[1], (images.shape[2], images.shape[3]))
    with evaluating(model) as device:
        images = placed(images, model)
        seconds = alternate({"inference": lambda: model(images)}, repeats=7)["inference"]
        peak = peak_bytes(lambda: model(images), device) if device.type in ("cpu", "cuda") else None
    low, high = spread([len(images) / s for s in seconds])
    rows = [
        row("cost", "parameters", count_parameters(model), "parameters", 1, "all parameters"),
        row("cost", "macs", macs, "MACs per image", 1, "forward, attention counted, on meta"),
        row("cost", "inference_images_per_s", len(images) / statistics.median(seconds), "images/s", len(seconds),
            f"median of alternating passes, batch of {len(images)}", p10=low, p90=high),
    ]  # fmt: skip
    if peak is not None:
        protocol = f"highest extra bytes of a pass, batch of {len(images)}"
        rows.append(row("cost", "inference_memory", peak / MIB, "MiB", 1, protocol))
    return rows


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def growth_exponent(points: Sequence[tuple[int | float, int | float]]) -> float:
    """The slope of log y over log x by least squares: 1 for what grows in proportion, 2 for what grows with the square."""
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


# --- steps -----------------------------------------------------------------------------------------------------------


def forward(attention: nn.Module, inputs: list[Tensor]) -> None:
    """The output for q, k, v, the first three of `inputs`."""
    with torch.no_grad():
        attention(*inputs[:3])


def forward_backward(attention: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and of all parameters, for q, k, v and the gradient of the output; nothing stays behind."""
    *tokens, gradient = inputs
    parameters = [p for p in attention.parameters() if p.requires_grad]
    return torch.autograd.grad(attention(*tokens), [*tokens, *parameters], gradient, allow_unused=True)


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


class TrainingStep:
    """Forward, cross-entropy, backward and AdamW, for `step(images, labels)`; the gradients are freed at the end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if not self.model.training:
            self.model.train()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
