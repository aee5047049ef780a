"""Attention with distances as plain products under autograd, the reference that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sape2.encodings.distances import Distances
from sape2.encodings.precision import full_precision


def readable_attention(
    q: Tensor, k: Tensor, v: Tensor, vectors: tuple[Tensor, ...], gain: Tensor, num_prefix: int, scale: float
) -> Tensor:
    """softmax(scale q k^T + gain sum of distances) v, in float32 or better, the result in the dtype of v."""
    distances = Distances(tuple(full_precision(t) for t in vectors), full_precision(gain)[:, None, None]).dense()
    logits = scale * full_precision(q) @ full_precision(k).transpose(-1, -2)
    logits = logits + F.pad(distances, (num_prefix, 0, num_prefix, 0))
    return (torch.softmax(logits, -1) @ full_precision(v)).to(v.dtype)
