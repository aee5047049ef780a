"""Warnings about the numbers of `health`, in words: one for each limit that a layer exceeds, with advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sape2.evaluation.base import Row, row

Numbers = dict[str, float]


@dataclass(frozen=True)
class Rule:
    """A warning about the number `of`: when, and in which words. Both see all numbers of the same layer and axis."""

    name: str
    of: str
    limit: str
    breaks: Callable[[Numbers], bool]
    words: Callable[[str, Numbers], str]


RULES = (
    Rule(
        "warning_saturated_gates",
        "gate_saturated_share",
        "more than 25 % of gates that vary lie outside 0.01..0.99",
        lambda n: n["gate_saturated_share"] > 0.25 and n["gate_std"] > 1e-6,
        lambda where, n: (
            f"gates of {where} are saturated ({n['gate_saturated_share']:.0%} outside 0.01..0.99; mean slope "
            f"{n['gate_slope']:.3f} of at most 0.25), so they hardly learn: use gate_scale=sqrt_dim or learned, or qk_norm"
        ),
    ),
    Rule(
        "warning_clamped_positions",
        "position_clamped_share",
        "more than 5 % of the positions lie beyond the table",
        lambda n: n["position_clamped_share"] > 0.05,
        lambda where, n: (
            f"{n['position_clamped_share']:.0%} of the positions of {where} lie beyond the last of {n['table_rows']:.0f} rows "
            f"of the table and all read that row, without a gradient: use num_positions={math.ceil(n['position_max']) + 1}, "
            "or beyond=rescale on grids larger than in training"
        ),
    ),
    Rule(
        "warning_unused_rows",
        "table_use",
        "less than half of the rows of the table are ever read",
        lambda n: n["table_use"] < 0.5,
        lambda where, n: (
            f"only {n['table_use']:.0%} of the {n['table_rows']:.0f} rows of the table of {where} are ever read (positions "
            f"reach {n['position_max']:.1f}); the others never train: a smaller num_positions does the same"
        ),
    ),
    Rule(
        "warning_constant_bias",
        "bias_row_std",
        "the row-centred bias is below 0.01 logits",
        lambda n: n["bias_row_std"] < 0.01,
        lambda where, n: (
            f"the bias of {where} is all but constant along each row ({n['bias_row_std']:.2g} logits), so it changes no "
            "attention weight by more than about 1 %: it is untrained, dead or switched off (gain, table)"
        ),
    ),
    Rule(
        "warning_bias_dominates",
        "bias_to_content",
        "the bias varies more than 3 times as much as the content logits",
        lambda n: n["bias_to_content"] > 3,
        lambda where, n: (
            f"the bias of {where} varies {n['bias_to_content']:.1f} times as much as the content logits, which hardly matter "
            "any more: use divide_bias=true, normalize=sqrt_length or sign=learned"
        ),
    ),
    Rule(
        "warning_no_gradient",
        "gradient_rms",
        "the gradient is exactly 0",
        lambda n: n["gradient_rms"] == 0,
        lambda where, _: (
            f"no gradient reaches {where}, so it never trains; in the last layer under a class token that is by construction "
            "(the class token is not biased and nothing reads the patches): use pool=mean if the bias shall act there"
        ),
    ),
)


def findings(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows warning_*, each with a `message`, and at the end `warnings`, their number (0 says that no limit is broken)."""
    groups: dict[tuple, list[Row]] = {}
    for given in rows:
        groups.setdefault((given["layer"], given.get("axis"), given.get("parameter")), []).append(given)
    warnings = [warning for group in groups.values() for warning in _warnings(group)]
    yield from warnings
    yield row(
        "health", "warnings", float(len(warnings)), "warnings", len(groups), "broken limits, of all layers, axes and parameters"
    )


def _warnings(group: list[Row]) -> Iterator[Row]:
    numbers = {given["name"]: given["value"] for given in group if given["value"] is not None and "head" not in given}
    place = {key: group[0][key] for key in ("layer", "axis", "parameter") if key in group[0]}
    for rule in RULES:
        if rule.of in numbers and rule.breaks(numbers):
            measured = next(given for given in group if given["name"] == rule.of)
            message = rule.words(_where(place), numbers)
            yield row(
                "health", rule.name, numbers[rule.of], measured["unit"], measured["n"], rule.limit, **place, message=message
            )
    for given in group:
        if given["name"] == "dead" and given["value"]:
            message = f"layer {given['layer']}: {given['message']}"
            yield row("health", "warning_dead", 1.0, given["unit"], 1, given["protocol"], **place, message=message)


def _where(place: Row) -> str:
    layer = f"layer {place['layer']}"
    if "parameter" in place:
        return f"{place['parameter']} of {layer}"
    return f"{layer}, axis {place['axis']}" if "axis" in place else layer
