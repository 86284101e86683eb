"""What pyramids have in common: feature maps as rows of tokens, and what they leave behind at each scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.contracts import Encoded, Pyramid
from nextscale.schedule import Schedule
from nextscale.tokens import Tokens


class Step(NamedTuple):
    """What one scale of a walk through a pyramid gives: tokens [B, l_k, ...], f_hat [B, C, H, W] after it, and the residual
    that the tokens stand for [B, l_k, C]."""

    tokens: Tokens
    f_hat: Tensor
    residual: Tensor


@torch.no_grad()
def encoded(pyramid: Pyramid, walk: Iterable[Step], schedule: Schedule) -> Encoded:
    """Tokens, inputs and sums of a walk through a pyramid (Alg. 1 of VAR, whose loop is the walk)."""
    found = Encoded([], [], [])
    for k, step in enumerate(walk):
        found.tokens.append(step.tokens)
        found.f_hats.append(step.f_hat)
        if k + 1 < len(schedule):
            found.inputs.append(pyramid.next_input(step.f_hat, k + 1, schedule))
    return found


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized`, with a gradient that goes to `x` as if nothing were quantized."""
    return x + (quantized - x).detach()


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, H, W] averaged down to a size."""
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="area")


def as_rows(x: Tensor) -> Tensor:
    """A map [B, C, h, w] as one row for each token, [B, h * w, C]."""
    return x.flatten(2).mT


def as_map(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """The other way."""
    return rows.mT.unflatten(-1, size)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU where it has none."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
