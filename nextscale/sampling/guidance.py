"""Guidance: how predictions under different conditions become one.

A guided prediction is a weighted sum over branches: `sum_b c_b(k) * prediction_b`, with weights that sum to 1. The first
branch has the whole condition, the others have parts of it replaced by their nulls. The weight w of a user is
`uncond + w * (cond - uncond)`, 1 = off, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nextscale.schedule import Schedule
from nextscale.settings import brief, finite_number

MOST_WEIGHT = 1000


@dataclass(frozen=True)
class Guidance:
    """Branches and their weights at each scale.

    Args:
        weights: `weights(schedule, k)` -> one weight a branch, summing to 1.
        drops: what each branch lacks: names of the condition's parts, `("all",)`, or `()` for the first branch.
    """

    weights: Callable[[Schedule, int], tuple[float, ...]]
    drops: tuple[tuple[str, ...], ...] = ((), ("all",))

    def alive(self, schedule: Schedule, k: int) -> tuple[int, ...]:
        """Branches that must run at scale k: those with a weight there or at a later scale, and always the first.

        A branch that is needed later must run now, since its keys and values will be attended to.
        """
        later = [self.at(schedule, j) for j in range(k, len(schedule))]
        return tuple(b for b in range(len(self.drops)) if b == 0 or any(weights[b] != 0 for weights in later))

    def at(self, schedule: Schedule, k: int) -> tuple[float, ...]:
        """The weights of scale k. Raises ValueError unless they are finite, one a branch."""
        weights = self.weights(schedule, k)
        if len(weights) != len(self.drops) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"guidance: expected {len(self.drops)} finite weights, one a branch, got {brief(weights)} at scale {k}"
            )
        return weights

    def combine(self, predictions: Tensor, alive: tuple[int, ...], schedule: Schedule, k: int) -> Tensor:
        """One prediction [B, ...] of those of the running branches, stacked in rows [len(alive) * B, ...]."""
        weights = self.at(schedule, k)
        first, *others = predictions.chunk(len(alive))
        if all(weights[b] == 0 for b in alive[1:]):
            return first
        total = first * weights[0]
        for b, prediction in zip(alive[1:], others, strict=True):
            if weights[b] != 0:
                total = total + prediction * weights[b]
        return total


def cfg(weight: float | Sequence[float]) -> Guidance:
    """Classifier-free guidance with the same weight at every scale, or with one for each; 1 = off."""
    weight = checked(weight, _weight)

    def weights(schedule: Schedule, k: int) -> tuple[float, float]:
        w = at_scale(weight, schedule, k)
        return w, 1.0 - w

    return Guidance(weights)


def cfg_ramp(weight: float) -> Guidance:
    """Classifier-free guidance whose weight rises from 1 at the first scale to `weight` at the last one.

    The reference's `cfg=c` is `cfg_ramp(1 + c)`.
    """
    weight = _weight(weight)

    def weights(schedule: Schedule, k: int) -> tuple[float, float]:
        t = (weight - 1) * schedule.progress(k)
        return 1 + t, -t

    return Guidance(weights)


def apart(weight: float, parts: Mapping[str, float], *, ramp: bool = False) -> Guidance:
    """Guidance with a weight of its own for some parts of the condition, and `weight` for all others; 1 = off.

    It leads from nothing to all other parts, then to each named one in turn (as InstructPix2Pix, arXiv 2211.09800, Eq. 3):
    `p(0) + w (p(others) - p(0)) + w_1 (p(others, 1) - p(others)) + ...`. With the same weight everywhere it is `cfg`; each name
    costs one more branch. `ramp`: as `cfg_ramp`, all weights rise from 1 at the first scale.

    apart(4, {"style": 2}) guides the label or text by 4, the style by 2.
    """
    names, chain = tuple(parts), [_weight(weight), *(_weight(own) for own in parts.values())]
    if not names:
        raise ValueError("apart: expected the weights of some parts, {'style': 2.0} for example, got none")

    def weights(schedule: Schedule, k: int) -> tuple[float, ...]:
        own = [1 + (w - 1) * schedule.progress(k) for w in chain] if ramp else chain
        return (own[-1], *(a - b for a, b in zip(own[-2::-1], own[:0:-1], strict=True)), 1 - own[0])

    return Guidance(weights, ((), *(names[i:] for i in range(len(names) - 1, -1, -1)), ("all",)))


def _weight(number: Any) -> float:
    return finite_number("guidance weight", number, -MOST_WEIGHT, MOST_WEIGHT, "; 1 is off")


def checked(numbers: Any, check: Callable[[Any], float]) -> float | tuple[float, ...]:
    """One number, or a list (array, tensor) of one for each scale, each of them checked."""
    if isinstance(numbers, list | tuple) or getattr(numbers, "ndim", 0) == 1:
        if not len(numbers):
            raise ValueError("expected one number, or one for each scale, got none")
        return tuple(check(number) for number in numbers)
    return check(numbers)


def at_scale(value: float | Sequence[float], schedule: Schedule, k: int) -> float:
    """The number of scale k: `value` itself, or the k-th of one number a scale."""
    if not isinstance(value, Sequence):
        return value
    if len(value) != len(schedule):
        raise ValueError(
            f"expected one number, or one for each of {len(schedule)} scales, got {len(value)}: {brief(value)}"
        )
    return value[k]
