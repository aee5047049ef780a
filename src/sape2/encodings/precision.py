"""Float32 or better for gates, sums, positions, angles and distances, whatever the network around them computes in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """float32 for half types, anything wider unchanged: the island in which sums and positions are computed."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on the tensor's device, so that float32 products stay float32.

    Not in an exported graph: a region there hides its operations from what reads the graph. Such a graph has its own precision.
    """
    device = tensor.device.type
    if torch.compiler.is_exporting():
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
