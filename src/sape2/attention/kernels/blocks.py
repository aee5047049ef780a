"""Attention and its gradients by the same matrix products as the plain form, a few images (or rows) at a time.

With P = softmax(L) and L = q k^T / sqrt(d) + bias: dL = P (dP - rowsum(dO O)), dP = dO v^T. What the bias is made of is
differentiated by autograd, in a small graph for each block; the map itself by the terms of the bias (`encodings.bias`).

Axes: B batch, h heads, T = P + N tokens (P prefix tokens first, then the N grid tokens in row-major order), d head_dim.
Images and heads are one axis C here, and m is the number of query rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.attention.kernels import workspace
from sape2.attention.kernels.workspace import WORKSPACE
from sape2.attention.paths import is_small, map_elements
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content
from sape2.encodings.grid import Axis, Grid, num_prefix_tokens, own_line
from sape2.encodings.precision import full_precision


@dataclass(frozen=True)
class Specification:
    """The attention that is computed, besides its tensors: q, k, v and, where q and k are rotated, q and k before that.

    `make_bias` takes the content and parameters in the place of `parameters`; `score_axes` are those along whose lines it
    reads scores. With `keep`, softmax weights and the graphs of biases are kept for the backward pass; else it computes
    them again. `joined` as in `Content`.
    """

    grid: Grid
    make_bias: Callable[[Content, Sequence[Tensor]], AttentionBias | None]
    score_axes: tuple[Axis, ...]
    parameters: list[Tensor]
    keep: bool
    joined: bool = False

    def leaves(self) -> list[Tensor]:
        """The parameters, or copies of those at which a gradient in between would not stop, or would meet a hook twice."""
        return [p if p.is_leaf and not p._backward_hooks else p.detach().requires_grad_() for p in self.parameters]


@dataclass
class BiasOfImages:
    """The bias of a few images and the leaves that it was made from: q, k, for some the scores within lines, parameters."""

    spec: Specification
    num_heads: int
    content: list[Tensor]
    scores: dict[Axis, Tensor]
    parameters: list[Tensor]
    bias: AttentionBias | None
    grads: list[Tensor] = field(default_factory=list)  # of the tensors of the bias, while rows are added up

    @classmethod
    def make(cls, spec: Specification, tensors: list[Tensor], scores: Tensor, with_graph: bool) -> BiasOfImages:
        """From the tensors of some images and the first block of their scores."""
        q, k, _, *unrotated = tensors
        num_heads, num_tokens = q.shape[1:3]
        first = num_prefix_tokens(num_tokens, spec.grid)
        content = [full_precision(t[:, :, first:]).detach().requires_grad_(with_graph) for t in unrotated or (q, k)]
        parameters = spec.leaves() if with_graph else spec.parameters
        lines: dict[Axis, Tensor] = {}
        if not unrotated and scores.shape[1] == num_tokens:
            for axis in spec.score_axes:
                lines[axis] = _own_lines(scores, spec.grid, num_heads, axis).requires_grad_(with_graph)
        own = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)  # not those of a checkpoint around the call
        with torch.set_grad_enabled(with_graph), own:
            bias = spec.make_bias(Content(content[0], content[1], spec.grid, lines, joined=spec.joined), parameters)
        return cls(spec, num_heads, content, lines, parameters, bias)

    def add_to(self, scores: Tensor, rows: slice) -> None:
        if self.bias is not None:
            self.bias.add_to(*self._grid_part(scores, rows))

    def accumulate(self, change: Tensor, rows: slice) -> None:
        """Adds what the gradient of some rows of the logits gives to those of the tensors of the bias."""
        if self.bias is None:
            return
        tensors = self.bias.tensors()
        self.grads = self.grads or [torch.zeros_like(t) for t in tensors]
        if any(t.requires_grad for t in tensors):
            part, grid_rows, work = self._grid_part(change, rows)
            self.bias.accumulate(part, grid_rows, self.grads, work)

    def leaf_gradients(self, change: Tensor) -> list[Tensor | None]:
        """The gradients of q and k, then of the parameters; those of line scores are added to `change`, that of all logits."""
        tensors = [] if self.bias is None else self.bias.tensors()
        pairs = [(t, g) for t, g in zip(tensors, self.grads, strict=True) if t.requires_grad]
        leaves = [*self.content, *self.scores.values(), *self.parameters]
        if not pairs:
            return [None] * (2 + len(self.parameters))
        outputs, grads = zip(*pairs, strict=True)
        found = list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))
        for axis, grad in zip(self.scores, found[2:], strict=False):
            if grad is not None:
                _lines(change, self.spec.grid, self.num_heads, axis).add_(grad.mT.unflatten(-1, self.spec.grid))
        return [*found[:2], *found[2 + len(self.scores) :]]

    def _grid_part(self, rows_of_map: Tensor, rows: slice) -> tuple[Tensor, slice, Tensor]:
        """The part of some rows that the bias acts on, which rows of the grid these are, and space to work in."""
        first = num_prefix_tokens(rows_of_map.shape[-1], self.spec.grid)
        part = rows_of_map[:, max(first - rows.start, 0) :, first:]
        grid_rows = slice(max(rows.start - first, 0), max(rows.stop - first, 0))
        return part, grid_rows, WORKSPACE.buffer("work", part.shape, part)


def forward(spec: Specification, tensors: list[Tensor]) -> tuple[Tensor, Tensor, list[BiasOfImages | None]]:
    """(output, softmax weights kept, biases kept)."""
    q, _, v, *_ = tensors
    batch, heads, tokens, _ = q.shape
    output = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)  # what follows joins the heads
    kept = v.new_empty(batch if spec.keep else 0, heads, tokens, tokens)
    biases: list[BiasOfImages | None] = []
    for images in _images(q):
        some = [t[images] for t in tensors]
        values, bias = some[2].reshape(-1, *v.shape[-2:]), None
        for rows in _rows(q):
            out = kept[images].flatten(0, 1) if spec.keep else None
            weights, bias = _weights(spec, some, rows, bias, with_graph=spec.keep, out=out)
            output[images][:, :, rows] = WORKSPACE.product("values", weights, values).unflatten(0, (-1, heads))
        biases.append(bias if spec.keep else None)
    return output, kept, biases


def backward(
    spec: Specification, tensors: list[Tensor], grad: Tensor, output: Tensor, kept: Tensor, biases: list[BiasOfImages | None]
) -> list[Tensor]:
    """The gradients of the tensors, then of the parameters; takes the biases out of their list, whose graphs serve once."""
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    parameter_grads = [torch.zeros_like(p) for p in spec.parameters]
    for number, images in enumerate(_images(tensors[0])):
        bias, biases[number] = biases[number], None  # a second backward pass makes it again
        weights = kept[images].flatten(0, 1) if bias else None
        some, targets = ([t[images] for t in each] for each in (tensors, grads))
        found = _backward_of_images(spec, some, grad[images], output[images], weights, bias, targets)
        for target, value in zip(parameter_grads, found, strict=True):
            if value is not None:
                target.add_(value)
    return [*grads, *parameter_grads]


def _backward_of_images(
    spec: Specification,
    tensors: list[Tensor],
    grad: Tensor,
    output: Tensor,
    kept: Tensor | None,
    bias: BiasOfImages | None,
    targets: list[Tensor],
) -> list[Tensor | None]:
    """Writes the gradients of the tensors of some images into `targets`; returns those of the parameters."""
    product = WORKSPACE.buffer("values", output.shape, full_precision(output[:0]))
    own = torch.mul(full_precision(grad), output, out=product).sum(-1, keepdim=True).flatten(0, 1)  # sum over n of P_in dP_in
    q, k, v, grad = (t.reshape(-1, *t.shape[-2:]) for t in (*tensors[:3], grad))
    dq, dk, dv = (t.flatten(0, 1) for t in targets[:3])
    scale, precision = q.shape[-1] ** -0.5, own.dtype
    found: list[Tensor | None] = []
    for rows in _rows(tensors[0]):
        beta = 0.0 if rows.start == 0 else 1.0  # the first rows overwrite, the others add
        if kept is None:
            weights, bias = _weights(spec, tensors, rows, bias, with_graph=True)
        else:
            weights = kept
        assert bias is not None
        torch.baddbmm(dv, weights.to(dv.dtype).transpose(1, 2), grad[:, rows], beta=beta, out=dv)
        change = WORKSPACE.product("change", grad[:, rows], v.transpose(1, 2), 1.0, precision)
        change.sub_(own[:, rows]).mul_(weights)  # dL
        bias.accumulate(change, rows)
        if rows.stop == q.shape[1]:
            found = bias.leaf_gradients(change)
        change = change.to(dq.dtype)
        torch.baddbmm(dq[:, rows], change, k, beta=0.0, alpha=scale, out=dq[:, rows])
        torch.baddbmm(dk, change.transpose(1, 2), q[:, rows], beta=beta, alpha=scale, out=dk)
    unrotated = [t.zero_() for t in targets[3:]]  # where there are such, what came through the bias is theirs
    for target, value in zip(unrotated or targets, found[:2], strict=False):
        if value is not None:
            target[:, :, num_prefix_tokens(q.shape[1], spec.grid) :].add_(value)
    return found[2:]


def _weights(
    spec: Specification,
    tensors: list[Tensor],
    rows: slice,
    bias: BiasOfImages | None,
    with_graph: bool,
    out: Tensor | None = None,
) -> tuple[Float[Tensor, "count rows tokens"], BiasOfImages]:
    """Softmax weights of some rows, in the dtype of `out` if it is given, and the bias, made if it is not there yet."""
    q, k = (t.reshape(-1, *t.shape[-2:]) for t in tensors[:2])
    precision = full_precision(tensors[2][:0]).dtype
    scores = WORKSPACE.product("logits", q[:, rows], k.transpose(1, 2), q.shape[-1] ** -0.5, precision)
    bias = bias or BiasOfImages.make(spec, tensors, scores, with_graph)
    bias.add_to(scores, rows)
    if out is not None and out.dtype == scores.dtype:
        return torch.softmax(scores, -1, out=out), bias
    weights = torch.softmax(scores, -1, out=WORKSPACE.buffer("weights", scores.shape, scores))
    return weights if out is None else out.copy_(weights), bias


def _images(q: Tensor) -> list[slice]:
    step = max(1, workspace.BLOCK_ELEMENTS * len(q) // max(1, map_elements(q)))
    return [slice(start, start + step) for start in range(0, len(q), step)]


def _rows(q: Tensor) -> list[slice]:
    """All rows at once where they are kept, so that the scores of whole lines are at hand."""
    _, heads, tokens, _ = q.shape
    step = tokens if is_small(q) else max(1, workspace.BLOCK_ELEMENTS // (heads * tokens))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _lines(rows_of_map: Tensor, grid: Grid, num_heads: int, axis: Axis) -> Tensor:
    """A view of the part of all rows that lies within a token's own line, (B, h, S, H, W)."""
    first = num_prefix_tokens(rows_of_map.shape[-1], grid)
    return own_line(rows_of_map[:, first:, first:].unflatten(0, (-1, num_heads)), grid, axis)


def _own_lines(rows_of_map: Tensor, grid: Grid, num_heads: int, axis: Axis) -> Float[Tensor, "batch heads tokens length"]:
    """A copy of that part, places first in memory."""
    return _lines(rows_of_map, grid, num_heads, axis).clone(memory_format=torch.contiguous_format).flatten(-2).mT


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
