"""Modules that share what they have with others: how methods change a trained network from outside."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def replaced(module: M, **parts: nn.Module) -> M:
    """A module that shares everything with the given one but the named parts."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other
