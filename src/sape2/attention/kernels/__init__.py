"""Attention kernels in Triton for CUDA devices. `attention.paths` decides when they are used.

`distance_attention` is attention with the distances of SaPE2 in O(N) memory. Importing this package needs no Triton,
calling the function does. docs/gpu.md says what has been verified, and how.
"""

from sape2.attention.kernels.distance import attend_with_distances, distance_attention, takes

__all__ = ["attend_with_distances", "distance_attention", "takes"]
