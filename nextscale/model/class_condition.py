"""Classes as conditions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nextscale.condition import Condition


class ClassCondition(nn.Module):
    """A learned vector for each class, and one for the null class (the last row). `name`: what its reader is called."""

    def __init__(self, num_classes: int, dim: int, name: str = "label") -> None:
        super().__init__()
        self.num_classes, self.name = num_classes, name
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, told: Mapping[str, Tensor]) -> Condition:
        """Labels int64 [B] in 0 .. num_classes; num_classes is the null class."""
        if self.name not in told:
            raise ValueError(f"no reader of this system is named {self.name!r}; there are {', '.join(told) or 'none'}")
        return self._condition(told[self.name])

    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, for as many images as the given one."""
        return self._condition(torch.full((len(condition),), self.num_classes, device=self.embedding.weight.device))

    @torch.no_grad()
    def grow(self, smaller: ClassCondition) -> None:
        """Take over the vectors of one with the first of its classes; a further class begins as their mean."""
        known, null = smaller.embedding.weight[:-1], smaller.embedding.weight[-1:]
        further = known.mean(dim=0).expand(self.num_classes - smaller.num_classes, -1)
        self.embedding.weight.copy_(torch.cat([known, further, null]))  # the null class is the last

    def _condition(self, labels: Tensor) -> Condition:
        vec = self.embedding(labels)  # [B, D]
        return Condition(start=vec.unsqueeze(1), vec=vec)
