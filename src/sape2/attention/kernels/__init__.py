"""Attention kernels in Triton for CUDA devices; the products on a CPU and the choice between ways are not here.

`distance_attention` is attention with the distances of SaPE2 in O(N) memory. Importing this package needs no Triton,
calling it does. docs/gpu.md says what of it is proved, and how.
"""

from sape2.attention.kernels.distance import attend_with_distances, distance_attention, takes

__all__ = ["attend_with_distances", "distance_attention", "takes"]
