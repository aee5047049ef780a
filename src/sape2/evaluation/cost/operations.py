"""Counts the multiply-accumulates of a forward pass from the operators that PyTorch runs on the device "meta".

Tensors have shapes there but no values: nothing is allocated, and no fused attention kernel hides its products from the
counter. The counts are therefore those of the code as written, whichever kernel later executes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sape2.machine import placed


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates in the matrix products and convolutions of `run`, which works on tensors of the device "meta"."""
    with FlopCounterMode(display=False) as products, torch.no_grad():
        run()
    return products.get_total_flops() // 2


def count_model_macs(model: nn.Module, channels: int, image_size: tuple[int, int]) -> int:
    """Those of one image's forward pass, attention included."""
    shadow = on_meta(model)
    return count_macs(lambda: shadow(placed(torch.empty(1, channels, *image_size, device="meta"), shadow)))


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module on the device "meta", in eval mode; the parameters are not copied."""
    parts = [*module.parameters(), *module.buffers()]
    memo = {id(part): _like(part) for part in parts}
    return copy.deepcopy(module, memo).eval()


def _like(part: Tensor) -> Tensor:
    empty = torch.empty_like(part, device="meta")
    return nn.Parameter(empty, requires_grad=part.requires_grad) if isinstance(part, nn.Parameter) else empty
