"""Multi-head attention with a position encoding: prefix tokens, scaling, and the way the products are computed.

Knows an encoding only by its hooks (`encodings.base`). Three ways compute the same numbers; `choose_path` decides:

fused:    PyTorch's scaled_dot_product_attention; biases that are dot products become further channels of q and k.
products: plain matrix products under autograd, the readable form and the one for tracing and forward-mode derivatives.
blocks:   the same products and their gradients by hand, block by block, so that no map outgrows the cache (`BlockAttention`).

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
In blocks, images and heads are one axis C, and m is the number of query rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from sape2.encodings.base import AttentionBias, AttentionEncoding, LineScores, NoEncoding, bias_of, full_precision, no_autocast
from sape2.grid import Axis, Grid, num_prefix_tokens, own_line

Path = Literal["fused", "products", "blocks"]
BLOCK_ELEMENTS = 2**20  # of all the maps that are worked on at a time: 4 MB of float32, so that they stay in the cache
KEPT_ELEMENTS = 2**25  # of softmax weights kept for the backward pass: 128 MB of float32; more is computed again


class Attention(nn.Module):
    """softmax((q k^T) / sqrt(d) + bias) v with learned projections; parameter names as in timm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        encoding: AttentionEncoding | None = None,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be divisible by the number of heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.encoding = encoding or NoEncoding()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.project(x)
        dropout = self.attention_dropout if self.training else 0.0
        output = attend(q, k, v, grid, self.encoding, dropout)  # (B, h, T, d)
        return self.dropout(self.proj(output.transpose(1, 2).flatten(2)))

    def project(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, h, T, d), unscaled."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def maps(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> dict[str, Tensor]:
        """The maps of the encoding and `attention`, the softmax weights, (B, h, T, T)."""
        q, k, _ = self.project(x)
        num_prefix = num_prefix_tokens(x.shape[1], grid)
        maps = self.encoding.maps(q[:, :, num_prefix:], k[:, :, num_prefix:], grid)
        return maps | {"attention": logits(q, k, grid, self.encoding).softmax(-1)}


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention under an encoding; prefix tokens are neither rotated nor biased."""
    path = choose_path(q, encoding, dropout)
    if path == "blocks":
        return _attend_in_blocks(q, k, v, grid, encoding)
    if path == "products":
        weights = F.dropout(logits(q, k, grid, encoding).softmax(-1), dropout)
        return weights.to(v.dtype) @ v
    return _attend_fused(q, k, v, grid, encoding, dropout)


def choose_path(q: Tensor, encoding: AttentionEncoding, dropout: float = 0.0) -> Path:
    """How the products are computed; the only place that decides. All three agree to rounding.

    With a bias, on a CPU: blocks. On an accelerator a bias needs one map of all images and heads, so blocks only where
    that would take more than 4 GB of float32. Where a graph is traced, for functional and forward-mode derivatives,
    which need single differentiable operations, and for dropout: products on a CPU, fused on an accelerator.
    Without a bias: fused, but on a CPU products up to 512 tokens, where the backward pass of the fused kernel is three to
    five times slower in bf16 (benchmarks/results/attention_path.md).
    """
    on_cpu = q.device.type in ("cpu", "meta")
    if not encoding.makes_bias:
        return "products" if on_cpu and q.shape[-2] <= 512 else "fused"
    if torch.compiler.is_compiling() or q.is_meta or _is_transformed(q) or dropout:
        return "products" if on_cpu else "fused"
    return "blocks" if on_cpu or _map_elements(q) > 2**30 else "fused"


def describe_path(q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding) -> str:
    """The path that `attend` takes for such tensors and what the bias is made of, for reports."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    with torch.no_grad():
        bias = bias_of(encoding, q[:1, :, num_prefix:], k[:1, :, num_prefix:], grid, None)
    terms = [] if bias is None else [type(term).__name__.lower() for term in bias.terms]
    path = choose_path(q, encoding)
    memory = [] if path != "blocks" else ["weights kept" if _is_small(q) else "weights computed again"]
    return ", ".join([path, *terms, *memory])


def _is_transformed(q: Tensor) -> bool:
    """Inside torch.func (grad, vmap, jvp), or q carries a forward-mode tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(q).tangent is not None


def _is_small(q: Tensor) -> bool:
    return _map_elements(q) <= KEPT_ELEMENTS


def _map_elements(q: Tensor) -> int:
    batch, heads, tokens, _ = q.shape
    return batch * heads * tokens * tokens


# --- products and the fused kernel -----------------------------------------------------------------------------------


def logits(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    grid: Grid,
    encoding: AttentionEncoding,
) -> Float[Tensor, "batch heads tokens tokens"]:
    """q k^T / sqrt(d) + bias, both rotated, the bias on grid tokens only."""
    q, k, bias = encode(q, k, grid, encoding)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores if bias is None else scores + _padded(bias.dense(), q.shape[-2]).to(scores.dtype)


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding, dropout: float
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Biases that are dot products become further channels, q' = [q / sqrt(d), query_side], k' = [k, key_side]."""
    q, k, bias = encode(q, k, grid, encoding)
    q, mask = q * q.shape[-1] ** -0.5, None
    if bias is not None:
        q, k = (_widened(t, side) for t, side in zip((q, k), bias.factored() or (None, None), strict=True))
        rest = bias.unfactored()
        mask = None if rest is None else _padded(rest.dense(), q.shape[-2]).to(q.dtype)
    width = max(q.shape[-1], v.shape[-1])  # the fused kernels take equal widths only; zeros change nothing
    wide_q, wide_k, wide_v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    output = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return output[..., : v.shape[-1]]


def encode(q: Tensor, k: Tensor, grid: Grid, encoding: AttentionEncoding) -> tuple[Tensor, Tensor, AttentionBias | None]:
    """(q, k, bias): grid tokens of q and k rotated, the bias of grid tokens, which sees them before."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    bias = encoding.bias(q[:, :, num_prefix:], k[:, :, num_prefix:], grid)
    return *_rotate(q, k, grid, encoding), bias


def _rotate(q: Tensor, k: Tensor, grid: Grid, encoding: AttentionEncoding) -> tuple[Tensor, Tensor]:
    """The same tensors if the encoding does not rotate."""
    num_prefix = num_prefix_tokens(q.shape[-2], grid)
    q_grid, k_grid = q[:, :, num_prefix:], k[:, :, num_prefix:]
    rotated_q, rotated_k = encoding.rotate(q_grid, k_grid, grid)
    if rotated_q is q_grid and rotated_k is k_grid:
        return q, k
    pairs = ((q, rotated_q), (k, rotated_k))
    rotated = [torch.cat([tokens[:, :, :num_prefix], grid_tokens], dim=-2) for tokens, grid_tokens in pairs]
    return rotated[0], rotated[1]


def _padded(matrix: Tensor, tokens: int) -> Tensor:
    """The map of all tokens: prefix tokens, which come first, get 0."""
    num_prefix = tokens - matrix.shape[-1]
    return F.pad(matrix, (num_prefix, 0, num_prefix, 0)) if num_prefix else matrix


def _widened(tokens: Tensor, side: Tensor | None) -> Tensor:
    """One side of a factored bias as further channels; prefix tokens get zeros."""
    if side is None:
        return tokens
    num_prefix = tokens.shape[-2] - side.shape[-2]
    side = F.pad(side.expand(*tokens.shape[:-2], *side.shape[-2:]), (0, 0, num_prefix, 0))
    return torch.cat([tokens, side.to(tokens.dtype)], dim=-1)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding
) -> Float[Tensor, "batch heads tokens value_dim"]:
    device = q.device.type
    rotated_q, rotated_k = _rotate(q, k, grid, encoding)
    content = () if rotated_q is q and rotated_k is k else (q, k)
    tensors = [rotated_q, rotated_k, v, *content]
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    parameters = [p for p in encoding.parameters() if p.requires_grad]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *parameters))
    with no_autocast(q):
        return BlockAttention.apply(_Call(encoding, grid, parameters, len(tensors), differentiated), *tensors, *parameters)


@dataclass(frozen=True)
class _Call:
    """What a call of `BlockAttention` has besides tensors."""

    encoding: AttentionEncoding
    grid: Grid
    parameters: list[nn.Parameter]
    num_tensors: int  # q, k, v, and, where the encoding rotates, q and k before that
    differentiated: bool

    def keeps(self, q: Tensor) -> bool:
        """Whether softmax weights and the encoding's graph are kept for the backward pass, or computed again in it."""
        return self.differentiated and _is_small(q)

    def images(self, q: Tensor) -> list[slice]:
        step = max(1, BLOCK_ELEMENTS * len(q) // max(1, _map_elements(q)))
        return [slice(start, start + step) for start in range(0, len(q), step)]

    def rows(self, q: Tensor) -> list[slice]:
        """All rows at once where they are kept, so that the scores of whole lines are at hand."""
        _, heads, tokens, _ = q.shape
        step = tokens if _is_small(q) else max(1, BLOCK_ELEMENTS // (heads * tokens))
        return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


class BlockAttention(torch.autograd.Function):
    """Attention and its gradients by the same matrix products as the plain form, a few images (or rows) at a time.

    With P = softmax(L) and L = q k^T / sqrt(d) + bias: dL = P (dP - rowsum(dO O)), dP = dO v^T. What the bias is made of is
    differentiated by autograd, in a small graph for each block; the map itself by the terms of the bias (`sape2.bias`).
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor:
        q, _, v, *_ = tensors = inputs[: call.num_tensors]
        keep = call.keeps(q)
        batch, heads, tokens, _ = q.shape
        output = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)  # what follows joins the heads
        kept = v.new_empty(batch if keep else 0, heads, tokens, tokens)
        ctx.graphs = []
        for images in call.images(q):
            chunk = _Chunk(call, [t[images] for t in tensors])
            for rows in call.rows(q):
                weights = chunk.weights(rows, with_graph=keep, out=kept[images].flatten(0, 1) if keep else None)
                output[images][:, :, rows] = _WORKSPACE.product("values", weights, chunk.v).unflatten(0, (-1, heads))
            ctx.graphs.append(chunk.graph if keep else None)
        ctx.call = call
        ctx.save_for_backward(output, kept, *tensors)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        output, kept, *tensors = ctx.saved_tensors
        call = ctx.call
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        parameter_grads = [torch.zeros_like(p) for p in call.parameters]
        with no_autocast(grad):
            for number, images in enumerate(call.images(tensors[0])):
                graph, ctx.graphs[number] = ctx.graphs[number], None  # a second backward pass makes it again
                chunk = _Chunk(call, [t[images] for t in tensors], graph)
                weights = kept[images].flatten(0, 1) if graph else None
                found = chunk.backward(grad[images], output[images], weights, [t[images] for t in grads])
                for target, value in zip(parameter_grads, found, strict=True):
                    if value is not None:
                        target.add_(value)
        return None, *grads, *parameter_grads


class _BiasGraph(NamedTuple):
    """The bias of a few images and the leaves that it was made from: q, k and, for some, the scores within lines."""

    content: list[Tensor]
    scores: LineScores
    bias: AttentionBias | None

    def gradients(self, grads: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """From the gradients of the bias's tensors to those of the content, of the line scores and of the parameters."""
        outputs = [t for t in self.tensors() if t.requires_grad]
        output_grads = [g for t, g in zip(self.tensors(), grads, strict=True) if t.requires_grad]
        leaves = [*self.content, *self.scores.values(), *parameters]
        if not outputs:
            return [None] * len(leaves)
        return list(torch.autograd.grad(outputs, leaves, output_grads, allow_unused=True))

    def tensors(self) -> list[Tensor]:
        return [] if self.bias is None else self.bias.tensors()


class _Chunk:
    """A few images of a call: q, k and v as (C, T, d), and the bias they get."""

    def __init__(self, call: _Call, tensors: list[Tensor], graph: _BiasGraph | None = None) -> None:
        q, k, v, *content = tensors
        self.call, self.graph = call, graph
        self.all_rows, self.heads, self.scale = call.rows(q), q.shape[1], q.shape[-1] ** -0.5
        self.num_prefix = num_prefix_tokens(q.shape[-2], call.grid)
        self.content = [full_precision(t[:, :, self.num_prefix :]) for t in content or (q, k)]
        self.q, self.k, self.v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
        self.precision = full_precision(v[:0]).dtype

    def weights(self, rows: slice, with_graph: bool, out: Tensor | None = None) -> Float[Tensor, "count rows tokens"]:
        """Softmax weights of some rows, in the dtype of `out` if it is given."""
        scores = _WORKSPACE.product("logits", self.q[:, rows], self.k.transpose(1, 2), self.scale, self.precision)
        if self.graph is None:
            self.graph = self._make_bias(scores, with_graph)
        if self.graph.bias is not None:
            self.graph.bias.add_to(*self._grid_part(scores, rows))
        if out is not None and out.dtype == scores.dtype:
            return torch.softmax(scores, -1, out=out)
        weights = torch.softmax(scores, -1, out=_WORKSPACE.buffer("weights", scores.shape, scores))
        return weights if out is None else out.copy_(weights)

    def _make_bias(self, scores: Tensor, with_graph: bool) -> _BiasGraph:
        encoding, content = self.call.encoding, [t.detach().requires_grad_(with_graph) for t in self.content]
        lines: LineScores = {}
        if self.call.num_tensors == 3 and len(self.all_rows) == 1:
            for axis in encoding.score_axes:
                lines[axis] = self._lines(scores, axis).clone().requires_grad_(with_graph)
        own = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)  # not those of a checkpoint around the call
        with torch.set_grad_enabled(with_graph), own:
            bias = bias_of(encoding, content[0], content[1], self.call.grid, lines)
        return _BiasGraph(content, lines, bias)

    def _lines(self, rows_of_map: Tensor, axis: Axis) -> Tensor:
        """A view of the part of all rows that lies within a token's own line, (B, h, S, H, W)."""
        grid_part = rows_of_map[:, self.num_prefix :, self.num_prefix :]
        return own_line(grid_part.unflatten(0, (-1, self.heads)), self.call.grid, axis)

    def _grid_part(self, rows_of_map: Tensor, rows: slice) -> tuple[Tensor, slice, Tensor]:
        """The part of some rows that the bias acts on, which rows of the grid these are, and space to work in."""
        part = rows_of_map[:, max(self.num_prefix - rows.start, 0) :, self.num_prefix :]
        grid_rows = slice(max(rows.start - self.num_prefix, 0), max(rows.stop - self.num_prefix, 0))
        return part, grid_rows, _WORKSPACE.buffer("work", part.shape, part)

    def backward(self, grad: Tensor, output: Tensor, kept: Tensor | None, targets: list[Tensor]) -> list[Tensor | None]:
        """Writes the gradients of the tensors into `targets`; returns those of the encoding's parameters."""
        grad, output = (t.reshape(-1, *t.shape[-2:]) for t in (grad, output))
        own = (full_precision(grad) * output).sum(-1, keepdim=True)  # (C, T, 1): sum over n of P_in dP_in
        dq, dk, dv = (t.flatten(0, 1) for t in targets[:3])
        bias_grads: list[Tensor] = []
        found: list[Tensor | None] = []
        for rows in self.all_rows:
            beta = 0.0 if rows.start == 0 else 1.0  # the first rows overwrite, the others add
            weights = self.weights(rows, with_graph=True) if kept is None else kept
            torch.baddbmm(dv, weights.to(dv.dtype).transpose(1, 2), grad[:, rows], beta=beta, out=dv)
            change = _WORKSPACE.product("change", grad[:, rows], self.v.transpose(1, 2), 1.0, self.precision)
            change.sub_(own[:, rows]).mul_(weights)  # dL
            found = self._to_bias(change, rows, bias_grads)
            change = change.to(dq.dtype)
            dq[:, rows] = _WORKSPACE.product("values", change, self.k, self.scale)
            torch.baddbmm(dk, change.transpose(1, 2), self.q[:, rows], beta=beta, alpha=self.scale, out=dk)
        self._add_content(found, targets)
        return found[len(found) - len(self.call.parameters) :]

    def _to_bias(self, change: Tensor, rows: slice, bias_grads: list[Tensor]) -> list[Tensor | None]:
        """Carries dL on to the bias; at the last rows to its leaves, those that are scores back into dL."""
        graph = self.graph
        if graph is None or graph.bias is None:
            return [None] * (2 + len(self.call.parameters))
        if not bias_grads:
            bias_grads.extend(torch.zeros_like(t) for t in graph.tensors())
        part, grid_rows, work = self._grid_part(change, rows)
        if any(t.requires_grad for t in graph.tensors()):
            graph.bias.accumulate(part, grid_rows, bias_grads, work)
        if rows is not self.all_rows[-1]:
            return []
        found = graph.gradients(bias_grads, self.call.parameters)
        for axis, line_grad in zip(graph.scores, found[2:], strict=False):
            if line_grad is not None:
                self._lines(change, axis).add_(line_grad)
        return found

    def _add_content(self, found: list[Tensor | None], targets: list[Tensor]) -> None:
        """Adds what came through the bias to the gradients of q and k, those before the rotation where there are such."""
        if len(targets) > 3:
            targets = [t.zero_() for t in targets[3:]]
        for target, value in zip(targets, found[:2], strict=False):
            if value is not None:
                target[:, :, self.num_prefix :].add_(value)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Workspace(threading.local):
    """Buffers that every block of every call uses again, one set a thread: fresh memory would cost more time than the work.

    What they hold never leaves a call. Only small ones are kept, a few MB in all.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous tensor with any content, on the device and in the dtype of `like`."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        if size > 4 * BLOCK_ELEMENTS:
            return like.new_empty(shape)
        if key not in self.buffers or len(self.buffers[key]) < size:
            self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self.buffers[key][:size].view(shape)

    def product(
        self, name: str, a: Tensor, b: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "count rows columns"]:
        """scale * a b in `dtype` (that of b if None): (C, m, r), (C, r, n) -> (C, m, n)."""
        a, shape = a.to(b.dtype), (len(a), a.shape[1], b.shape[2])
        if dtype in (None, b.dtype):
            out = self.buffer(name, shape, b)
            return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        out = self.buffer(name, shape, torch.empty(0, dtype=dtype, device=b.device))
        return out.copy_(a @ b).mul_(scale)


_WORKSPACE = _Workspace()
