"""VAR's initial weights, which the parts of a model share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def var_normal_(weight: Tensor, dim: int, generator: torch.Generator) -> None:
    """Normal of variance 1 / (3 D), cut at +-2, in place."""
    nn.init.trunc_normal_(weight, std=math.sqrt(1 / dim / 3), generator=generator)
