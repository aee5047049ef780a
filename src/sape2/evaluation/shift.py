"""Measures how a model responds to translations of the image: predictions, softmax outputs, features and biases.

Formulas, sources and what a number can say: docs/evaluation/shift.md. All draws are seeded with `SEED`, so two models
see the same shifts of the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sape2.evaluation.base import (
    LabelledImages,
    Row,
    answered,
    as_mapped,
    chance_agreement,
    count_images,
    drawn,
    evaluating,
    image_size,
    mean_row,
    patch_size,
    placed,
)
from sape2.evaluation.equivariance import equivariance
from sape2.evaluation.lie import lie_derivative_error
from sape2.evaluation.translation import Border, ShiftRange, consistency_ranges, shift_sets, shift_sizes, translate

SEED = 0
# Shares of the images of `consistency`: what costs more passes an image sees fewer.
SHARES = {"consistency": 1.0, "curve": 0.25, "eq_t": 0.2, "worst_case": 0.1, "lie": 0.1, "layers": 0.05}


def shift(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 100) -> Iterator[Row]:
    """Consistency and accuracy under shifts, worst case, softmax change, Lie derivative, features and biases by layer.

    `limit` images (None: 1,000) for the consistency; the other metrics take the share of them in `SHARES`, at least 20.
    Features and biases are measured on a `MappedModel` only. Raises ValueError for a model that does not tell its patch.
    """
    whole = count_images(data, limit, "shift")
    size, patch = image_size(data), patch_size(model, data)
    images = {name: max(round(share * whole), min(whole, 20)) for name, share in SHARES.items()}
    for shifts in consistency_ranges(size, patch):
        yield from consistency(model, data, shifts, images["consistency"], batch_size)
    for border in ("circular", "reflect"):
        yield from shift_curve(model, data, border, shift_sizes(size, patch), images["curve"], batch_size)
    for name, (border, shifts) in shift_sets(patch).items():
        yield from worst_case(model, data, name, border, shifts, images["worst_case"], batch_size)
    yield from softmax_change(model, data, images["eq_t"], batch_size)
    for border in ("circular", "reflect"):
        for axis in ("x", "y"):
            yield from lie_derivative_error(model, data, axis, border, images["lie"])
    if as_mapped(model) is not None:
        yield from equivariance(model, data, images["layers"])


# --- what a model says about moved images ----------------------------------------------------------------------------


def read_moved(
    model: nn.Module,
    data: LabelledImages,
    shifts: Float[Tensor, "draws images 2"],
    border: Border,
    read: Callable[[Float[Tensor, "draws batch classes"]], Tensor],
    batch_size: int,
) -> Tensor:
    """`read` of the logits of as many images (`drawn`) under every draw of shifts, put together along its last dimension."""
    results, start = [], 0
    with evaluating(model):
        for images, _ in drawn(data, shifts.shape[1]).batches(batch_size):
            images = placed(images, model)
            part = shifts[:, start : start + len(images)].to(images.device)
            logits = torch.stack([model(translate(images, draw, border)) for draw in part])
            results.append(read(answered(logits.float().cpu())))
            start += len(images)
    return torch.cat(results, dim=-1)


def predict_moved(
    model: nn.Module, data: LabelledImages, shifts: Float[Tensor, "draws images 2"], border: Border, batch_size: int
) -> Int[Tensor, "draws images"]:
    """The predicted class of every image under every draw."""
    return read_moved(model, data, shifts, border, lambda logits: logits.argmax(-1), batch_size)


def same_for_all(shifts: list[tuple[int, int]], images: int) -> Float[Tensor, "draws images 2"]:
    """Fixed shifts as draws that are the same for every image."""
    return torch.tensor(shifts).float()[:, None].expand(len(shifts), images, 2)


def _correct(predictions: Tensor, data: LabelledImages) -> tuple[Float[Tensor, "*draws images"], float]:
    """1 where a prediction is the label, and how often it would be by chance."""
    labels = drawn(data, predictions.shape[-1]).labels.cpu()
    return (predictions == labels).double(), chance_agreement(predictions, labels)


def _row(name: str, per_image: Float[Tensor, " images"], protocol: str, unit: str = "fraction", **conditions: Any) -> Row:
    return mean_row("shift", name, per_image, unit, protocol, transform="translation", **conditions)


# --- metrics ---------------------------------------------------------------------------------------------------------


def consistency(
    model: nn.Module, data: LabelledImages, shifts: ShiftRange, limit: int, batch_size: int = 100, pairs: int = 1
) -> list[Row]:
    """Rows: circular_consistency (cropped_consistency for a reflected border), how often the predictions under two

    independent random shifts agree, with the agreement expected by chance; shifted_accuracy, the mean under the same shifts.
    """
    draws = shifts.draw(2 * pairs, count_images(data, limit), SEED)
    predictions = predict_moved(model, data, draws, shifts.border, batch_size)
    agree = (predictions[0::2] == predictions[1::2]).double().mean(0)
    correct, chance = _correct(predictions, data)
    how = f"{shifts}, uniform, seed {SEED}, {pairs} pair(s) an image, {shifts.border} border"
    conditions = {"border": shifts.border, "shifts": shifts.label}
    name = "circular_consistency" if shifts.border == "circular" else "cropped_consistency"
    protocol = f"argmax f(S^s x) = argmax f(S^t x), s and t independent (equal in 1 of {shifts.size}), {how}"
    together = chance_agreement(predictions, predictions)
    return [
        _row(name, agree, protocol, chance=together, **conditions),
        _row("shifted_accuracy", correct.mean(0), f"top-1 of S^s x, {how}", chance=chance, **conditions),
    ]


def shift_curve(
    model: nn.Module, data: LabelledImages, border: Border, sizes: list[int], limit: int, batch_size: int = 100
) -> list[Row]:
    """Rows for every axis and shift_px: shift_accuracy, and shift_agreement with the prediction of the image at rest.

    `sizes` are in pixels and hold 0.
    """
    moves = [(axis, px) for axis in ("x", "y") for px in sizes]
    shifts = same_for_all([(0, px) if axis == "x" else (px, 0) for axis, px in moves], count_images(data, limit))
    predictions = predict_moved(model, data, shifts, border, batch_size)
    still = predictions[sizes.index(0)]
    rows = []
    for (axis, px), found in zip(moves, predictions, strict=True):
        conditions = {"border": border, "axis": axis, "shift_px": px}
        moved = f"image moved by {px} px along {axis}, {border} border"
        correct, chance = _correct(found, data)
        rows.append(_row("shift_accuracy", correct, f"top-1, {moved}", chance=chance, **conditions))
        if px:
            agree, chance = (found == still).double(), chance_agreement(found, still)
            protocol = f"argmax f(S^s x) = argmax f(x), {moved}"
            rows.append(_row("shift_agreement", agree, protocol, chance=chance, **conditions))
    return rows


def worst_case(
    model: nn.Module,
    data: LabelledImages,
    name: str,
    border: Border,
    shifts: list[tuple[int, int]],
    limit: int,
    batch_size: int = 100,
) -> list[Row]:
    """Rows: worst_case_accuracy, right under every shift of the set; worst_case_agreement, one prediction under all of them;

    and shifted_accuracy, the mean over the set, which the first cannot exceed.
    """
    predictions = predict_moved(model, data, same_for_all(shifts, count_images(data, limit)), border, batch_size)
    correct, chance = _correct(predictions, data)
    one = (predictions == predictions[0]).all(0).double()
    ends = [f"{d} in {min(values)}..{max(values)}" for d, values in zip(("dy", "dx"), zip(*shifts, strict=True), strict=True)]
    over = f"{len(shifts)} shifts, {', '.join(ends)} px, {border} border"
    conditions = {"border": border, "shifts": name}
    return [
        _row("worst_case_accuracy", correct.amin(0), f"right under all of {over}", **conditions),
        _row("worst_case_agreement", one, f"same prediction under all of {over}", **conditions),
        _row("shifted_accuracy", correct.mean(0), f"top-1, mean over {over}", chance=chance, **conditions),
    ]


def softmax_change(
    model: nn.Module, data: LabelledImages, limit: int, batch_size: int = 100, draws: int = 3, reach: float = 0.125
) -> list[Row]:
    """Rows: eq_t_integer and eq_t_fractional, the mean squared change of the softmax outputs when the image moves by

    t ~ U(-reach, reach)^2 of its size, rounded to whole pixels, and as it is (bilinear).
    """
    size, images = image_size(data), count_images(data, limit)
    generator = torch.Generator().manual_seed(SEED)
    uniform = torch.rand(draws, images, 2, generator=generator) * 2 - 1
    shifts = uniform * reach * torch.tensor(size)
    still = torch.zeros(1, images, 2)

    def change(logits: Tensor) -> Tensor:
        probabilities = logits.double().softmax(-1)
        return (probabilities[1:] - probabilities[:1]).square().mean((0, -1))

    rows = []
    for kind, moves in (("integer", shifts.round()), ("fractional", shifts)):
        per_image = read_moved(model, data, torch.cat([still, moves]), "reflect", change, batch_size)
        how = "rounded to whole pixels" if kind == "integer" else "bilinear"
        protocol = (
            f"mean over classes of (softmax f(S^t x) - softmax f(x))^2, t uniform in +-{reach} of the size per axis, {how}, "
            f"{draws} draws an image, seed {SEED}, reflect border"
        )
        rows.append(_row(f"eq_t_{kind}", per_image, protocol, "squared probability", border="reflect"))
    return rows
