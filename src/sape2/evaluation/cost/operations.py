"""Counts the operations of a forward pass: multiply-accumulates and, separately, elementwise work.

Everything is counted from the operators that PyTorch runs on the device "meta", where tensors have shapes but no
values: nothing is allocated, and no fused attention kernel hides its products and its softmax from the counter. The
counts are therefore those of the code as written, whichever kernel later executes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)

# Operators that only make or move numbers: no arithmetic.
MAKING = {
    aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.zeros, aten.zeros_like,
    aten.new_zeros, aten.ones, aten.ones_like, aten.new_ones, aten.full, aten.full_like, aten.new_full, aten.arange,
    aten.scalar_tensor, aten.eye, aten.fill, aten.fill_, aten.zero_, aten.linspace,
}  # fmt: skip
MOVING = {
    aten.clone, aten.copy, aten.copy_, aten._to_copy, aten.cat, aten.stack, aten.constant_pad_nd, aten.flip, aten.roll,
    aten.repeat, aten.tril, aten.triu,
}  # fmt: skip
# Operators that read more than they write: one operation for every number read.
READING = {
    aten.sum, aten.mean, aten.cumsum, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.any, aten.all,
    aten.prod, aten.logsumexp, aten.logcumsumexp, aten.bincount,
}  # fmt: skip
# Operators that stand for several: operations for every number written.
COMPOSITE = {
    aten._softmax: 5,  # largest, difference, exponential, sum, quotient
    aten._safe_softmax: 5,
    aten._log_softmax: 5,
    aten.native_layer_norm: 8,  # mean 1, variance 3, centre, scale, weight, offset
    aten.gelu: 5,  # x / sqrt 2, error function, + 1, times x, / 2
    aten.silu: 2,
    aten.var_mean: 4,
    aten.addcmul: 2,
    aten.lerp: 3,
}


class Operations(NamedTuple):
    """`macs`: multiply-accumulates in matrix products and convolutions. `elementwise`: operations on single numbers.
    `copied`: numbers written to be moved (copies, casts, concatenations, paddings, flips), no arithmetic.
    """

    macs: int
    elementwise: int
    copied: int


def count_operations(run: Callable[[], object]) -> Operations:
    """Counts the operations that `run`, on tensors of the device "meta", requests from PyTorch, without gradients."""
    single, products = ElementwiseCounter(), FlopCounterMode(display=False)
    with single, products, torch.no_grad():
        run()
    return Operations(products.get_total_flops() // 2, single.elementwise, single.copied)


def on_meta(module: Module) -> Module:
    """A copy of the module on the device "meta", in eval mode; the parameters are not copied."""
    parts = [*module.parameters(), *module.buffers()]
    memo = {id(part): _like(part) for part in parts}
    return copy.deepcopy(module, memo).eval()


def _like(part: Tensor) -> Tensor:
    empty = torch.empty_like(part, device="meta")
    return nn.Parameter(empty, requires_grad=part.requires_grad) if isinstance(part, nn.Parameter) else empty


class ElementwiseCounter(TorchDispatchMode):
    """Counts the operations on single numbers in every operator that runs under it.

    One operation is one arithmetic, comparison, rounding, or transcendental function of a number, or one look-up by
    index. An operator counts one for every number it writes; a reduction or running sum one for every number it reads;
    softmax, layer norm and the like what they stand for (`COMPOSITE`); `cdist` without matrix products a difference, a
    square and a sum for every coordinate and a root for every pair. Matrix products and convolutions count nothing here
    (they are MACs, the bias that they add included), views nothing at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elementwise = 0
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in MOVING:
            self.copied += _size(output)
        elif not (operator in MAKING or operator in flop_registry or _is_view(func)):
            self.elementwise += _operations(operator, args, output)
        return output


def _operations(operator: Any, args: tuple, output: Any) -> int:
    if operator in READING:
        return max(_size(args[0]), _size(output))
    if operator is aten._cdist_forward:
        return _size(output) * (3 * args[0].shape[-1] + 1)
    if operator in COMPOSITE:
        return COMPOSITE[operator] * args[0].numel()
    return _size(output)


def _is_view(func: Any) -> bool:
    """True if the operator returns a view of its input."""
    return func.overloadpacket is aten._unsafe_view or any(
        value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
    )


def _size(values: Any) -> int:
    """Elements of the largest of the tensors: an operator that returns two numbers per place counts once."""
    return max((math.prod(value.shape) for value in tree_leaves(values) if isinstance(value, Tensor)), default=0)
