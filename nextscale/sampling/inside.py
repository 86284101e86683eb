"""Guidance on hidden states: the branches are blended inside the transformer instead of at its logits (as Infinity may)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nextscale.sampling.guidance import Guidance
from nextscale.schedule import Schedule, Span
from nextscale.system import System


class GuidedBlock(nn.Module):
    """A block after which all branches of a guidance go on from one blended state; for sampling alone."""

    def __init__(self, block: nn.Module, guidance: Guidance) -> None:
        super().__init__()
        self.block: Any = block
        self.guidance = guidance

    @property
    def branches(self) -> nn.ModuleList:
        return self.block.branches

    def prepare(self, condition: Any) -> Any:
        return self.block.prepare(condition)

    def forward(self, h: Tensor, prepared: Any, span: Span, cache: Any = None) -> Tensor:
        if cache is None:
            raise ValueError(
                "guidance inside a block works while sampling, scale by scale; here use the system without it"
            )
        h = self.block(h, prepared, span, cache)
        alive = self.guidance.alive(span.schedule, span.first)
        blended = self.guidance.combine(h, alive, span.schedule, span.first)
        return blended.repeat(len(alive), 1, 1)


class FirstBranch:
    """The branches of a guidance, of which the first one's prediction is taken."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance, self.drops = guidance, guidance.drops

    def alive(self, schedule: Schedule, k: int) -> tuple[int, ...]:
        return self.guidance.alive(schedule, k)

    def combine(self, predictions: Tensor, alive: tuple[int, ...], schedule: Schedule, k: int) -> Tensor:
        return predictions.chunk(len(alive))[0]


def guide_inside(system: System, guidance: Guidance, block: int) -> tuple[System, FirstBranch]:
    """Guidance on hidden states: a system and a guidance for `ns.sample`; nothing is copied.

    After block number `block` (negative ones count from the end) the branches are blended, and all go on from the result,
    each with its own condition; the first one's logits are used.
    """
    model = system.need_model()
    depth = len(model.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"this model has blocks 0 to {depth - 1}, or -{depth} to -1 from the end, got {block}")
    blocks = list(model.blocks)
    blocks[block] = GuidedBlock(blocks[block], guidance)
    return system.with_model(model.with_blocks(blocks)), FirstBranch(guidance)
