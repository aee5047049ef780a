"""Registers, shared memory and spills of the Triton kernels, compiled for GPUs without one. Nothing is run or timed.

Command:  python benchmarks/kernel_resources.py        (about fifteen minutes on one CPU core; writes
benchmarks/results/kernel_resources.jsonl and prints the table)
Each kernel of `sape2.attention.kernels.tiles` is compiled as `launch` would have it compiled, with two axes, for compute
capability 8.0 (A100) and 9.0 (H100); ptxas reports what the machine code takes. A spill is a register that is kept in
memory instead, in bytes a thread.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from timing import RESULTS, Row, conditions, save
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sape2.attention.kernels import launch, tiles
from sape2.tables import markdown_table

KERNELS = {"forward": tiles.forward, "query_gradients": tiles.query_gradients, "key_gradients": tiles.key_gradients}
CAPABILITIES = (80, 90)
CASES = [  # dtype, head_dim, places of a position vector
    *itertools.product(["bfloat16"], [32, 64, 80, 128], [16]),
    *itertools.product(["bfloat16"], [64], [32, 64]),
    *itertools.product(["float32"], [64, 128], [16]),
]
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
CONTENT = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")  # in the dtype of the model
FLOAT32 = ("s", "norms", "gains", "lse", "delta", "ds", "dgain")
COLUMNS = ["kernel", "capability", "dtype", "head_dim", "places", "registers", "shared_bytes", "spilled_bytes", "own", "warps"]


def resources(kernel: str, capability: int, dtype: str, head_dim: int, places: int) -> Row:
    """What ptxas says of one kernel; raises if it does not compile."""
    function = KERNELS[kernel]
    constants, options = launch.choices(function, getattr(torch, dtype), head_dim, head_dim, axes=2, places=places)
    source = ASTSource(function, signature(function, dtype), constexprs=constants, attrs=dict(aligned(function)))
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = cache, True  # a kernel in a cache is not compiled again
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()
    return {
        "kernel": kernel,
        "capability": capability,
        "dtype": dtype,
        "head_dim": head_dim,
        "places": places,
        "registers": int(re.search(r"Used (\d+) registers", log.getvalue()).group(1)),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": int(stores) + int(loads),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"])),
        "own": constants["OWN"],
        "other": constants["OTHER"],
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        "triton": triton.__version__,
        "ptxas": get_ptxas(capability).version,
    }


def signature(function: Any, dtype: str) -> dict[str, Any]:
    """Types of the arguments, as a launch with tensors of that dtype has them."""
    types = dict.fromkeys(CONTENT, POINTERS[dtype]) | dict.fromkeys(FLOAT32, "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("heads", "tokens", "prefix"), "i32")
    strides = {name: ("i32", "i32", "i32") for name in function.arg_names if name.endswith("_strides")}
    types |= strides
    return {name: types.get(name, "constexpr") for name in function.arg_names}


def aligned(function: Any) -> Iterator[tuple[tuple[int, ...], list[list[Any]]]]:
    """Pointers and strides that are multiples of 16, as those of usual head_dims are."""
    for place, name in enumerate(function.arg_names):
        if name in CONTENT + FLOAT32:
            yield (place,), [["tt.divisibility", 16]]
        elif name.endswith("_strides"):
            yield from (((place, axis), [["tt.divisibility", 16]]) for axis in range(3))


def table(rows: list[Row]) -> str:
    return markdown_table(rows, COLUMNS)


def main() -> None:
    rows = []
    for case in itertools.product(KERNELS, CAPABILITIES, CASES):
        kernel, capability, rest = case
        rows.append(resources(kernel, capability, *rest) | conditions())
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    save(RESULTS / "kernel_resources.jsonl", rows)


if __name__ == "__main__":
    main()
