"""Buffers that the blocks of attention use again: fresh memory would cost more time than the work."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sape2.encodings.distances import BLOCK_ELEMENTS


class Workspace(threading.local):
    """Buffers by name, one set a thread.

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


WORKSPACE = Workspace()
