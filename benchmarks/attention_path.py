"""Which way of computing attention is faster: plain products or the fused kernel? The rule in `attention.choose_path`.

Command:  python benchmarks/attention_path.py        (a minute on two CPU cores)
Prints a Markdown table: median milliseconds of forward plus backward and of forward, alternating between the two ways.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from sape2.attention import module
from sape2.encodings.base import NoEncoding
from sape2.tables import markdown_table

SHAPES = [(128, 3, (8, 8), 32), (64, 6, (8, 8), 64), (16, 6, (14, 14), 64), (4, 6, (24, 24), 64), (1, 6, (48, 48), 64)]


def medians(steps: dict[str, Callable[[], None]], repeats: int = 11) -> dict[str, float]:
    """Median milliseconds of each step, taken in turn after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def step(path: str, tensors: list[torch.Tensor], grid: tuple[int, int], backward: bool) -> Callable[[], None]:
    def run() -> None:
        module.choose_path = lambda *_: path
        with torch.set_grad_enabled(backward):
            output = module.attend(*tensors, grid, NoEncoding())
        if backward:
            output.sum().backward()

    return run


def main() -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, heads, grid, dim in SHAPES:
            tokens = grid[0] * grid[1]
            tensors = [torch.randn(batch, heads, tokens, dim, dtype=dtype, requires_grad=True) for _ in range(3)]
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "images": batch,
                "heads": heads,
                "tokens": tokens,
                "head_dim": dim,
            }
            for name, backward in (("f+b", True), ("f", False)):
                times = medians({path: step(path, tensors, grid, backward) for path in ("products", "fused")})
                row |= {f"{name} {path}, ms": value for path, value in times.items()}
            rows.append(row)
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads\n")
    print(markdown_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
