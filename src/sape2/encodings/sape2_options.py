"""The switches of SaPE2, the settings of them that are worth a comparison, and the symmetries that they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sape2.encodings.base import Facts
from sape2.encodings.counting import Beyond, check_num_positions
from sape2.encodings.counting.readable import Count

PRESETS: dict[str, dict[str, Any]] = {"listing": {}, "equations": {"gate_scale": "none", "divide_bias": True}}
VARIANTS: dict[str, str] = {
    "preset=equations": "unscaled gates, bias divided by sqrt(d): eq. 9 and 16 instead of the listing of App. D",
    "dot=key": "the key meets the table instead of the query: SaPE2(K) in the text of the paper",
    "num_positions=10": "ten positions on every grid: the development code, clamps long counts",
    "gate_scale=learned": "one learned gate scale per head, between eq. 9 and App. D",
    "gates=constant": "every gate 1/2: what is left without content (ablation)",
    "gates=none": "every gate 1, plain counting (ablation)",
    "gates=none,count=between,readout=direct": "no gates at all: contextual relative columns and rows (ablation)",
    "axes=x": "rows only (ablation of the 2D decomposition)",
    "axes=y": "columns only (ablation of the 2D decomposition)",
    "axes=raster": "one line through the whole image, as in CoPE (ablation of the 2D decomposition)",
    "count=prefix": "counts from the start of the line to the patch (ablation)",
    "count=both": "counts from both ends, exact under flips (ours)",
    "count=between": "counts from the patch itself to the other, either way (ours, after CoPE)",
    "count=cyclic": "counts that go round at the end of the line, exact under circular shifts (ours)",
    "readout=squared_distance": "squared distances, a dot product: no N x N map (ours)",
    "readout=direct": "z_i at the column and row of the other patch, a dot product: CoPE's read-out on two axes (ours)",
    "readout=direct,count=between": "CoPE carried to two axes, exact under translation (ours)",
    "sign=minus": "similar patches attend to each other: the prose instead of eq. 16",
    "sign=learned": "one learned gain per head decides (ours)",
    "normalize=sqrt_length": "vectors divided by the root of the line length, so that larger grids are not sharper (ours)",
}


@dataclass(frozen=True)
class SaPE2Options:
    """Every switch; the first value of each is the paper's listing (App. D). What each is for: docs/method.md."""

    dot: Literal["query", "key"] = "query"
    gates: Literal["content", "constant", "none"] = "content"
    gate_scale: Literal["sqrt_dim", "none", "learned"] = "sqrt_dim"
    count: Count = "suffix"
    axes: Literal["xy", "x", "y", "raster"] = "xy"
    readout: Literal["distance", "squared_distance", "direct"] = "distance"
    sign: Literal["plus", "minus", "learned"] = "plus"
    divide_bias: bool = False
    normalize: Literal["none", "sqrt_length"] = "none"
    num_positions: int | None = None
    beyond: Beyond = "clamp"
    gain_init: float | None = None
    table_std: float = 0.02

    def __post_init__(self) -> None:
        check_num_positions("sape2", self.num_positions)
        if not self.table_std > 0:
            raise ValueError(
                f"sape2:table_std must be above 0: an all-zero table makes every distance and every gradient 0 and "
                f"never trains; got {self.table_std}. To start without effect use sign=learned,gain_init=0"
            )
        if self.gain_init is not None and self.sign != "learned":
            raise ValueError(f"sape2:gain_init needs sign=learned; with sign={self.sign} there is no gain to set")
        if self.gates != "content" and self.gate_scale == "learned":
            raise ValueError(f"sape2:gate_scale=learned has no effect with gates={self.gates}")


def facts_of(o: SaPE2Options) -> Facts:
    """The symmetries of a count, by the patches it depends on: a whole line, the part to one end of it, or only i to n."""
    static, direct, raster = o.gates != "content", o.readout == "direct", o.axes == "raster"
    if static and not direct and o.count in ("suffix", "prefix", "both"):  # P2: every i counts the same
        return Facts(True, True, True, True, True, True)
    offset_only = (o.count == "between" and not raster) or (static and o.count in ("between", "cyclic"))
    return Facts(
        content_dependent=True,
        translation=(direct and offset_only) or (static and o.count == "cyclic"),
        row_permutation=o.axes == "x",  # P4: whole rows may be permuted for b^x, whole columns for b^y
        column_permutation=o.axes == "y",
        circular_shift=o.count == "cyclic" and not raster,  # P10
        flip=o.count in ("both", "between") and not raster,  # a flip only swaps what the two ends count
    )
