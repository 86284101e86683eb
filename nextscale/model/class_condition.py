"""Classes as conditions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.condition import Condition


class ClassCondition(nn.Module):
    """A learned vector for each class, and one for the null class (the last row)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Condition:
        """Labels int64 [B] in 0 .. num_classes; num_classes is the null class."""
        vec = self.embedding(labels)  # [B, D]
        return Condition(start=vec.unsqueeze(1), vec=vec)

    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, for as many images as the given one."""
        return self(torch.full((len(condition),), self.num_classes, device=self.embedding.weight.device))
