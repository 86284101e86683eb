"""Objectives: what the generator is told while it trains, and what it must predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from nextscale.condition import Condition
from nextscale.draws import Draws
from nextscale.schedule import Schedule
from nextscale.tokenizer.pyramid import teacher_inputs


class Batch(NamedTuple):
    """What one step of training compares: inputs [B, L - l_0, C] of every scale but the first (None if it is the only
    one), targets [B, L] (of bits [B, L, d]), and the weight of each token [L], summing to 1 (None: 1 / L each)."""

    schedule: Schedule
    inputs: Tensor | None
    targets: Tensor
    weights: Tensor | None = None


class Objective(Protocol):
    """How images become inputs and targets.

    `cached` says what is stored of each image before training: its `tokens`, enough where they are always the same,
    or its `features` [C, H, W], from which every step makes tokens anew.
    """

    @property
    def cached(self) -> Literal["tokens", "features"]: ...

    def batch(self, pyramid: Any, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of `content` (what was cached, [B, ...]), with the images' random numbers. The schedule of the
        batch may be another one."""


@dataclass(frozen=True)
class TeacherForcing:
    """VAR's objective: every scale is predicted from the true coarser ones."""

    cached: ClassVar[Literal["tokens"]] = "tokens"

    def batch(self, pyramid: Any, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        return Batch(schedule, teacher_inputs(pyramid, schedule.split(content), schedule), content)


def drop_condition(condition: Condition, null: Condition, probability: float, draws: Draws) -> Condition:
    """Replace every part of some images' conditions by its null, for guidance without a classifier."""
    dropped = (draws.rand() < probability).to(condition.vec.device)
    return condition.mix(null, dict.fromkeys(condition.parts(), dropped))
