"""Measures whether attention connects patches that belong together, and whether the bias contributes, layer by layer.

Early layers attend to patches that are similar, late ones to patches that differ (arXiv:2405.14880), so a mean over
layers would say nothing. The statistics are in `pairs`, the labels of the patches in `scenes`;
docs/evaluation/grouping.md explains what each number shows and what it does not.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sape2.encodings.grid import Grid
from sape2.evaluation import pairs
from sape2.evaluation.base import LabelledImages, Row, count_images, drawn, mean_row, patch_size
from sape2.evaluation.layers import Layer, grid_of, layers_of, mapped
from sape2.evaluation.scenes import make_scenes

SCENES = 256  # synthetic ones, fewer if there are fewer images
ON_SCENES = "synthetic scenes with true masks, out of distribution for a model trained on other images"
PATCHES_ONLY = "grid tokens only, attention rows scaled to sum to 1 again"


@dataclass(frozen=True)
class Key:
    """Identifies a number: its name and, where they apply, the distances of the counted pairs and the sign of the bias."""

    name: str
    distance: str | None = None
    sign: str | None = None


@dataclass(frozen=True)
class About:
    """Describes a number: its unit, protocol, value at chance, and whether it is also reported for single heads."""

    unit: str
    protocol: str
    chance: float | None = None
    per_head: bool = False


ABOUT = {
    "attention_distance": About("patches", f"mean Euclidean distance of what a patch attends to; {PATCHES_ONLY}", None, True),
    "attention_entropy": About("nats", f"mean entropy of the attention rows; {PATCHES_ONLY}", None, True),
    "bias_feature_correlation": About(
        "partial correlation",
        "bias with 1 - cos of the tokens that enter the layer, Euclidean distance controlled for, over all ordered pairs",
        0.0,
    ),
    "same_label_lift": About(
        "ratio", f"share of attention that patches of the same label get over their share of the pairs; {PATCHES_ONLY}", 1.0
    ),
    "grouping_index": About("index", f"(A_same - A_different) / (A_same + A_different), means over pairs; {PATCHES_ONLY}", 0.0),
    "bias_auroc": About("AUROC", "signed bias as a score for 'same label', over the ordered pairs of an image", 0.5, True),
    "bias_separation": About("d'", "(mean across labels - mean within) / root mean variance of the bias, ordered pairs", 0.0),
}
Statistics = dict[Key, Float[Tensor, "batch heads"]]


def grouping(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 32) -> Iterator[Row]:
    """Attention distance and entropy, same-label lift, what the bias tells of objects; per layer.

    What needs labels of patches is measured on synthetic scenes, where the grid has at least 3x3 patches. `limit`: so many
    images, drawn by class (None: 1,000).
    """
    mapped(model, "grouping")
    number = count_images(data, limit, "grouping")
    images, _ = next(data.batches(1))
    grid = grid_of(model, images)
    shown = drawn(data, number).batches(batch_size)
    found = ((layer.number, without_labels(layer)) for some, _ in shown for layer in layers_of(model, some))
    yield from _rows(found, grid)
    if min(grid) >= 3:
        scenes, labels = make_scenes(min(number, SCENES), images.shape[1], grid, patch_size(model, data))
        labelled = zip(scenes.split(batch_size), labels.split(batch_size), strict=True)
        found = ((layer.number, with_labels(layer, of)) for some, of in labelled for layer in layers_of(model, some))
        yield from _rows(found, grid)


def without_labels(layer: Layer) -> Statistics:
    """Statistics that need no labels: distance and entropy of attention, agreement of the bias with the features."""
    statistics = {
        Key("attention_distance"): pairs.attention_distance(layer.attention, layer.grid),
        Key("attention_entropy"): pairs.attention_entropy(layer.attention),
    }
    if layer.bias is not None:
        apart = pairs.distances(layer.grid, layer.bias.device)
        features = pairs.feature_distance(layer.entering)
        correlation = pairs.partial_correlation(layer.bias, features, apart, apart > 0)
        statistics[Key("bias_feature_correlation")] = correlation
    return statistics


def with_labels(layer: Layer, labels: Int[Tensor, "batch tokens"]) -> Statistics:
    """Statistics that need labels of patches; pairs of a patch with itself are never counted."""
    labels = labels.to(layer.attention.device)
    same = labels[:, :, None] == labels[:, None]
    strata = {name: some.expand_as(same) for name, some in pairs.distance_strata(layer.grid, labels.device).items()}
    statistics = {
        Key("same_label_lift", name): pairs.same_label_lift(layer.attention, same, counted) for name, counted in strata.items()
    }
    statistics[Key("grouping_index", "all")] = pairs.grouping_index(layer.attention, same, strata["all"])
    if layer.bias is not None:
        statistics |= _of_bias(layer.bias, same, strata)
    return statistics


def _of_bias(bias: Tensor, same: Tensor, strata: dict[str, Tensor]) -> Statistics:
    """-bias as a score says how well a small bias marks "same label"; +bias is the same from the other side."""
    statistics: Statistics = {Key("bias_separation", "all"): pairs.separation(bias, same, strata["all"])}
    ranking = pairs.rank(-bias.flatten(2))
    for name, counted in strata.items():
        minus = pairs.auroc(ranking, same.flatten(1)[:, None], counted.flatten(1)[:, None])
        statistics |= {Key("bias_auroc", name, "minus"): minus, Key("bias_auroc", name, "plus"): 1 - minus}
    return statistics


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(found: Iterator[tuple[int, Statistics]], grid: Grid) -> Iterator[Row]:
    """Rows of the statistics of (layer, batch): layer by layer, in the order of `ABOUT`."""
    layers: dict[int, dict[Key, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for number, statistics in found:
        for key, values in statistics.items():
            layers[number][key].append(values.cpu())
    for (number, layer), name in itertools.product(layers.items(), ABOUT):
        for key, parts in layer.items():
            if key.name == name:
                yield from _rows_of(key, torch.cat(parts), grid, number)


def _rows_of(key: Key, values: Float[Tensor, "images heads"], grid: Grid, layer: int) -> Iterator[Row]:
    """The mean over heads, then single heads where that is told."""
    about = ABOUT[key.name]
    conditions = {"layer": layer} | _conditions(key, grid)
    protocol = f"{about.protocol}; {ON_SCENES}" if key.distance else about.protocol
    yield mean_row("grouping", key.name, values.nanmean(1), about.unit, f"{protocol}; mean of heads", **conditions)
    if about.per_head and key.distance in (None, "all") and key.sign in (None, "minus"):
        for head, single in enumerate(values.unbind(1), start=1):
            yield mean_row("grouping", key.name, single, about.unit, protocol, head=head, **conditions)


def _conditions(key: Key, grid: Grid) -> Row:
    """The fields beside layer and head: distance, sign, masks, and the value that chance gives."""
    masks = "scenes" if key.distance else None
    given = {"masks": masks, "distance": key.distance, "sign": key.sign, "chance": _chance(key.name, grid)}
    if key.name == "attention_entropy":
        given["maximum"] = given["chance"]
    return {name: value for name, value in given.items() if value is not None}


def _chance(name: str, grid: Grid) -> float | None:
    """The value that uniform attention, 1/N everywhere, gives for distance and entropy."""
    if name == "attention_distance":
        return pairs.distances(grid).mean().item()
    if name == "attention_entropy":
        return math.log(grid[0] * grid[1])
    return ABOUT[name].chance
