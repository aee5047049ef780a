"""Divides weights, gradients and optimiser state among the processes, and gathers them for files and measurements.

FSDP2, `torch.distributed.fsdp.fully_shard` (Zhao et al., arXiv:2304.11277): every process keeps one part of each tensor, and a
block has its whole weights only while it computes. Files hold whole tensors, as those of one process do. The modules of
torch for this are imported when they are used, because the import is slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device) -> None:
    """Divides the model in place: each of its blocks, then all other parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks: Any = getattr(model, "blocks", ())
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


def put_together(sharded: nn.Module, whole: nn.Module) -> None:
    """Copies the weights of a divided model into an undivided one. All processes must call it."""
    with torch.no_grad():
        for part, tensor in zip(sharded.state_dict().values(), whole.state_dict().values(), strict=True):
            tensor.copy_(_whole(part))


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state that the optimiser would have in one process, on the CPU. All processes must call it."""
    state = optimizer.state_dict()
    whole = {number: {name: _on_cpu(value) for name, value in of.items()} for number, of in state["state"].items()}
    return state | {"state": whole}


def divided_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_state` for an optimiser of divided weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {
        number: {name: _divided_like(value, parameters[number]) for name, value in of.items()}
        for number, of in state["state"].items()
    }
    return state | {"state": divided}


def _on_cpu(value: Any) -> Any:
    return _whole(value).cpu() if isinstance(value, Tensor) else value


def _divided_like(value: Any, parameter: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is a DTensor."""
    together: Any = getattr(tensor, "full_tensor", None)
    return together() if together else tensor


def here(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process has."""
    local: Any = getattr(tensor, "to_local", None)
    return local() if local else tensor
