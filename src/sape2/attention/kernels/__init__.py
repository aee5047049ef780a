"""Attention written by hand: block by block on a CPU (`blocks`), and in Triton for CUDA devices. `attention.paths` chooses.

`distance_attention` is attention with the distances of SaPE2 in O(N) memory on a CUDA device. Names are looked up when they
are first used, because what they need of PyTorch imports Triton. docs/gpu.md says what has been verified, and how.
"""

from typing import Any

__all__ = ["attend_with_distances", "distance_attention", "takes"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sape2.attention.kernels import distance

    return getattr(distance, name)
