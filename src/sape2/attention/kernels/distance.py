"""Attention with distances by the fused kernels: checks whether they apply and prepares their inputs.

Axes: B images, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens), d head_dim, e channels of v.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.attention.kernels.trial import DTYPES, has_triton, trusted
from sape2.attention.products import widened
from sape2.encodings.bias import AttentionBias
from sape2.encodings.distances import Distances
from sape2.encodings.precision import no_autocast

MAX_WIDTH = 256  # channels of q and k, those of a factored bias among them, and of v


def distance_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    vectors: Sequence[Float[Tensor, "batch heads grid_tokens _"]],
    gain: float | Float[Tensor, " heads"] = 1.0,
    num_prefix: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """softmax(scale q_i . k_n + gain_h sum over the axes of ||s_i - s_n||) v, without the sum for prefix tokens.

    `vectors` are the position vectors s of each axis, of any lengths, float32 inside; `scale` None is 1/sqrt(d). It has
    gradients for q, k, v, the vectors and the gain; that of a root is 0 where s_i = s_n. Raises ValueError for what does
    not fit, and RuntimeError where no kernel can run: without Triton, or on a CPU unless TRITON_INTERPRET=1 was set before
    Triton was imported.
    """
    _check_content(q, k, v)
    _check_vectors(q, vectors, gain, num_prefix)
    _check_device(q)
    from sape2.attention.kernels.operator import fused_attention

    if not isinstance(gain, Tensor):
        gain = q.new_full((q.shape[1],), gain, dtype=torch.float32)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return fused_attention(q, k, v, list(vectors), gain, num_prefix, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def takes(q: Tensor, bias: AttentionBias) -> bool:
    """True if `attend_with_distances` can be used for these queries on their device; the first call tries the kernels."""
    return q.device.type == "cuda" and fits(q, bias) and trusted(q.device, _dtype(q), _width(q, bias))


def fits(q: Tensor, bias: AttentionBias) -> bool:
    """True for one term of distances plus terms that are dot products, which become further channels of q and k."""
    rest = [term for term in bias.terms if term.factors() is None]
    one = len(rest) == 1 and isinstance(rest[0], Distances)
    return one and _dtype(q) in DTYPES and _width(q, bias) <= MAX_WIDTH


def _width(q: Tensor, bias: AttentionBias) -> int:
    """Channels of q and k, those of a factored bias among them."""
    sides = bias.factored()
    return q.shape[-1] + (0 if sides is None else sides[0].shape[-1])


def attend_with_distances(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention under a bias that `takes` accepts; q and k are rotated already."""
    (distances,) = (term for term in bias.terms if isinstance(term, Distances))
    (batch, heads, tokens, _), dtype, scale = q.shape, _dtype(q), q.shape[-1] ** -0.5
    if (sides := bias.factored()) is not None:
        q, k = widened(q, sides[0] / scale), widened(k, sides[1])
    vectors = [s.expand(batch, heads, -1, -1) for s in distances.vectors]
    gain = distances.gain
    gain = gain.expand(heads, 1, 1).flatten() if isinstance(gain, Tensor) else gain
    with no_autocast(q):
        q, k, v = (t.to(dtype) for t in (q, k, v))
        return distance_attention(q, k, v, vectors, gain, tokens - vectors[0].shape[-2], scale)


def _dtype(q: Tensor) -> torch.dtype:
    """The dtype of the products: that of autocast if it is active."""
    device = q.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else q.dtype


# --- what does not fit -----------------------------------------------------------------------------------------------


def _check_content(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"distance_attention needs q and k of one shape (B, h, T, d), and v (B, h, T, e); got {shapes}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"distance_attention needs q, k and v of one dtype ({known}); got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (1 <= q.shape[-1] <= MAX_WIDTH and 1 <= v.shape[-1] <= MAX_WIDTH):
        raise ValueError(f"distance_attention needs 1 to {MAX_WIDTH} channels a head; got {q.shape[-1]}, v {v.shape[-1]}")


def _check_vectors(q: Tensor, vectors: Sequence[Tensor], gain: float | Tensor, num_prefix: int) -> None:
    batch, heads, tokens, _ = q.shape
    wanted = (batch, heads, tokens - num_prefix)
    shapes = [tuple(s.shape) for s in vectors]
    if not shapes or not 0 <= num_prefix < tokens or any(len(s) != 4 or s[:-1] != wanted or s[-1] < 1 for s in shapes):
        raise ValueError(
            f"distance_attention needs vectors ({batch}, {heads}, {tokens - num_prefix}, S), a tensor for each axis, for "
            f"{tokens} tokens with num_prefix={num_prefix}; got {', '.join(map(str, shapes)) or 'none'}"
        )
    if isinstance(gain, Tensor) and gain.shape != (heads,):
        raise ValueError(
            f"distance_attention needs one number as gain, or one for each of {heads} heads; got {tuple(gain.shape)}"
        )


def _check_device(q: Tensor) -> None:
    if not has_triton():
        raise RuntimeError("distance_attention needs Triton, which is not installed; sape2.attention.attend does without it")
    if q.device.type == "cpu" and not _interprets():
        raise RuntimeError(
            "distance_attention runs on CUDA devices; on a CPU it needs TRITON_INTERPRET=1 in the environment before Triton "
            "is first imported (slow, for checks only). sape2.attention.attend takes any device"
        )
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"distance_attention runs on CUDA devices; got {q.device.type}. sape2.attention.attend takes any device"
        )


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    """True if Triton interprets its kernels; the variable must have been set before Triton itself was imported."""
    import triton

    return os.environ.get("TRITON_INTERPRET") == "1" and not isinstance(triton.language.zeros, triton.JITFunction)
