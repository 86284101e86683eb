"""Weights, gradients and optimizer state in pieces, one a process (FSDP2), and whole again for checkpoints.

A checkpoint is the same file however many processes wrote it, sharded or not, so any other number can go on with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def shard(call: nn.Module, module: Any, device: str) -> None:
    """Shard a module over all processes, its blocks one by one; what is used outside of them belongs to `call`, whose
    forward pass must be all that touches the weights."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in module.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "prepare")
    # Validation has no backward pass, which else would put the pieces back.
    fully_shard(call, mesh=mesh, reshard_after_forward=True)


def whole(value: Any, keep: bool = True) -> Any:
    """Nested dicts and lists with every sharded tensor whole; all processes must call it. `keep`: else tensors are dropped
    as soon as they are whole, so that only the process that writes holds them."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {name: whole(inner, keep) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner, keep) for inner in value)
    return value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    target.copy_(placed(value, target))


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as another one is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` with whole tensors, for parameters that may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        i: {
            name: placed(value, parameters[i])
            if isinstance(value, Tensor) and value.shape == parameters[i].shape
            else value
            for name, value in values.items()
        }
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
