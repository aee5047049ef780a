"""Accuracy, overall and per class, and calibration of the predicted probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sape2.evaluation.base import LabelledImages, answered, count_images, drawn, evaluating, mean_row, placed, row
from sape2.training.memory_errors import is_out_of_memory


def accuracy(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 500) -> list[dict[str, Any]]:
    """Rows: accuracy, top5_accuracy, loss, calibration_error (15 bins), and class_accuracy for every class.

    Over `limit` images drawn by class (None: all); shares with Wilson's interval.
    """
    data = drawn(data, count_images(data, limit))
    logits, labels = predict(model, data, batch_size), data.labels
    correct = logits.argmax(1) == labels
    n, num_classes = len(labels), logits.shape[1]
    rows = [mean_row("accuracy", "accuracy", correct.double(), "fraction", "top-1, one view")]
    if num_classes > 5:
        top5 = (logits.topk(5).indices == labels[:, None]).any(1)
        rows.append(mean_row("accuracy", "top5_accuracy", top5.double(), "fraction", "top-5, one view"))
    rows.append(row("accuracy", "loss", F.cross_entropy(logits, labels).item(), "nats", n, "cross-entropy, no smoothing"))
    error = calibration_error(logits.softmax(1), labels).item()
    rows.append(row("accuracy", "calibration_error", error, "fraction", n, "expected calibration error, 15 equal bins, l1"))
    for label, name in enumerate(data.classes):
        members = correct[labels == label]
        if len(members):
            about = {"class": name}
            rows.append(mean_row("accuracy", "class_accuracy", members.double(), "fraction", "top-1, one view", **about))
    return rows


def calibration_error(
    probabilities: Float[Tensor, "images classes"], labels: Int[Tensor, " images"], bins: int = 15
) -> Float[Tensor, ""]:
    """Expected calibration error (Guo et al., arXiv:1706.04599, equation 3), sum_b (n_b / n) |accuracy_b - confidence_b|.

    The bins have equal widths. A confidence on an edge is in the bin above, and 1 in one of its own, as in torchmetrics.
    """
    confidence, answers = probabilities.max(1)
    place = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1), right=True) - 1
    summed = torch.stack([torch.ones_like(confidence), confidence, (answers == labels).to(confidence.dtype)])
    count, confident, correct = torch.zeros(3, bins + 1).scatter_add_(1, place.expand(3, -1), summed)
    filled = count.clamp(min=1)
    return ((correct / filled - confident / filled).abs() * (count / len(labels))).sum()


def quick_accuracy(model: nn.Module, data: LabelledImages) -> tuple[float, float]:
    """(top-1 accuracy, mean cross-entropy): what training asks of the validation set after every epoch."""
    logits = predict(model, data)
    return (logits.argmax(1) == data.labels).double().mean().item(), F.cross_entropy(logits, data.labels).item()


def predict(model: nn.Module, data: LabelledImages, batch_size: int = 500) -> Float[Tensor, "images classes"]:
    """Logits in float32 on the CPU; the model is left in the mode it was in.

    Of no images they are (0, 0). Where batches of this size do not fit into memory, they are halved until they do. Raises
    ValueError for NaN.
    """
    try:
        with evaluating(model):
            logits = [model(placed(images, model)).float().cpu() for images, _ in data.batches(batch_size)]
    except (RuntimeError, MemoryError) as error:
        if batch_size == 1 or not is_out_of_memory(error):
            raise
        logits = None
    if logits is None:
        return predict(model, data, batch_size // 2)
    return answered(torch.cat(logits)) if logits else torch.empty(0, 0)


def confusion(logits: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> Int[Tensor, "classes classes"]:
    """Confusion matrix: row true class, column predicted class, entries numbers of images."""
    size = logits.shape[1]
    return (labels * size + logits.argmax(1)).bincount(minlength=size * size).view(size, size)
