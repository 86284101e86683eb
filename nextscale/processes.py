"""Training on several processes: who takes which rows, whose gradients are averaged, who writes. torchrun starts them."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Team:
    """The processes that train together; alone, all calls but `wrap` do nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Team:
        """The team that torchrun started, joined; a team of one where nothing says otherwise."""
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        if not dist.is_initialized():
            rank = _number("RANK", size)
            wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if missing := [name for name in wanted if name not in os.environ]:
                raise ValueError(
                    f"WORLD_SIZE={size} is set in the environment, but {missing[0]} is not: start several processes with "
                    "torchrun, or unset WORLD_SIZE"
                )
            try:  # the others may still be starting
                store, rank, size = next(rendezvous("env://", rank, size, timeout=timedelta(minutes=5)))
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"WORLD_SIZE={size} is set in the environment, but the other processes did not come within 5 minutes; "
                    "start them all with torchrun, or unset WORLD_SIZE, RANK and MASTER_ADDR"
                ) from error
            # gloo for tensors on the CPU, and the accelerator's own backend where there is one. The leader judges, draws and
            # saves while the others wait, and one may encode for longer than another: that takes what it takes. When a
            # process dies, torchrun ends the others at once.
            store.set_timeout(timedelta(days=7))
            dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
            atexit.register(dist.destroy_process_group)  # else a process aborts more often while its threads still run
        return cls(dist.get_rank(), size)

    def own_device(self, device: str) -> str:
        """`cuda` becomes this process's own GPU of its machine, and is chosen."""
        if self.size > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        return device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def pieces(self, batch_size: int, accumulate: int) -> list[slice]:
        """Rows of the whole batch that this process takes, one slice for each forward pass.

        Raises ValueError if processes and passes do not divide the batch.
        """
        count = self.size * accumulate
        if batch_size % count:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared by {self.size} processes x {accumulate} passes each (accumulate); "
                f"use a batch size that {count} divides"
            )
        length = batch_size // count
        first = self.rank * accumulate
        return [slice(i * length, (i + 1) * length) for i in range(first, first + accumulate)]

    def wrap(
        self, module: nn.Module, function: Callable[..., Any], *, unused: bool = False, sharded: str = ""
    ) -> nn.Module:
        """A module that calls `function`, which uses `module`, and whose backward pass averages gradients over the team.

        `unused`: some parameters may take no part in some steps. `sharded`: a device; the module, which has `blocks`, is
        sharded over the team. Optimizers are made after that.
        """
        call = _Call(module, function)
        if self.size == 1:
            return call
        if sharded:
            from nextscale.sharded import shard

            shard(call, module.get_submodule("blocks").children(), sharded)
            return call
        return DistributedDataParallel(call, broadcast_buffers=False, find_unused_parameters=unused)

    def averaging(self, wrapped: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Where a backward pass averages gradients over the team (`now`), or only adds them up."""
        if isinstance(wrapped, DistributedDataParallel) and not now:
            return wrapped.no_sync()
        if (set_sync := getattr(wrapped, "set_requires_gradient_sync", None)) is not None:  # sharded
            set_sync(now)
        return nullcontext()

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the team, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def average(self, values: Tensor) -> Tensor:
        """The mean over the team, without a gradient; alone, the values themselves."""
        return values if self.size == 1 else self.sum_(values.detach().clone().contiguous()) / self.size

    def average_with_gradient(self, values: Tensor) -> Tensor:
        """The mean over the team, whose gradient goes to all of it; alone, the values themselves."""
        if self.size == 1:
            return values
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values.contiguous()) / self.size

    def all_rows(self, values: Tensor) -> Tensor:
        """The rows of all processes behind each other, as many of each; alone, the values themselves."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def share_(self, values: Tensor) -> Tensor:
        """The leader's values, in place."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; small ones, that pickle knows."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def mean(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Metrics averaged over the team; all must have the same names."""
        values = torch.tensor([float(value) for value in metrics.values()], dtype=torch.double)
        return dict(zip(metrics, (self.sum_(values) / self.size).tolist(), strict=True))


def check_workers(count: int, name: str = "workers") -> None:
    """Refuse more processes or threads than a machine has a use for: each takes memory, and time to start."""
    cores = os.cpu_count() or 1
    if not 0 <= count <= 16 * cores:
        raise ValueError(f"{name}: expected 0 to 16 for each of {cores} cores, got {count}; 2 to 8 are usual")


def _number(name: str, default: int) -> int:
    """A number in the environment, where torchrun puts it."""
    text, least = os.environ.get(name, str(default)), int(name == "WORLD_SIZE")
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) >= least):
        raise ValueError(
            f"{name}={text[:40]!r} is set in the environment, but torchrun sets whole numbers; unset {name}"
        )
    return int(text)


def end_process() -> None:
    """End a program that trained in a team, and succeeded, at once; alone, do nothing.

    In a team Python's own end may abort: behind `DistributedDataParallel`, `destroy_process_group` leaves threads of the group
    running (torch 2.13). Of some hundreds of processes one died so after its work was done, and its run counted as failed.
    What is registered with `atexit` does not run, so all files must be closed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Call(nn.Module):
    """`DistributedDataParallel` needs a module whose forward pass is all of the loss."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *values: Any, function: Callable[..., Any] | None = None) -> Any:
        """`function`: another one that uses the module."""
        return (function or self.function)(*values)
