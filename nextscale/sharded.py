"""Weights, gradients and optimizer state in pieces, one a process (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard(call: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Shard a module over all processes, its blocks one by one; what is used outside of them belongs to `call`, whose
    forward pass must be all that touches the weights."""
    # What `prepare` returns are views, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in blocks:
        sharded: Any = fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(sharded, "prepare")
    # Validation has no backward pass, which else would put the pieces back.
    fully_shard(call, mesh=mesh, reshard_after_forward=True)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded module with whole tensors; all processes must call it."""
    state: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return state
