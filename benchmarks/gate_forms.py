"""The forms of the first search of docs/decisions/0012-gates.md, each against its own control without content.

Command:  python benchmarks/gate_forms.py run NAME [NAME ...] --seeds 1,2 --data DIR --out DIR     trains these forms
          ... --patch 2                                        on a grid of 16x16 instead of 8x8
          ... --images placed_cifar10                          on those of benchmarks/placed.py, in DIR too
          python benchmarks/gate_forms.py                                                          prints the table

Names are encodings of the package, and the six of this file: `counted`, `opened`, `halved`, `faded`, `parted`, `decayed`.
Every run is three epochs of `cifar10_sprint` with the rates of stage one_rate (`benchmarks/sprint_plan.py`) and becomes a
line of benchmarks/results/gate_forms.jsonl. Those six are no part of the package: none is better than what the package has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import sprint
import sprint_plan
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timing import RESULTS, Row
from torch import Tensor, nn

from sape2.encodings import ATTENTION_ENCODINGS
from sape2.encodings.base import AttentionEncoding
from sape2.encodings.bias import PLACE_AXES, AttentionBias, Places
from sape2.encodings.content import Content, Vectors
from sape2.encodings.counting import form_for
from sape2.encodings.counting.readable import sides
from sape2.encodings.forget import Forget, forgotten
from sape2.encodings.grid import (
    Axis,
    Grid,
    coordinates,
    from_lines,
    line_coordinate,
    line_length,
    num_prefix_tokens,
    to_lines,
)
from sape2.encodings.precision import full_precision, no_autocast
from sape2.encodings.rotary import turn
from sape2.encodings.sape2 import LineMaps, SaPE2, content_gates, line_products
from sape2.encodings.sape2_options import SaPE2Options
from sape2.runs.rows import read_rows
from sape2.studies.compare.paired import paired_difference
from sape2.studies.compare.rawrows import final_accuracy, final_validation_accuracy
from sape2.studies.compare.summary import difference, grouped
from sape2.tables import markdown_table

ROWS = RESULTS / "gate_forms.jsonl"
PATCH = 4  # pixels a side, of the recipe
IMAGES = "cifar10"
TEMPERATURE = 100.0  # of the frequencies, as in rope
CONTROLS = (  # form, and what is left of it without content
    ("counted", "rope"),
    ("counted:mode=shift", "rope"),
    ("counted:mode=wide", "rope"),
    ("opened+rope", "opened:const=1+rope"),
    ("opened:own=8+rope", "opened:const=1+rope"),
    ("rope+sape2:readout=direct", "rope+sape2:gates=constant,readout=direct"),
    ("sape2:readout=direct", "sape2:gates=constant,readout=direct"),
    *((f"halved{part}", "sape2:gates=constant,readout=direct") for part in ("", ":reads=end")),
    ("sape2:readout=direct", "halved:reads=end"),
    ("sape2:readout=direct", "sape2:count=between,gates=none,readout=direct"),  # offsets without gates
    *(
        (f"{base}sape2:count=between,readout=direct", f"{base}sape2:count=between,gates=none,readout=direct")
        for base in ("rope+", "")
    ),
    ("decayed", "decayed:const=1"),
    *((f"forget{start}", f"faded{start}") for start in ("", ":start=2", ":start=0")),
    *(("forget:start=2", f"faded:start={start}") for start in (0, -1)),  # controls that start more closed
    *((f"parted{part}", "faded:start=0") for part in ("", ":start=2", ":reads=end", ":reads=end,start=2")),
    ("parted:reads=end", "forget:start=2"),
    ("forget:start=2+rope", "faded:start=0+rope"),
    ("cpe+forget:start=2+log_cpb", "cpe+faded:start=0+log_cpb"),
)


@dataclass(frozen=True)
class CountedOptions:
    """count: places are sums of 2 sigmoid(a); wide: of softplus gates, 1 at a = 0; shift: a place is moved by tanh(a)."""

    mode: Literal["count", "wide", "shift"] = "count"


class Counted(AttentionEncoding):
    """Rotations as in `rope`, by places that depend on content: a_n = w . k_n / sqrt(d) + c, for each head and axis.

    At the start w and c are 0, and it is `rope`, shifted by one patch.
    """

    name = "counted"
    Options = CountedOptions
    summary = "rotations by counts of content"
    source = "a form of the search, not of the package"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.weight = nn.Parameter(torch.zeros(2, num_heads, head_dim))
        self.offset = nn.Parameter(torch.zeros(2, num_heads))

    def rotate(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        if num_prefix_tokens(q.shape[-2], grid):
            raise ValueError("counted is for models without prefix tokens")
        with no_autocast(q):
            k_full = full_precision(k)
            gates = torch.einsum("bhnd,ahd->abhn", k_full, self.weight) * self.head_dim**-0.5 + self.offset[:, None, :, None]
            planes = self.head_dim // 4
            frequencies = TEMPERATURE ** (-torch.arange(planes, dtype=k_full.dtype, device=k.device) / planes)
            axes: tuple[Axis, ...] = ("x", "y")
            places = [self._places(gate, grid, axis) for gate, axis in zip(gates, axes, strict=True)]
            angles = torch.cat([place[..., None] * frequencies for place in places], -1)
            return turn(q, angles), turn(k, angles)

    def _places(
        self, gates: Float[Tensor, "batch heads tokens"], grid: Grid, axis: Axis
    ) -> Float[Tensor, "batch heads tokens"]:
        if self.options.mode == "shift":
            return coordinates(grid, gates.device)[:, {"y": 0, "x": 1}[axis]] + torch.tanh(gates)
        unit = torch.expm1(gates.new_ones(())).log()  # softplus of it is 1
        opened = 2 * torch.sigmoid(gates) if self.options.mode == "count" else F.softplus(gates + unit)
        return from_lines(to_lines(opened[..., None], grid, axis).cumsum(-2), axis)[..., 0]


@dataclass(frozen=True)
class OpenedOptions(SaPE2Options):
    """`start`: the first offset of the gates; `own`: channels of their projections, 0 for q.k; `const`: gates sigmoid(c)."""

    readout: Literal["distance", "squared_distance", "direct"] = "direct"
    start: float = 4.0
    own: int = 0
    const: int = 0


class Opened(SaPE2):
    """SaPE2 with a learned offset c of the gates of each head and axis, which start open: sigmoid(4) = 0.98."""

    name = "opened"
    Options = OpenedOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    variants: ClassVar[dict[str, str]] = {}

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.score_axes = ()
        self.offset = nn.Parameter(torch.full((2, num_heads), self.options.start))
        if own := self.options.own:
            self.to_queries = nn.Parameter(torch.randn(2, num_heads, head_dim, own) * head_dim**-0.5)
            self.to_keys = nn.Parameter(torch.zeros(2, num_heads, head_dim, own))

    def _gates(self, content: Content, axis: Axis) -> Float[Tensor, "batch heads tokens length"]:
        number, q, k = {"x": 0, "y": 1}[axis], content.q, content.k
        offset = self.offset[number][:, None, None]
        if self.options.const:
            shape = (*q.shape[:3], line_length(content.grid, axis))
            return torch.sigmoid(offset).expand(shape)
        if self.options.own:
            q, k = q @ self.to_queries[number], k @ self.to_keys[number]
        return content_gates(line_products(q, k, content.grid, axis) * q.shape[-1] ** -0.5 + offset, 1.0)


@dataclass(frozen=True)
class HalvedOptions(SaPE2Options):
    """`reads`: the gates of a count that read content. way: of the patches behind the one met; end: of that one alone."""

    readout: Literal["distance", "squared_distance", "direct"] = "direct"
    reads: Literal["way", "end"] = "way"


class Halved(SaPE2):
    """SaPE2 with a part of the gates of its suffix counts; the others are 1/2, as constant gates are."""

    name = "halved"
    Options = HalvedOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    variants: ClassVar[dict[str, str]] = {}

    def _line_maps(self, content: Content, form: ModuleType) -> dict[Axis, LineMaps]:
        return super()._line_maps(content, _HalfForm(form, self.options.reads))


class _HalfForm:
    """Counts of which content moves one part; all else is that of the form inside."""

    def __init__(self, form: ModuleType, reads: Literal["way", "end"]) -> None:
        self.form, self.reads, self.interpolate = form, reads, form.interpolate

    def count_positions(self, gates: Tensor, count: Literal["suffix"], place: Tensor) -> Tensor:
        at_end = gates - 0.5
        if self.reads == "way":
            return self.form.count_positions(gates, count, place) - at_end
        return self.form.count_positions(torch.full_like(gates, 0.5), count, place) + at_end


class Faded(Forget):
    """`forget` with gates that do not read the tokens: sigmoid(c), learned for each head, axis and direction."""

    name = "faded"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        weight = torch.zeros_like(self.weight)
        del self.weight
        self.register_buffer("weight", weight, persistent=False)


@dataclass(frozen=True)
class PartedOptions:
    """`reads`: the gates that read tokens. way: those strictly between two patches; end: the last one, of i or of n."""

    start: float = 0.0
    reads: Literal["way", "end"] = "way"


class Parted(Forget):
    """`forget` in two parts: on the way and at its end. The gates of one part read the tokens, the others are sigmoid(c)."""

    name = "parted"
    Options = PartedOptions

    def make_bias(self, content: Content) -> AttentionBias:
        if any(content.seen(axis) is not None for axis in PLACE_AXES):
            raise ValueError("parted is for images whose patches all see each other")
        with no_autocast(content.q):
            read = self.log_gates(content)
            plain = F.logsigmoid(full_precision(self.offset)[:, :, None, :, None]).expand_as(read)
            on_way, at_end = (read, plain) if self.options.reads == "way" else (plain, read)
            change = at_end - on_way
            places = (
                forgotten(*on_way[number], content, axis) + last_gates(*change[number], content, axis)
                for number, axis in enumerate(PLACE_AXES)
            )
            return AttentionBias(Places(*places), dtype=content.q.dtype)


def last_gates(
    backwards: Float[Tensor, "batch heads tokens"], onwards: Float[Tensor, "batch heads tokens"], content: Content, axis: Axis
) -> Float[Tensor, "batch heads tokens length"]:
    """The last gate between a patch and every place m of its line: backwards the patch's own, onwards that of m."""
    length = line_length(content.grid, axis)
    after, before = sides(length, line_coordinate(content.grid, axis, onwards.device))
    lines = to_lines(onwards[..., None], content.grid, axis).transpose(-2, -1)  # (..., lines, 1, S)
    return backwards[..., None] * before + from_lines(lines.expand(*lines.shape[:-2], length, -1), axis) * after


@dataclass(frozen=True)
class DecayedOptions:
    """`slope`: the first decay of a step through an open gate; `const`: gates sigmoid(c)."""

    slope: float = 0.25
    const: int = 0


class Decayed(AttentionEncoding):
    """SaPE2's gates without its table: b_in = -r (p^x_in + p^y_in), p the count between i and n of sigmoid(s q_i.k_j + c).

    The rate r > 0 of each head and axis is learned by its logarithm, the scale s of each head and axis from 1/sqrt(d), the
    offset c from 0. So a step costs `slope` / 2 at the start, with and without content.
    """

    name = "decayed"
    Options = DecayedOptions
    summary = "decay by counts of content"
    source = "a form of the search, not of the package"

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        self.log_rate = nn.Parameter(torch.full((2, num_heads, 1, 1), self.options.slope).log())
        self.offset = nn.Parameter(torch.zeros(2, num_heads, 1, 1))
        if not self.options.const:
            self.scale = nn.Parameter(torch.full((2, num_heads, 1, 1), head_dim**-0.5))

    def make_bias(self, content: Content) -> AttentionBias:
        with no_autocast(content.q):
            full = content.in_full_precision()
            rates = full_precision(self.log_rate).exp()
            return AttentionBias(
                Places(*(-rates[number] * self._counts(full, axis, number) for number, axis in enumerate(PLACE_AXES))),
                dtype=content.q.dtype,
            )

    def _counts(self, content: Content, axis: Axis, number: int) -> Float[Tensor, "batch heads tokens length"]:
        place, offset = line_coordinate(content.grid, axis, content.q.device), full_precision(self.offset)[number]
        if self.options.const:
            gates = torch.sigmoid(offset).expand(*content.q.shape[:3], line_length(content.grid, axis))
        else:
            products = full_precision(self.scale)[number] * line_products(content.q, content.k, content.grid, axis)
            gates = content_gates(products + offset, 1.0)
        return form_for(content.q, content.k, offset).count_positions(gates, "between", place)


FORMS = {"counted": Counted, "opened": Opened, "halved": Halved, "faded": Faded, "parted": Parted, "decayed": Decayed}


def trials(names: Iterable[str], seeds: Iterable[int], patch: int = PATCH, images: str = IMAGES) -> Iterator[sprint_plan.Trial]:
    """The runs of `sprint_plan.one_rate`, with patches of this many pixels a side, on these images."""
    settings = () if patch == PATCH else (f"model.patch_size={patch}",)
    settings += () if images == IMAGES else (f"data.name={images}",)
    return (replace(trial, settings=(*trial.settings, *settings)) for trial in sprint_plan.one_rate(names, seeds))


def table(rows: list[Row]) -> str:
    """Each form and its control: validation accuracy that chose it (seed 1), test accuracy in pairs of a seed."""
    plain = sprint_plan.rows_of(read_rows(sprint_plan.ROWS), *sprint_plan.QUARTERS)
    kept = {row["digest"]: row for row in [*plain, *rows]}.values()
    lines = []
    for images, patch in sorted({_setting(row) for row in kept}, key=lambda setting: (setting[0], -setting[1])):
        same = [row for row in kept if _setting(row) == (images, patch)]
        tested, chosen = grouped(same, final_accuracy), grouped(same, final_validation_accuracy)
        for form, control in CONTROLS:
            if pair := paired_difference(tested.get(form, {}), tested.get(control, {})):
                line = {"form": f"`{form}`", "control": f"`{control}`", "images": images, "patch": str(patch), "n": pair.n}
                line |= {"seed 1, validation": f"{chosen[form][1]:.4f}", "control's": f"{chosen[control][1]:.4f}"}
                lines.append(line | {DIFFERENCE: difference(pair)})
    return markdown_table(lines, ["form", "control", "images", "patch", "seed 1, validation", "control's", "n", DIFFERENCE])


DIFFERENCE = "form minus control, test"


def _setting(row: Row) -> tuple[str, int]:
    """The images of a run, and its patches."""
    settings = row["settings"]
    return settings["data"]["name"], settings["model"]["patch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=["run", "table"], default="table")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1])
    parser.add_argument("--patch", type=int, default=PATCH, help="pixels a side of a patch")
    parser.add_argument("--images", default=IMAGES, help="the folder in --data that they are from")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs") / "gate_forms")
    given = parser.parse_args()
    if given.command == "table":
        print(table(read_rows(ROWS)))
        return
    if not (given.names and given.data):
        parser.error("run needs --data DIR and names of forms")
    ATTENTION_ENCODINGS.update(FORMS)
    torch.set_num_threads(1)
    for trial in trials(given.names, given.seeds, given.patch, given.images):
        sprint.train(trial, "gate_forms", given.data, given.out, ROWS)


if __name__ == "__main__":
    main()
