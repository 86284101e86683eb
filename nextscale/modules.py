"""Modules from outside: sharing what they have, looking through wrappers, and torch as it usually is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

P = TypeVar("P")


def replaced(part: P, **parts: nn.Module) -> P:
    """A module that shares everything with the given one but the named parts."""
    other = copy.copy(part)
    as_module(other)._modules = {**as_module(part)._modules, **parts}
    return other


def as_module(part: object) -> nn.Module:
    """A part, known by its contract, as the module that it is. Raises ValueError for anything else."""
    if not isinstance(part, nn.Module):
        raise ValueError(f"expected a torch module, got {type(part).__name__}")
    return part


def module_list(parts: Iterable[object]) -> nn.ModuleList:
    """Parts, known by their contracts, as a list that torch knows."""
    return nn.ModuleList(as_module(part) for part in parts)


# What puts a module into another one: torch.compile, DataParallel and DistributedDataParallel, and under which name.
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def inner_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict under the names that its weights have without wrappers (`torch.compile`, `DataParallel`, ...),
    wherever in it these are. The tensors are its own."""
    wrapped = {  # the path of a wrapper -> the path of what it wraps
        f"{path}.".lstrip("."): f"{path}.{inner}.".lstrip(".")
        for path, part in module.named_modules()
        if (inner := WRAPPERS.get(type(part).__name__)) is not None
    }
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        for outer, inner in sorted(wrapped.items(), key=lambda pair: -len(pair[0])):  # the innermost first
            if name.startswith(inner):
                name = outer + name.removeprefix(inner)
        state[name] = tensor
    return state


def without_wrapper(names: Iterable[str]) -> str:
    """What stands before all of some names of weights because a wrapper was saved instead of what it wraps; or nothing."""
    names, prefix = list(names), ""
    while names:
        longer = (f"{prefix}{wrapper}." for wrapper in sorted(set(WRAPPERS.values())))
        found = next((each for each in longer if all(name.startswith(each) for name in names)), None)
        if found is None:
            break
        prefix = found
    return prefix


@contextmanager
def usual_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU, whatever a program set as its default: a system's numbers do not depend on it.

    Also a decorator. Where the default device is "meta", it stays: nothing is computed there.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype == torch.float32 and device.type in ("cpu", "meta"):
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
