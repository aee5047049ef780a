"""Attention block by block as one differentiable operation; the products are in `kernels.blocks`.

Gradients that shall be differentiated again (`create_graph=True`) are those of the plain form, whole maps at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.attention.kernels import blocks
from sape2.attention.kernels.blocks import Specification
from sape2.attention.paths import is_small
from sape2.attention.products import for_keys, scores_with
from sape2.encodings.base import AttentionEncoding
from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content
from sape2.encodings.derivatives import differentiable_gradients, in_operations_backward
from sape2.encodings.grid import Grid, num_prefix_tokens
from sape2.encodings.precision import full_precision, no_autocast


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, encoding: AttentionEncoding, vectors: Tensor | None = None
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """`vectors` as in `encode`."""
    device = q.device.type
    q, k, v = (t.contiguous() for t in (q, k, v))  # once, for rotations and both passes
    rotated_q, rotated_k = encoding.rotate_all(q, k, grid) if vectors is None else (q, k + for_keys(vectors, k))
    unrotated = () if rotated_q is q and rotated_k is k else (q, k)
    tensors = [rotated_q, rotated_k, v, *unrotated]
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    taken = Encoding.of(encoding)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *taken.parameters))
    keep, joined = differentiated and is_small(q), vectors is not None
    spec = Specification(grid, taken.make_bias, encoding.score_axes, taken.parameters, keep, joined)
    with no_autocast(q):
        return BlockAttention.apply(spec, len(tensors), *tensors, *taken.parameters)


@dataclass(frozen=True)
class Encoding:
    """An encoding with the tensors that it has in a call; `torch.func.functional_call` takes them back when it ends."""

    encoding: AttentionEncoding
    held: dict[str, Tensor]  # all parameters and buffers, by every name that they have
    parameters: list[Tensor]  # those that learn

    @classmethod
    def of(cls, encoding: AttentionEncoding) -> Encoding:
        held = _held(encoding)
        return cls(encoding, held, list({id(t): t for t in held.values() if t.requires_grad}.values()))

    def make_bias(self, content: Content, parameters: Sequence[Tensor]) -> AttentionBias | None:
        """The bias of the encoding as it was in the call, with these in the place of its parameters."""
        return self._with(parameters).make_bias(content)

    def _with(self, parameters: Sequence[Tensor]) -> AttentionEncoding:
        other = {id(old): new for old, new in zip(self.parameters, parameters, strict=True)}
        wanted = {name: other.get(id(t), t) for name, t in self.held.items()}
        now = _held(self.encoding)
        if len(now) == len(wanted) and all(now.get(name) is t for name, t in wanted.items()):
            return self.encoding
        return _with_tensors(self.encoding, wanted)


def _held(encoding: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = (of(remove_duplicate=False) for of in (encoding.named_parameters, encoding.named_buffers))
    return dict(parameters) | dict(buffers)


def _with_tensors(module: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """A shallow copy of a module that holds other parameters and buffers; other threads may use the module meanwhile."""
    module = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        vars(module)[kind] = {name: tensors.get(prefix + name, t) for name, t in vars(module)[kind].items()}
    parts = vars(module)["_modules"].items()
    vars(module)["_modules"] = {n: None if m is None else _with_tensors(m, tensors, f"{prefix}{n}.") for n, m in parts}
    return module


class BlockAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v: the tensors of the specification and its parameters -> (B, h, T, channels of v)."""

    @staticmethod
    def forward(ctx: Any, spec: Specification, num_tensors: int, *inputs: Tensor) -> Tensor:
        output, kept, ctx.biases = blocks.forward(spec, list(inputs[:num_tensors]))
        ctx.spec, ctx.num_tensors = spec, num_tensors
        ctx.save_for_backward(output, kept, *inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        output, kept, *inputs = ctx.saved_tensors
        with no_autocast(grad):
            if in_operations_backward(grad):
                return None, None, *differentiable_gradients(_plainly(ctx), inputs, ctx.needs_input_grad[2:], grad)
            return None, None, *blocks.backward(ctx.spec, inputs[: ctx.num_tensors], grad, output, kept, ctx.biases)


def _plainly(ctx: Any) -> Any:
    """The plain form of a call, as a function of its inputs."""
    spec: Specification = ctx.spec

    def attention(*inputs: Tensor) -> Tensor:
        q, k, v, *unrotated = inputs[: ctx.num_tensors]
        first = num_prefix_tokens(q.shape[-2], spec.grid)
        grid_q, grid_k = (full_precision(t[:, :, first:]) for t in unrotated or (q, k))
        bias = spec.make_bias(Content(grid_q, grid_k, spec.grid, joined=spec.joined), inputs[ctx.num_tensors :])
        return scores_with(full_precision(q), full_precision(k), bias).softmax(-1).to(v.dtype) @ v

    return attention
