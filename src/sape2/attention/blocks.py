"""Attention with hand-written gradients, block by block, so that no map outgrows the cache. Not needed to read the method.

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
Images and heads are one axis C here, and m is the number of query rows of a block.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.attention.paths import is_small, map_elements
from sape2.attention.products import rotate, scores_with
from sape2.encodings.base import AttentionBias, AttentionEncoding, LineScores, bias_of, full_precision, no_autocast
from sape2.encodings.grid import Axis, Grid, num_prefix_tokens, own_line

BLOCK_ELEMENTS = 2**21  # of a map that is worked on at a time: 8 MB of float32, so that it stays in the cache


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding
) -> Float[Tensor, "batch heads tokens value_dim"]:
    device = q.device.type
    rotated_q, rotated_k = rotate(q, k, grid, encoding)
    content = () if rotated_q is q and rotated_k is k else (q, k)
    tensors = [rotated_q, rotated_k, v, *content]
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    held = _held(encoding)
    parameters = list({id(t): t for t in held.values() if t.requires_grad}.values())
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *parameters))
    with no_autocast(q):
        call = _Call(encoding, grid, held, parameters, len(tensors), differentiated)
        return BlockAttention.apply(call, *tensors, *parameters)


def _held(encoding: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by every name that they have."""
    parameters, buffers = (of(remove_duplicate=False) for of in (encoding.named_parameters, encoding.named_buffers))
    return dict(parameters) | dict(buffers)


@dataclass(frozen=True)
class _Call:
    """The arguments of a call of `BlockAttention` that are not tensors."""

    encoding: AttentionEncoding
    grid: Grid
    held: dict[str, Tensor]  # by the encoding in this call; `torch.func.functional_call` takes them back when it ends
    parameters: list[Tensor]  # those that learn
    num_tensors: int  # q, k, v, and, where the encoding rotates, q and k before that
    differentiated: bool

    def leaves(self) -> list[Tensor]:
        """The parameters, or copies of those at which a gradient in between would not stop, or would meet a hook twice."""
        return [p if p.is_leaf and not p._backward_hooks else p.detach().requires_grad_() for p in self.parameters]

    def encoding_with(self, parameters: Sequence[Tensor]) -> AttentionEncoding:
        """The encoding as it was in the call, with these in the place of its parameters."""
        other = {id(old): new for old, new in zip(self.parameters, parameters, strict=True)}
        wanted = {name: other.get(id(t), t) for name, t in self.held.items()}
        now = _held(self.encoding)
        if len(now) == len(wanted) and all(now.get(name) is t for name, t in wanted.items()):
            return self.encoding
        return _with_tensors(self.encoding, wanted)

    def keeps(self, q: Tensor) -> bool:
        """True if softmax weights and the encoding's graph are kept for the backward pass; else it computes them again."""
        return self.differentiated and is_small(q)

    def images(self, q: Tensor) -> list[slice]:
        step = max(1, BLOCK_ELEMENTS * len(q) // max(1, map_elements(q)))
        return [slice(start, start + step) for start in range(0, len(q), step)]

    def rows(self, q: Tensor) -> list[slice]:
        """All rows at once where they are kept, so that the scores of whole lines are at hand."""
        _, heads, tokens, _ = q.shape
        step = tokens if is_small(q) else max(1, BLOCK_ELEMENTS // (heads * tokens))
        return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _with_tensors(module: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """A shallow copy of a module that holds other parameters and buffers; other threads may use the module meanwhile."""
    module = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        vars(module)[kind] = {name: tensors.get(prefix + name, t) for name, t in vars(module)[kind].items()}
    parts = vars(module)["_modules"].items()
    vars(module)["_modules"] = {n: None if m is None else _with_tensors(m, tensors, f"{prefix}{n}.") for n, m in parts}
    return module


class BlockAttention(torch.autograd.Function):
    """Attention and its gradients by the same matrix products as the plain form, a few images (or rows) at a time.

    With P = softmax(L) and L = q k^T / sqrt(d) + bias: dL = P (dP - rowsum(dO O)), dP = dO v^T. What the bias is made of is
    differentiated by autograd, in a small graph for each block; the map itself by the terms of the bias (`encodings.bias`).
    Gradients that shall be differentiated again (`create_graph=True`) are those of the plain form, whole maps at once.
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
        ctx.save_for_backward(output, kept, *inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        output, kept, *inputs = ctx.saved_tensors
        call, tensors = ctx.call, inputs[: ctx.call.num_tensors]
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(call, inputs, ctx.needs_input_grad[1:], grad)
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


def _differentiable_gradients(call: _Call, inputs: list[Tensor], needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of all inputs as a graph of their own, by the plain form.

    Views stand for the inputs: the inputs depend on each other, q on the parameters of the layers before, and what comes
    that way is not of this call.
    """
    inputs = [t.view_as(t) for t in inputs]
    q, k, v, *content = inputs[: call.num_tensors]
    encoding, num_prefix = call.encoding_with(inputs[call.num_tensors :]), num_prefix_tokens(q.shape[-2], call.grid)
    with no_autocast(grad):
        grid_q, grid_k = (full_precision(t[:, :, num_prefix:]) for t in content or (q, k))
        bias = encoding.bias(grid_q, grid_k, call.grid)
        output = scores_with(full_precision(q), full_precision(k), bias).softmax(-1).to(v.dtype) @ v
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


class _BiasGraph(NamedTuple):
    """The bias of a few images and the leaves that it was made from: q, k and, for some, the scores within lines."""

    content: list[Tensor]
    scores: LineScores
    parameters: list[Tensor]
    bias: AttentionBias | None

    def gradients(self, grads: list[Tensor]) -> list[Tensor | None]:
        """Propagates the gradients of the bias's tensors to those of the content, of the line scores and of the parameters."""
        outputs = [t for t in self.tensors() if t.requires_grad]
        output_grads = [g for t, g in zip(self.tensors(), grads, strict=True) if t.requires_grad]
        leaves = [*self.content, *self.scores.values(), *self.parameters]
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
        content = [t.detach().requires_grad_(with_graph) for t in self.content]
        parameters = self.call.leaves() if with_graph else self.call.parameters
        encoding, lines = self.call.encoding_with(parameters), LineScores()
        if self.call.num_tensors == 3 and len(self.all_rows) == 1:
            for axis in encoding.score_axes:
                lines[axis] = self._lines(scores, axis).clone().requires_grad_(with_graph)
        own = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)  # not those of a checkpoint around the call
        with torch.set_grad_enabled(with_graph), own:
            bias = bias_of(encoding, content[0], content[1], self.call.grid, lines)
        return _BiasGraph(content, lines, parameters, bias)

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
        own = self._own(grad, output)
        grad = grad.reshape(-1, *grad.shape[-2:])
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
            torch.baddbmm(dq[:, rows], change, self.k, beta=0.0, alpha=self.scale, out=dq[:, rows])
            torch.baddbmm(dk, change.transpose(1, 2), self.q[:, rows], beta=beta, alpha=self.scale, out=dk)
        self._add_content(found, targets)
        return found[len(found) - len(self.call.parameters) :]

    def _own(self, grad: Tensor, output: Tensor) -> Float[Tensor, "count tokens 1"]:
        """The sum over n of P_in dP_in, which is dO_i . O_i."""
        product = _WORKSPACE.buffer("values", output.shape, full_precision(output[:0]))
        return torch.mul(full_precision(grad), output, out=product).sum(-1, keepdim=True).flatten(0, 1)

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
        found = graph.gradients(bias_grads)
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

    What they hold never leaves a call. Only small ones are kept, a few MB in all, and only on a CPU: elsewhere a second
    stream or a replayed CUDA graph would write into them. Tensors of inference mode and of tracers are not kept either.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous tensor with any content, on the device and in the dtype of `like`."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        traced = type(like) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
        if size > 4 * BLOCK_ELEMENTS or like.device.type != "cpu" or traced:
            return like.new_empty(shape)
        if key not in self.buffers or len(self.buffers[key]) < size:
            with torch.inference_mode(False):
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
