"""Launches the kernels of `tiles`: packs position vectors, allocates outputs and chooses block sizes.

Axes: B images, h heads, T = P + N tokens (P prefix tokens first), S places in a position vector, A axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sape2.attention.kernels import tiles

MAX_PART = 32  # places of a position vector that are multiplied at a time


def forward(
    q: Tensor, k: Tensor, v: Tensor, vectors: Sequence[Tensor], gain: Float[Tensor, " heads"], num_prefix: int, scale: float
) -> tuple[Tensor, Float[Tensor, "batch heads tokens"]]:
    """(out, logsumexp to base 2)."""
    out, lse = empty_outputs(q, v)
    s, norms = packed(vectors)
    strides = [t.stride()[:3] for t in (q, k, v, out)]
    _launch(tiles.forward, (q, k, v, s, norms, gain.float(), out, lse, *strides), q, v, s, num_prefix, scale)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, vectors: Sequence[Tensor], gain: Tensor, num_prefix: int, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, the packed vectors, (B, h, A, N, S), and the gain."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    s, norms = packed(vectors)
    by_query, by_key = torch.empty_like(s), torch.empty_like(s)
    to_gain = torch.empty_like(lse)
    delta = (grad.float() * out).sum(-1)  # sum over n of P_in dP_in
    given = (q, k, v, s, norms, gain.float(), grad, lse, delta)
    strides = [t.stride()[:3] for t in (q, k, v, grad)]
    rest = (q, v, s, num_prefix, scale)
    _launch(tiles.query_gradients, (*given, dq, by_query, to_gain, *strides, dq.stride()[:3]), *rest)
    _launch(tiles.key_gradients, (*given, dk, dv, by_key, *strides, dk.stride()[:3], dv.stride()[:3]), *rest)
    return dq, dk, dv, by_query.add_(by_key), to_gain.sum((0, 2)).to(gain.dtype)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs of `forward`; heads are adjacent to channels in memory, because they are joined afterwards."""
    batch, heads, tokens, _ = q.shape
    out = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=torch.float32)


def empty_pack(vectors: Sequence[Tensor]) -> Tensor:
    """Uninitialised output of `packed`, (B, h, A, N, S)."""
    batch, heads, tokens, _ = vectors[0].shape
    return vectors[0].new_empty(batch, heads, len(vectors), tokens, _places(vectors), dtype=torch.float32)


def _places(vectors: Sequence[Tensor]) -> int:
    """Padded length of the vectors of all axes: a power of two, and at least the minimum of a matrix product."""
    return _padded(max(t.shape[-1] for t in vectors))


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def packed(vectors: Sequence[Tensor]) -> tuple[Float[Tensor, "batch heads axes tokens places"], Tensor]:
    """The vectors of all axes without their mean, zeros behind, and their squared norms made smaller by a few roundings.

    Distances ignore a common shift, and smaller norms round less. The longer a vector, the more roundings has a product.
    """
    places = _places(vectors)
    s = torch.stack([F.pad(t, (0, places - t.shape[-1])) for t in vectors], dim=2).float()
    s = s - s.mean(-2, keepdim=True)
    few = max(8.0, places**0.5) * torch.finfo(s.dtype).eps
    return s, s.square().sum(-1) * (1 - few)


def _launch(kernel: Any, arguments: tuple[Any, ...], q: Tensor, v: Tensor, s: Tensor, num_prefix: int, scale: float) -> None:
    batch, heads, tokens, width = q.shape
    constants, options = choices(kernel, q.dtype, width, v.shape[-1], s.shape[2], s.shape[-1])
    blocks = -(-tokens // constants["OWN"]) * batch * heads
    if not blocks:  # no images
        return
    parts = 1 if kernel is tiles.forward else s.shape[-1] // constants["PART"]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[blocks, parts](*arguments, heads, tokens, num_prefix, scale, **constants, **options)


def choices(
    kernel: Any, dtype: torch.dtype, width: int, value_width: int, axes: int, places: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants that a kernel is compiled with, and Triton's options.

    The sizes of blocks were found by compiling, not by timing: few or no registers spilled
    (benchmarks/results/kernel_resources.jsonl).
    """
    padded, value_padded = _padded(width), _padded(value_width)
    row_bytes = max(padded, value_padded) * dtype.itemsize
    constants = {
        "AXES": axes,
        "PLACES": places,
        "PART": min(places, MAX_PART),
        "WIDTH": width,
        "PADDED": padded,
        "VALUE_WIDTH": value_width,
        "VALUE_PADDED": value_padded,
        "OWN": 64 if row_bytes <= (256 if kernel is tiles.forward else 128) else 32,
        "OTHER": 32,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }
    return constants, {"num_warps": 8, "num_stages": 2}
