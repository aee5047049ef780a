"""Accuracy at image sizes other than the training size, without fine-tuning: the patch size stays, the grid changes.

The training size is that of the images in `data`. Formulas, sources and what a number can say:
docs/evaluation/resolution.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    resampled_means,
    row,
)
from sape2.evaluation.equivariance import centred
from sape2.evaluation.views import AS_BUILT, Size, View, describe_rule, oblong_sizes, rules, views
from sape2.training.memory_errors import is_out_of_memory

BIAS_LIMIT = 10  # images of `bias_size`
FALL = 0.05  # of accuracy, for `size_at_5_points`
Predictions = dict[View, Int[Tensor, " images"]]


def resolution(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 100) -> Iterator[Row]:
    """Accuracy against test size without fine-tuning, drop, means over unseen sizes, size at 5 points, size of the bias.

    `limit` images (None: 200). Measured under every rule that the encodings know for grids beyond the training grid, the
    model's own first. Raises ValueError for a model that does not tell its patch, or does not run at its own size.
    """
    images = count_images(data, limit, "resolution")
    size, patch = image_size(data), patch_size(model, data)
    labels, refused = drawn(data, images).labels.cpu(), dict[View, str]()
    built: Curve | None = None
    for rule, variant in rules(model).items():
        curve = Curve(size, patch, labels, rule, describe_rule(variant), {})
        for view in [view for view in views(size, patch) if view not in refused]:
            try:
                unchanged = built is not None and answer_alike(model, variant, data, view)
                found = (
                    built.predictions[view] if built and unchanged else predict_view(variant, data, view, images, batch_size)
                )
            except (ValueError, AssertionError, RuntimeError) as error:
                refused[view] = _refusal(error, view, size)
                continue
            curve.predictions[view] = found
            yield from curve.size_rows(view)
        yield from curve.unseen_rows()
        yield from curve.fall_rows()
        resized = [view for view in curve.predictions if view.transform == "scaled"]
        yield from bias_size(variant, data, resized, rule, min(images, BIAS_LIMIT))
        built = built or curve
    yield _refused_row(refused, images)


def predict_view(
    model: nn.Module, data: LabelledImages, view: View, limit: int, batch_size: int = 100
) -> Int[Tensor, " images"]:
    """The predicted class of `limit` images (`drawn`) under a view; larger images go through the model in smaller batches."""
    classes = []
    with evaluating(model):
        for images, _ in drawn(data, limit).batches(batch_size):
            share = images[0, 0].numel() / math.prod(view.size)
            parts = images.split(max(1, int(batch_size * min(1.0, share))))
            classes += [answered(model(view(placed(part, model)))).argmax(-1).cpu() for part in parts]
    return torch.cat(classes)


def answer_alike(first: nn.Module, second: nn.Module, data: LabelledImages, view: View, images: int = 4) -> bool:
    """True if both models give equal logits, bit for bit, on a few images, so that one of them need not be run."""
    shown = view(next(data.batches(images))[0])
    logits = []
    for model in (first, second):
        with evaluating(model):
            logits.append(model(placed(shown, model)))
    return torch.equal(*logits)


@dataclass(frozen=True)
class Curve:
    """Predictions of a model at every size that it takes, under one rule, and the rows that follow from them."""

    size: Size  # of training
    patch: Size
    labels: Int[Tensor, " images"]
    rule: str
    rule_text: str
    predictions: Predictions

    def correct(self, view: View) -> Float[Tensor, " images"]:
        """1 where the prediction is the label."""
        return (self.predictions[view] == self.labels).double()

    def conditions(self, view: View) -> dict[str, Any]:
        """The conditions of a row: size, grid, transform, border and rule."""
        return describe_view(view, self.patch) | {"rule": self.rule}

    def row(self, name: str, per_image: Float[Tensor, " images"], what: str, **conditions: Any) -> Row:
        protocol = f"{what}; no fine-tuning; {self.rule_text}"
        return mean_row("resolution", name, per_image, "fraction", protocol, **conditions)

    def size_rows(self, view: View) -> list[Row]:
        """Rows: accuracy_at_size and, at another size, accuracy_drop, image by image from the accuracy at the training size."""
        correct, conditions = self.correct(view), self.conditions(view)
        chance = chance_agreement(self.predictions[view], self.labels)
        rows = [self.row("accuracy_at_size", correct, f"top-1, {view}", chance=chance, **conditions)]
        if view.size != self.size:
            drop = self.correct(View(self.size, "scaled")) - correct
            rows.append(self.row("accuracy_drop", drop, f"accuracy at the training size less that here, {view}", **conditions))
        return rows

    def unseen_rows(self) -> list[Row]:
        """Rows: mean_accuracy_below and mean_accuracy_above, over the sizes of the training aspect that were not trained."""
        return [
            self.row(
                f"mean_accuracy_{side}",
                torch.stack([self.correct(view) for view in shown]).mean(0),
                f"top-1, mean over {', '.join(self.conditions(view)['size'] for view in shown)}, {shown[0]}",
                **_without_size(self.conditions(shown[0])),
            )
            for side, shown in self._unseen()
        ]

    def fall_rows(self) -> list[Row]:
        """Rows: size_at_5_points, the height beyond training at which accuracy has fallen by 5 points, and its interval."""
        rows = []
        for side, shown in self._unseen():
            if side == "below":
                continue
            correct = torch.stack([self.correct(view) for view in [View(self.size, "scaled"), *shown]])
            heights = [self.size[0], *(view.size[0] for view in shown)]
            (found,), (low, high) = size_at_fall(heights, correct.mean(1)[None]).tolist(), fall_interval(heights, correct)
            value = None if math.isinf(found) else found
            protocol = (
                f"first height at which accuracy is {FALL} below that at {heights[0]}, linear between {heights}, "
                f"{'' if value else 'never reached, '}{shown[0]}; no fine-tuning; {self.rule_text}"
            )
            interval = {} if low is not None and low == high else {"ci_low": low, "ci_high": high}
            conditions = interval | _without_size(self.conditions(shown[0]))
            rows.append(row("resolution", "size_at_5_points", value, "px", len(self.labels), protocol, **conditions))
        return rows

    def _unseen(self) -> Iterator[tuple[str, list[View]]]:
        """("below" or "above", views of one kind in the order of their sizes) without the training size and other aspects."""
        kinds: dict[tuple[str, str, str], list[View]] = {}
        oblong = oblong_sizes(self.size, self.patch)
        for view in sorted(self.predictions, key=lambda view: view.size):
            if view.size != self.size and view.size not in oblong:
                side = "below" if view.size < self.size else "above"
                kinds.setdefault((side, view.transform, view.border), []).append(view)
        return ((side, shown) for (side, _, _), shown in kinds.items())


def describe_view(view: View, patch: Size) -> dict[str, Any]:
    """The size, grid, transform and border of a view, as flat fields of a row."""
    (height, width), (patch_height, patch_width) = view.size, patch
    return {
        "size": f"{height}x{width}",
        "grid": f"{height // patch_height}x{width // patch_width}",
        "transform": view.transform,
        "border": view.border,
    }


def _without_size(conditions: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in conditions.items() if name not in ("size", "grid")}


def size_at_fall(sizes: list[int], accuracies: Float[Tensor, "curves sizes"]) -> Float[Tensor, " curves"]:
    """Size at which each curve, linear between `sizes`, first is `FALL` below its first value; inf if it never is."""
    fallen = accuracies <= accuracies[:, :1] - FALL
    after = fallen.double().argmax(1, keepdim=True).clamp(min=1)  # the first size at which it has fallen, if there is one
    right, left = (accuracies.gather(1, index)[:, 0] for index in (after, after - 1))
    end, start = (torch.tensor(sizes).to(accuracies)[index[:, 0]] for index in (after, after - 1))
    place = start + (end - start) * (left - accuracies[:, 0] + FALL) / (left - right)
    return torch.where(fallen.any(1), place, torch.inf)


def fall_interval(sizes: list[int], correct: Float[Tensor, "sizes images"]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of `size_at_fall` over images, every size on the same ones; None: never falls so far."""
    found = size_at_fall(sizes, resampled_means(correct)).sort().values
    ends = (found[int(share * (len(found) - 1))].item() for share in (0.025, 0.975))
    low, high = (None if math.isinf(end) else end for end in ends)
    return low, high


def bias_size(
    model: nn.Module,
    data: LabelledImages,
    shown: list[View],
    rule: str = AS_BUILT,
    limit: int | None = BIAS_LIMIT,
    batch_size: int = 10,
) -> list[Row]:
    """Rows per view and layer that has a bias: bias_row_std, the root mean square of the bias less its row mean, and bias_mean.

    The first sharpens the softmax among the grid tokens where it grows; the second, which a softmax over grid tokens alone
    would not see, is what they gain over prefix tokens, whose bias is 0. `rule` is for the rows only.
    """
    mapped = as_mapped(model)
    if mapped is None:
        return []
    patch, rows = patch_size(model, data), []
    for view in shown:
        biases: dict[int, list[Tensor]] = {}
        with evaluating(model):
            for images, _ in drawn(data, limit).batches(batch_size):
                for layer, maps in enumerate(mapped.maps(view(placed(images, model))), start=1):
                    if "bias" in maps:
                        biases.setdefault(layer, []).append(_spread_and_mean(maps["bias"]).cpu())
        about = f"mean over heads and images; {view}; {describe_rule(model)}"
        conditions = describe_view(view, patch) | {"rule": rule}
        for layer, parts in biases.items():
            spread, mean = torch.cat(parts, dim=1)
            kinds = (
                ("bias_row_std", spread, "root mean square of the bias less its row mean"),
                ("bias_mean", mean, "mean bias"),
            )
            for name, per_image, what in kinds:
                rows.append(mean_row("resolution", name, per_image, "logits", f"{what}, {about}", layer=layer, **conditions))
    return rows


def _spread_and_mean(bias: Float[Tensor, "batch heads tokens tokens"]) -> Float[Tensor, "2 batch"]:
    spread = centred(bias).square().mean((-1, -2)).sqrt()
    return torch.stack([spread, bias.mean((-1, -2))]).mean(-1).float()


# --- sizes that a model does not take --------------------------------------------------------------------------------


def _refusal(error: Exception, view: View, size: Size) -> str:
    """The reason in one line. What is no refusal is raised: memory that ran out, a model that does not run at all."""
    if is_out_of_memory(error):
        raise error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if view.size == size:
        raise ValueError(f"the model does not run at the size of its own images, {size[0]}x{size[1]}: {reason}") from error
    return reason


def _refused_row(refused: dict[View, str], images: int) -> Row:
    sizes = sorted({view.size for view in refused})
    protocol = "sizes at which the model raises an error"
    if refused:
        protocol += f": {', '.join(f'{height}x{width}' for height, width in sizes)}; the first: {next(iter(refused.values()))}"
    return row("resolution", "sizes_refused", float(len(sizes)), "sizes", images, protocol)
