"""The running mean of the weights: what is validated, shown and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Exponential moving average of a module's parameters, beside them: sharded where they are.

    Young averages forget faster: the decay of update n is min(decay, (1 + n) / (10 + n)). Buffers are the module's own.
    `torch.optim.swa_utils.AveragedModel` copies the module, which sharded modules cannot be; the numbers are the same.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.count = module, decay, 0
        self.values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the module's weights; the first time, take them."""
        current = [parameter.detach() for parameter in self.module.parameters()]
        rate = 0.0 if self.count == 0 else min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.values.values()), current, 1 - rate)
        self.count += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and their average."""
        for name, parameter in self.module.named_parameters():
            own = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(own)

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The module with the averaged weights, for as long as the block lasts."""
        self.swap()
        try:
            yield self.module
        finally:
            self.swap()
