"""Sampling as FlexVAR's official evaluation does it, its oddities included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nextscale.contracts import Generators, Pick
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.pick import top_k_top_p
from nextscale.schedule import Schedule
from nextscale.tokens import Tokens

# The published lists of sizes for 256 px by their number of steps (`scripts/evaluate_c2i.sh`). Trained models know 10.
SIZES: dict[int, tuple[int, ...]] = {
    6: (1, 2, 4, 6, 10, 16),
    8: (1, 2, 3, 5, 7, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
    14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
}
SIZES_512 = (*SIZES[13], 23, 32)


def official_ramp(weight: float, max_side: int = 16) -> Guidance:
    """The official guidance: a ramp from 1 that reaches `weight` at the last scale, but never later than at the tenth, and
    goes on rising after it; scales larger than `max_side` have `weight` itself.

    The official `cfg=c` is `official_ramp(1 + c)`; its other form (`used_llamagen_cfg`) is `ns.cfg(c)`.
    """

    def weights(schedule: Schedule, k: int) -> tuple[float, float]:
        t = weight - 1
        if max(schedule[k]) <= max_side and len(schedule) > 1:  # of one scale the official code divides by zero
            t *= k / min(len(schedule) - 1, 9)
        return 1 + t, -t

    return Guidance(weights)


@dataclass(frozen=True)
class official_pick:  # noqa: N801 - reads as the function that it is to its users
    """The official choice of tokens: `top_k_top_p(k, p)` at the sizes that the code lists, the most likely token at others.

    So 7, 9, 11, 12, 14, 15 and all sizes above `max_side` are greedy, with no word about it. `excluded` ids are never picked.
    """

    k: int = 0
    p: float = 0.0
    max_side: int = 16
    excluded: tuple[int, ...] = ()

    LISTED: ClassVar[frozenset[int]] = frozenset((*SIZES[10], 23, 24, 32))

    def at(self, schedule: Schedule, k: int) -> Pick:
        drawn = all(side <= self.max_side and side in self.LISTED for side in schedule[k])
        pick = top_k_top_p(self.k if drawn else 1, self.p)
        if not self.excluded:
            return pick

        def without(logits: Tensor, generators: Generators) -> Tokens:
            ids = torch.tensor(self.excluded, device=logits.device)
            return pick(logits.index_fill(-1, ids, -100.0), generators)

        return without


class SamplingPreset(SamplingDefaults):
    """Sampling as the official evaluation does it, its oddities included."""

    sizes: tuple[int, ...] = Field(SIZES[10], description="sizes of the scales")

    def options(self) -> dict[str, Any]:
        """Arguments `guidance`, `pick` and `schedule` of `ns.sample`."""
        return {
            "guidance": official_ramp(self.guidance),
            "pick": official_pick(self.top_k, self.top_p),
            "schedule": Schedule.squares(*self.sizes),
        }


# The official `cfg=c` is guidance 1 + c. The scores below are said to be of ten steps; the README's command has nine.
SAMPLING: dict[str, SamplingPreset] = {
    "paper-256": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95),
    "paper-256-9": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95, sizes=SIZES[9]),
    "paper-256-13": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95, sizes=SIZES[13]),
    "paper-512": SamplingPreset(guidance=4.0, top_k=900, top_p=0.95, sizes=SIZES_512),
}
