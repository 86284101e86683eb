"""Modules that share what they have with others: how methods change a trained network from outside."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

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
