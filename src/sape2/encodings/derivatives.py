"""Where gradients may be written by hand, and what takes their place elsewhere: the readable form, under autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def by_hand(*tensors: Tensor) -> bool:
    """False where only single differentiable operations do: in a graph, a functional transform or forward mode."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or any(map(is_transformed, tensors)))


def is_transformed(tensor: Tensor) -> bool:
    """True inside torch.func (grad, vmap, jvp), or if the tensor carries a forward-mode tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(tensor).tangent is not None


def in_operations_backward(grad: Tensor) -> bool:
    """Whether a backward pass may not write gradients by hand: they are differentiated again, or mapped over many at once."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # is_grads_batched=True, jacobian(..., vectorize=True)
    return torch.is_grad_enabled() or batched or is_transformed(grad)


def differentiable_gradients(
    readable: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `readable(*inputs)` by single operations, as a graph of their own where one is wanted.

    Views stand for the inputs: inputs depend on each other, as q does on the parameters of the layers before, and what comes
    that way is not of this call.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(readable(*inputs), wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
