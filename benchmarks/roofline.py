"""The training step of vit_nano under each encoding: measured, and what this machine allows for its operations.

Command:  python benchmarks/roofline.py [--threads 1]        (about four minutes on one CPU core; nothing else may run)

Every operation of a step is counted while it runs: the bytes of the tensors that it reads and writes, and the operations of
matrix products and convolutions. The machine allows it bytes / bandwidth or operations / rate, whichever is longer; `allowed`
is the sum over the step. Bandwidth is that of a copy, the rate that of a product of the sizes of the MLP, both measured first.
Steps of all encodings take turns, and `measured` is the median. Writes benchmarks/results/roofline.jsonl, prints a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import Row, compare, conditions, parser, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sape2 import create_model
from sape2.evaluation.cost.measure import TrainingStep
from sape2.evaluation.cost.timing import alternate
from sape2.machine import keep_freed_memory
from sape2.tables import markdown_table

IMAGES, TOKENS, DIM = 128, 64, 96
ENCODINGS = [
    "ape", "rope", "cpe", "cpe+key_table", "rope+key_table", "cpe+rope+key_table",
    "cpe+rope", "rope+sape2:readout=direct,gates=constant", "cpe+rope+sape2:readout=direct,gates=constant",
    "log_cpb", "cpe+log_cpb", "cpe+log_cpb+sape2:readout=direct,gates=constant",
    "ape+sape2:readout=direct", "rope+sape2:readout=direct", "ape+sape2", "ape+cope", "ape+rpe_contextual",
]  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ["encoding", "precision", "measured ms", "to ape", "allowed ms", "allowed to ape", "G operations", "GB moved"]


class Counter(TorchDispatchMode):
    """Adds up what the operations move and compute, and the time that a machine of this bandwidth and rate needs for them."""

    def __init__(self, bandwidth: float, rate: float) -> None:
        super().__init__()
        self.bandwidth, self.rate = bandwidth, rate
        self.bytes, self.operations, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in EMPTY:
            return out
        moved = sum(size(t) for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor))
        count = flop_registry.get(func.overloadpacket)
        operations = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
        self.bytes, self.operations = self.bytes + moved, self.operations + operations
        self.seconds += max(moved / self.bandwidth, operations / self.rate)
        return out


EMPTY = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}


def size(tensor: Tensor) -> int:
    """Bytes of the elements that differ: those of an expanded tensor count once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes, of tensors as large as the activations of a layer."""
    source = torch.randn(IMAGES * TOKENS, 4 * DIM)
    target = torch.empty_like(source)
    return 2 * size(source) / median_seconds(partial(target.copy_, source))


def rate(dtype: torch.dtype) -> float:
    """Operations a second of the first product of an MLP."""
    x, weight = torch.randn(IMAGES * TOKENS, DIM, dtype=dtype), torch.randn(4 * DIM, DIM, dtype=dtype)
    return 2 * x.numel() * len(weight) / median_seconds(partial(F.linear, x, weight))


def median_seconds(step: Callable[[], object]) -> float:
    return statistics.median(alternate({"step": step}, repeats=50)["step"])


def make_step(encoding: str, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    model = create_model("vit_nano", encoding=encoding, image_size=32, patch_size=4, num_classes=10, pool="mean")
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))
    cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    return partial(cast(TrainingStep(model)), images, labels)


def measure(precision: str, rounds: int) -> list[Row]:
    """One row for each encoding."""
    dtype = PRECISIONS[precision]
    steps = {encoding: make_step(encoding, dtype) for encoding in ENCODINGS}
    machine = {"bandwidth": bandwidth(), "rate": rate(dtype)}
    counters = {}
    for encoding, step in steps.items():
        step()
        with Counter(**machine) as counters[encoding]:
            step()
    rows = []
    for encoding, result in compare(steps, rounds).items():
        counter = counters[encoding]
        counted = {"bytes": counter.bytes, "operations": counter.operations, "allowed_ms": 1e3 * counter.seconds}
        rows.append({"encoding": encoding, "precision": precision} | result | counted | machine)
    return rows


def table(rows: list[Row]) -> str:
    first = {row["precision"]: row for row in reversed(rows) if row["encoding"] == ENCODINGS[0]}
    lines = [
        {
            "encoding": f"`{row['encoding']}`",
            "precision": row["precision"],
            "measured ms": f"{row['ms']:.0f}",
            "to ape": f"{row['ms'] / first[row['precision']]['ms']:.2f}",
            "allowed ms": f"{row['allowed_ms']:.0f}",
            "allowed to ape": f"{row['allowed_ms'] / first[row['precision']]['allowed_ms']:.2f}",
            "G operations": f"{row['operations'] / 1e9:.1f}",
            "GB moved": f"{row['bytes'] / 1e9:.2f}",
        }
        for row in rows
    ]
    return markdown_table(lines, COLUMNS)


def main() -> None:
    arguments = parser(__doc__, "roofline.jsonl", rounds=15).parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    about = conditions()
    rows = [row | about for precision in PRECISIONS for row in measure(precision, arguments.rounds)]
    for row in rows[:: len(ENCODINGS)]:
        print(f"{row['precision']}: copies {row['bandwidth'] / 1e9:.1f} GB/s, products {row['rate'] / 1e9:.0f} G operations/s")
    print(table(rows))
    save(arguments.out, rows)


if __name__ == "__main__":
    main()
