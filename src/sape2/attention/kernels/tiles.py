"""The Triton kernels of attention with distances. Importing this file imports Triton; `launch` calls them.

logits_in = scale q_i . k_n + gain sum over the axes of ||s_i - s_n|| for grid tokens i and n, without the distances where
either is a prefix token; out_i = sum over n of softmax(logits_i)_n v_n. A program works on one block of tokens of one
image and head, its *own* ones, and passes over all *other* ones, so nothing larger than a block is ever in memory. The
forward pass keeps a running softmax, the backward passes compute the weights again from the logsumexp. Every program
writes only its own outputs, in a fixed order, so two runs give the same bits.

Axes: T = P + N tokens (P prefix tokens first), A axes of position vectors s, S places of each (padded with zeros, which
change no distance), C = B h images and heads. s is (C, A, N, S), norms (C, A, N), lse and delta (C, T); all other tensors
are (B, h, T, channels), addressed by their strides. Logits are multiplied by log2(e) inside, because `exp2` is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal float32: `rsqrt` takes squares below it for 0 and gives infinity


# --- blocks of tokens ------------------------------------------------------------------------------------------------


@triton.jit
def _program(tokens, heads, OWN: tl.constexpr):
    """(c, image, head, own tokens) of a program."""
    blocks = tl.cdiv(tokens, OWN)
    c = tl.program_id(0) // blocks
    return c.to(tl.int64), c // heads, c % heads, (tl.program_id(0) % blocks) * OWN + tl.arange(0, OWN)


@triton.jit
def _matrix(start, strides, image, head):
    """Pointer to the first element of the matrix (T, channels) of an image and head."""
    return start + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _load(start, stride, rows, count, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Some of the `count` rows of a matrix, zeros outside and beyond its WIDTH."""
    columns = tl.arange(0, PADDED)
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < WIDTH)[None, :]
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, stride, rows, count, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < WIDTH)[None, :]
    tl.store(start + rows[:, None] * stride + columns[None, :], values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _load_line(start, rows, count):
    return tl.load(start + rows, mask=(rows >= 0) & (rows < count), other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # which takes the bits of bfloat16 for integers in products
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


# --- distances -------------------------------------------------------------------------------------------------------


@triton.jit
def _squares(s, norms, own, other, N, AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr):
    """||s_i - s_n||^2 of a block of pairs, one matrix for each axis; 0 for a token and itself and where there is no bias.

    A product in full float32 and two norms, which come smaller than they are by a few roundings: what rounding leaves of
    equal vectors is below 0 then, and taken for 0. A NaN stays one.
    """
    squares = ()
    real = ((own >= 0) & (own < N))[:, None] & ((other >= 0) & (other < N))[None, :]
    apart = real & (own[:, None] != other[None, :])
    for axis in tl.static_range(AXES):
        product = tl.zeros((own.shape[0], other.shape[0]), tl.float32)
        for part in range(0, PLACES, PART):
            own_part = _load(s + axis * N * PLACES + part, PLACES, own, N, PART, PART)
            other_part = _load(s + axis * N * PLACES + part, PLACES, other, N, PART, PART)
            product = tl.dot(own_part, tl.trans(other_part), product, input_precision="ieee")
        sums = _load_line(norms + axis * N, own, N)[:, None] + _load_line(norms + axis * N, other, N)[None, :]
        square = sums - 2.0 * product
        squares = squares + (tl.where(apart & ~(square < SMALLEST), square, 0.0),)  # noqa: RUF005
    return squares


@triton.jit
def _inverse(square):
    """1 / D, and 0 where D is 0, where the root has no gradient."""
    return tl.where(square > 0.0, tl.rsqrt(tl.maximum(square, SMALLEST)), 0.0)


@triton.jit
def _distance(squares, AXES: tl.constexpr):
    """The sum of the roots."""
    total = squares[0] * _inverse(squares[0])
    for axis in tl.static_range(1, AXES):
        total += squares[axis] * _inverse(squares[axis])
    return total


@triton.jit
def _no_pull(OWN: tl.constexpr, AXES: tl.constexpr, PART: tl.constexpr):
    pull = ()
    for _ in tl.static_range(AXES):
        pull = pull + ((tl.zeros((OWN, PART), tl.float32), tl.zeros((OWN,), tl.float32)),)  # noqa: RUF005
    return pull


@triton.jit
def _pulled(pull, change, squares, s, other, N, AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr):
    """For each axis sum over n of w_in s_n and of w_in, w = dL/dlogits / D: ds_i is gain sum over n of w_in (s_i - s_n)."""
    more = ()
    for axis in tl.static_range(AXES):
        weights = change * _inverse(squares[axis])
        vectors = _load(s + axis * N * PLACES, PLACES, other, N, PART, PART)
        sums = tl.dot(weights, vectors, pull[axis][0], input_precision="ieee")
        more = more + ((sums, pull[axis][1] + tl.sum(weights, 1)),)  # noqa: RUF005
    return more


@triton.jit
def _store_pull(ds, pull, gain, s, own, N, AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr):
    for axis in tl.static_range(AXES):
        vectors = _load(s + axis * N * PLACES, PLACES, own, N, PART, PART)
        found = gain * (vectors * pull[axis][1][:, None] - pull[axis][0])
        _store(ds + axis * N * PLACES, PLACES, own, N, found, PART, PART)


# --- attention -------------------------------------------------------------------------------------------------------


@triton.jit
def forward(
    q, k, v, s, norms, gains, out, lse, q_strides, k_strides, v_strides, out_strides, heads, tokens, prefix, scale,
    AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out and lse, log2 of the sum over n of exp(logits_in)."""
    c, image, head, own = _program(tokens, heads, OWN)
    N = tokens - prefix
    k, v = _matrix(k, k_strides, image, head), _matrix(v, v_strides, image, head)
    s, norms = s + c * AXES * N * PLACES, norms + c * AXES * N
    gain = tl.load(gains + head) * LOG2_E
    queries = _load(_matrix(q, q_strides, image, head), q_strides[2], own, tokens, WIDTH, PADDED)
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    sums = tl.zeros((OWN, VALUE_PADDED), tl.float32)
    for first in range(0, tokens, OTHER):
        other = first + tl.arange(0, OTHER)
        keys = _load(k, k_strides[2], other, tokens, WIDTH, PADDED)
        distance = _distance(_squares(s, norms, own - prefix, other - prefix, N, AXES, PLACES, PART), AXES)
        logits = scale * LOG2_E * _dot(queries, tl.trans(keys), PRECISION) + gain * distance
        logits = tl.where((other < tokens)[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        weights, shrink = tl.exp2(logits - new[:, None]), tl.exp2(largest - new)
        values = _load(v, v_strides[2], other, tokens, VALUE_WIDTH, VALUE_PADDED)
        sums = sums * shrink[:, None] + _dot(weights.to(v.dtype.element_ty), values, PRECISION)
        total, largest = total * shrink + tl.sum(weights, 1), new
    _store(
        _matrix(out, out_strides, image, head), out_strides[2], own, tokens, sums / total[:, None], VALUE_WIDTH, VALUE_PADDED
    )
    tl.store(lse + c * tokens + own, largest + tl.log2(total), mask=own < tokens)


@triton.jit
def query_gradients(
    q, k, v, s, norms, gains, grad, lse, delta, dq, ds, dgain,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, heads, tokens, prefix, scale,
    AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dL/dq, dL/ds as far as it comes by the query's side of each pair, and dL/dgain for each query, (C, T)."""
    c, image, head, own = _program(tokens, heads, OWN)
    N, part = tokens - prefix, tl.program_id(1) * PART
    k, v = _matrix(k, k_strides, image, head), _matrix(v, v_strides, image, head)
    s, norms, ds = s + c * AXES * N * PLACES, norms + c * AXES * N, ds + c * AXES * N * PLACES
    gain = tl.load(gains + head)
    queries = _load(_matrix(q, q_strides, image, head), q_strides[2], own, tokens, WIDTH, PADDED)
    grads = _load(_matrix(grad, grad_strides, image, head), grad_strides[2], own, tokens, VALUE_WIDTH, VALUE_PADDED)
    own_lse, own_delta = _load_line(lse + c * tokens, own, tokens), _load_line(delta + c * tokens, own, tokens)
    to_queries = tl.zeros((OWN, PADDED), tl.float32)
    both, slope, mean = tl.zeros((OWN,), tl.float32), tl.zeros((OWN,), tl.float32), tl.zeros((OWN,), tl.float32)
    pull = _no_pull(OWN, AXES, PART)
    for first in range(0, tokens, OTHER):
        other = first + tl.arange(0, OTHER)
        keys = _load(k, k_strides[2], other, tokens, WIDTH, PADDED)
        squares = _squares(s, norms, own - prefix, other - prefix, N, AXES, PLACES, PART)
        distance = _distance(squares, AXES)
        logits = LOG2_E * (scale * _dot(queries, tl.trans(keys), PRECISION) + gain * distance)
        weights = tl.where((other < tokens)[None, :], tl.exp2(logits - own_lse[:, None]), 0.0)
        values = _load(v, v_strides[2], other, tokens, VALUE_WIDTH, VALUE_PADDED)
        slopes = _dot(grads, tl.trans(values), PRECISION)  # dL/dweights
        change = weights * (slopes - own_delta[:, None])  # dL/dlogits
        to_queries += _dot(change.to(k.dtype.element_ty), keys, PRECISION)
        both += tl.sum(weights * slopes * distance, 1)
        slope, mean = slope + tl.sum(weights * slopes, 1), mean + tl.sum(weights * distance, 1)
        pull = _pulled(pull, change, squares, s + part, other - prefix, N, AXES, PLACES, PART)
    _store_pull(ds + part, pull, gain, s + part, own - prefix, N, AXES, PLACES, PART)
    if part == 0:
        _store(_matrix(dq, dq_strides, image, head), dq_strides[2], own, tokens, scale * to_queries, WIDTH, PADDED)
        to_gain = both - slope * mean  # the sum of change * distance, without the rounding of out that is in delta
        tl.store(dgain + c * tokens + own, to_gain, mask=own < tokens)


@triton.jit
def key_gradients(
    q, k, v, s, norms, gains, grad, lse, delta, dk, dv, ds,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides, heads, tokens, prefix, scale,
    AXES: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dL/dk, dL/dv and dL/ds as far as it comes by the key's side of each pair. Own tokens are keys here."""
    c, image, head, own = _program(tokens, heads, OWN)
    N, part = tokens - prefix, tl.program_id(1) * PART
    q, grad = _matrix(q, q_strides, image, head), _matrix(grad, grad_strides, image, head)
    s, norms, ds = s + c * AXES * N * PLACES, norms + c * AXES * N, ds + c * AXES * N * PLACES
    gain = tl.load(gains + head)
    keys = _load(_matrix(k, k_strides, image, head), k_strides[2], own, tokens, WIDTH, PADDED)
    values = _load(_matrix(v, v_strides, image, head), v_strides[2], own, tokens, VALUE_WIDTH, VALUE_PADDED)
    to_keys, to_values = tl.zeros((OWN, PADDED), tl.float32), tl.zeros((OWN, VALUE_PADDED), tl.float32)
    pull = _no_pull(OWN, AXES, PART)
    for first in range(0, tokens, OTHER):
        other = first + tl.arange(0, OTHER)
        queries = _load(q, q_strides[2], other, tokens, WIDTH, PADDED)
        squares = _squares(s, norms, own - prefix, other - prefix, N, AXES, PLACES, PART)
        logits = LOG2_E * (scale * _dot(keys, tl.trans(queries), PRECISION) + gain * _distance(squares, AXES))
        other_lse, other_delta = _load_line(lse + c * tokens, other, tokens), _load_line(delta + c * tokens, other, tokens)
        weights = tl.where((other < tokens)[None, :], tl.exp2(logits - other_lse[None, :]), 0.0)
        grads = _load(grad, grad_strides[2], other, tokens, VALUE_WIDTH, VALUE_PADDED)
        to_values += _dot(weights.to(grad.dtype.element_ty), grads, PRECISION)
        change = weights * (_dot(values, tl.trans(grads), PRECISION) - other_delta[None, :])
        to_keys += _dot(change.to(q.dtype.element_ty), queries, PRECISION)
        pull = _pulled(pull, change, squares, s + part, other - prefix, N, AXES, PLACES, PART)
    _store_pull(ds + part, pull, gain, s + part, own - prefix, N, AXES, PLACES, PART)
    if part == 0:
        _store(_matrix(dk, dk_strides, image, head), dk_strides[2], own, tokens, scale * to_keys, WIDTH, PADDED)
        _store(_matrix(dv, dv_strides, image, head), dv_strides[2], own, tokens, to_values, VALUE_WIDTH, VALUE_PADDED)
