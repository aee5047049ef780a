"""Diagnoses an encoding in a trained model: gates, positions, tables, bias against content, gradients, with warnings.

Every number is per layer, and per axis where an encoding has axes. This file uses only what any encoding exposes:
the maps `gates*`, `positions*` and `bias`, and its parameters. A model whose layers add no bias and count no positions gets
only the position probe. Definitions: docs/evaluation/health.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.evaluation.base import LabelledImages, Row, count_images, drawn, evaluating, mean_row, placed, row
from sape2.evaluation.equivariance import centred
from sape2.evaluation.findings import findings
from sape2.evaluation.layers import Layer, layers_of, mapped
from sape2.evaluation.position import position_content

LOW, HIGH = 0.01, 0.99  # a gate beyond these hardly learns
GRADIENT_IMAGES = 64
GATES = "all gates of the layer, mean of heads"
POSITIONS = "all positions of the layer, before the table clamps them"
BIAS = "grid tokens, each row centred, which the softmax ignores; mean of heads"
UNITS = {
    "gate_mean": ("gate", GATES),
    "gate_std": ("gate", GATES),
    "gate_low_share": ("fraction", f"gates below {LOW}; {GATES}"),
    "gate_high_share": ("fraction", f"gates above {HIGH}; {GATES}"),
    "gate_saturated_share": ("fraction", f"gates below {LOW} or above {HIGH}; {GATES}"),
    "gate_slope": ("gate per logit", f"mean of g (1 - g), at most 0.25; {GATES}"),
    "position_mean": ("table rows", POSITIONS),
    "position_clamped_share": ("fraction", f"positions beyond the last row of the table; {POSITIONS}"),
    "bias_mean": ("logits", "mean over all pairs of grid tokens and heads"),
    "bias_std": ("logits", "standard deviation over all pairs of grid tokens; mean of heads"),
    "bias_row_std": ("logits", f"root mean square of the bias; {BIAS}"),
    "content_row_std": ("logits", f"root mean square of the logits without the bias; {BIAS}"),
    "bias_to_content": ("ratio", f"bias_row_std / content_row_std; {BIAS}"),
    "bias_variance_share": ("fraction", f"cov(bias, logits) / var(logits), the Shapley share of the variance; {BIAS}"),
    "bias_content_correlation": ("correlation", f"of the bias with the logits without it; {BIAS}"),
}


def health(model: nn.Module, data: LabelledImages, limit: int | None = None, batch_size: int = 32) -> Iterator[Row]:
    """Gates, positions, table use, bias against content, gradients, position probe; warnings in words.

    `limit`: so many images, drawn by class (None: 1,000); gradients are those of 64 of them.
    """
    mapped(model, "health")
    number = count_images(data, limit, "health")
    batches = (layers_of(model, images) for images, _ in drawn(data, number).batches(batch_size))
    rows = [*layer_rows(batches, encodings_of(model)), *parameter_rows(model, data, number)]
    yield from rows
    yield from position_content("health", model, data, number, batch_size)
    if rows:
        yield from findings(rows)


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_rows(batches: Iterable[Iterable[Layer]], encodings: Mapping[int, nn.Module]) -> Iterator[Row]:
    """Rows about the maps of every layer, means over images; and about the tables, which of their rows are read.

    `batches` are the layers of each batch of images, `encodings` those of the layers by number (`encodings_of`).
    """
    found: dict[tuple, list[Tensor]] = defaultdict(list)
    tables: dict[tuple, TableUse] = {}
    for layers in batches:
        for layer in layers:
            encoding = encodings.get(layer.number)
            for (name, axis), values in layer_statistics(layer, encoding).items():
                found[layer.number, axis, name].append(values.cpu())
            for axis, (positions, num_rows) in tabled_positions(layer.maps, encoding).items():
                tables.setdefault((layer.number, axis), TableUse(num_rows)).add(positions)
    for (number, axis, name), values in found.items():
        unit, protocol = UNITS[name]
        yield mean_row("health", name, torch.cat(values), unit, protocol, **_place(number, axis))
    for (number, axis), use in tables.items():
        yield from use.rows(**_place(number, axis))


def _place(layer: int, axis: str | None) -> Row:
    return {"layer": layer} | ({"axis": axis} if axis else {})


def layer_statistics(layer: Layer, encoding: nn.Module | None) -> dict[tuple[str, str | None], Float[Tensor, " batch"]]:
    """(name, axis) -> one number an image."""
    found: dict[tuple[str, str | None], Tensor] = {}
    for axis, gates in _by_axis(layer.maps, "gates").items():
        found |= {(name, axis): value for name, value in gate_statistics(gates).items()}
    for axis, (positions, num_rows) in tabled_positions(layer.maps, encoding).items():
        found |= {(name, axis): value for name, value in position_statistics(positions, num_rows).items()}
    if layer.bias is not None:
        statistics = bias_statistics(layer.attention, layer.bias, torch.finfo(layer.maps["attention"].dtype).tiny)
        found |= {(name, None): value for name, value in statistics.items()}
    return found


def gate_statistics(gates: Float[Tensor, "batch ..."]) -> dict[str, Float[Tensor, " batch"]]:
    """Mean, spread and saturation of the gates; the slope g (1 - g) is what a gate passes on of its gradient."""
    gates = gates.double().flatten(1)
    low, high = (gates < LOW).double().mean(1), (gates > HIGH).double().mean(1)
    return {
        "gate_mean": gates.mean(1),
        "gate_std": gates.std(1, unbiased=False),
        "gate_low_share": low,
        "gate_high_share": high,
        "gate_saturated_share": low + high,
        "gate_slope": (gates * (1 - gates)).mean(1),
    }


def position_statistics(positions: Float[Tensor, "batch ..."], num_rows: int) -> dict[str, Float[Tensor, " batch"]]:
    """Mean position, and the share that lies beyond the last row (num_rows - 1) and reads that row without a gradient."""
    positions = positions.double().flatten(1)
    return {
        "position_mean": positions.mean(1),
        "position_clamped_share": (positions > num_rows - 1).double().mean(1),
    }


def bias_statistics(
    attention: Float[Tensor, "batch heads tokens tokens"], bias: Float[Tensor, "batch heads tokens tokens"], tiny: float = 0.0
) -> dict[str, Float[Tensor, " batch"]]:
    """Splits the logits a into bias b and content c = a - b, all row-centred, and returns the share of each.

    The logits are recovered from the attention weights: ln A is a up to a constant per row, which centring removes. Weights
    below `tiny` count as `tiny`. The share of the bias is cov(b, a) / var(a): of all splits of var(b + c) the Shapley value
    (arXiv:1606.09424), var(b) + cov(b, c), so that the shares of bias and content add up to 1; it is negative, or above 1,
    where one works against the other.
    """
    attention, bias = attention.double(), bias.double()
    logits, added = centred(attention.clamp_min(tiny).log()), centred(bias)
    content = logits - added
    var_b, var_c, var_a = (values.square().mean((-1, -2)) for values in (added, content, logits))  # (B, h)
    together = (added * content).mean((-1, -2))
    statistics = {
        "bias_mean": bias.mean((-1, -2)),
        "bias_std": bias.std((-1, -2), unbiased=False),
        "bias_row_std": var_b.sqrt(),
        "content_row_std": var_c.sqrt(),
        "bias_to_content": (var_b / var_c).sqrt(),
        "bias_variance_share": (var_b + together) / var_a,
        "bias_content_correlation": together / (var_b * var_c).sqrt(),
    }
    return {name: values.nanmean(1) for name, values in statistics.items()}


class TableUse:
    """Records which rows of a table are read by interpolation (the two next to each position) and the range of positions."""

    def __init__(self, num_rows: int) -> None:
        self.read = torch.zeros(num_rows, dtype=torch.bool)
        self.largest = 0.0
        self.images = 0

    def add(self, positions: Float[Tensor, "batch ..."]) -> None:
        self.images += len(positions)
        self.largest = max(self.largest, positions.max().item())
        read = positions.clamp(0, len(self.read) - 1)
        for rows in (read.floor(), read.ceil()):
            self.read[rows.long().unique().cpu()] = True

    def rows(self, **place: Any) -> Iterator[Row]:
        share = self.read.double().mean().item()
        yield row("health", "position_max", self.largest, "table rows", self.images, f"largest of {POSITIONS}", **place)
        yield row("health", "table_rows", float(len(self.read)), "rows", self.images, "rows of the table of positions", **place)
        yield row("health", "table_use", share, "fraction", self.images, "rows that any position of any image reads", **place)


# --- encodings -------------------------------------------------------------------------------------------------------


def encodings_of(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> its attention encoding: whatever the modules of the model call their `encoding`, in order, from 1."""
    found = (getattr(module, "encoding", None) for module in model.modules())
    return dict(enumerate((encoding for encoding in found if isinstance(encoding, nn.Module)), start=1))


def tabled_positions(maps: dict[str, Tensor], encoding: nn.Module | None) -> dict[str, tuple[Tensor, int]]:
    """Axis -> (positions, rows of the table that they read), for every encoding of the layer that counts positions."""
    parts = [part for part in (encoding.modules() if encoding is not None else ()) if hasattr(part, "num_positions")]
    found = {}
    for axis, positions in _by_axis(maps, "positions").items():
        table = "table" if axis == RASTER else f"table_{axis}"
        rows = next((len(getattr(part, table)) for part in parts if hasattr(part, table)), None)
        if rows is not None:
            found[axis] = positions, rows
    return found


RASTER = "sequence"  # what an axis is called whose maps have no name for it: CoPE's, along all tokens


def _by_axis(maps: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """`gates_x`, `gates_y`, `gates` -> {"x": ..., "y": ..., "sequence": ...}."""
    found = {key.removeprefix(name).removeprefix("_"): values for key, values in maps.items() if key.startswith(name)}
    return {axis or RASTER: values for axis, values in found.items()}


def parameter_rows(model: nn.Module, data: LabelledImages, limit: int) -> Iterator[Row]:
    """Size and gradient of every parameter of the attention encodings, single numbers per head, and dead points."""
    gradients = _gradients(model, data, limit)
    for layer, encoding in encodings_of(model).items():
        for name, parameter in encoding.named_parameters():
            yield from _rows_of_parameter(parameter.detach().double(), gradients.get(id(parameter)), layer, name)
        if any(True for _ in encoding.parameters()) and hasattr(encoding, "check_trainable"):
            yield _dead(encoding, layer)


def _rows_of_parameter(parameter: Tensor, gradient: tuple[float, int] | None, layer: int, name: str) -> Iterator[Row]:
    place = {"layer": layer, "parameter": name}
    size = parameter.square().mean().sqrt().item()
    yield row("health", "parameter_rms", size, "parameter", parameter.numel(), "root mean square of its entries", **place)
    if parameter.ndim == 1:  # one number a head: gain, gate_scale, slopes
        for head, value in enumerate(parameter.tolist(), start=1):
            yield row("health", "parameter_value", value, "parameter", 1, "the learned number of the head", head=head, **place)
    if gradient is not None:
        protocol = "root mean square of the gradient of the mean cross-entropy, evaluation mode"
        yield row("health", "gradient_rms", gradient[0], "nats per parameter", gradient[1], protocol, **place)


def _dead(encoding: Any, layer: int) -> Row:
    """1 for a point from which the encoding cannot learn, by its own `check_trainable`."""
    protocol = "1 where the encoding says that it stands at a point from which it cannot learn"
    try:
        encoding.check_trainable()
    except ValueError as error:
        return row("health", "dead", 1.0, "yes or no", 1, protocol, layer=layer, message=str(error))
    return row("health", "dead", 0.0, "yes or no", 1, protocol, layer=layer)


def _gradients(model: nn.Module, data: LabelledImages, limit: int) -> dict[int, tuple[float, int]]:
    """id of each parameter of the attention encodings -> (root mean square gradient, images it was taken on)."""
    parameters = {id(p): p for encoding in encodings_of(model).values() for p in encoding.parameters() if p.requires_grad}
    if not parameters:
        return {}
    number = min(limit, GRADIENT_IMAGES)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        images, labels = next(drawn(data, number).batches(number))
        logits = model(placed(images, model)).float()
        loss = F.cross_entropy(logits, labels.clone().to(logits.device))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        key: (0.0 if gradient is None else gradient.double().square().mean().sqrt().item(), len(images))
        for key, gradient in zip(parameters, gradients, strict=True)
    }
