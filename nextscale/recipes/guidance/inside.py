"""Guidance on hidden states: the branches are blended inside the transformer instead of at its logits (as Infinity's code may;
arXiv 2412.04431).

Changes by room. sampling: one block of each step is wrapped; after it all branches go on from the blended state, each with
its own condition, and the first one's logits are used. The caller or the system chooses the guidance, as ever. Weights stay as
they are, and a teacher-forced pass knows nothing of it. Nothing differs from the official code (`cfg_insertion_layer`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor

from nextscale.contracts import Block, LayerCache, Opaque
from nextscale.model.block import BlockWrapper
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.loop import StepperWrapper, stepper_of
from nextscale.sampling.state import State
from nextscale.schedule import Schedule, Span
from nextscale.settings import Settings
from nextscale.system import System

APPLIES_TO = "any system that samples with guidance"


class Config(Settings):
    """Where the branches meet."""

    block: int = Field(
        -1, ge=-1024, le=1023, description="number of the block after which they are blended; negative: from the end"
    )


def tiny() -> Config:
    """After the first block."""
    return Config(block=0)


def apply(system: System, config: Config = Config()) -> System:
    """A system whose guidance acts inside its transformer; it shares all weights with `system`, which stays as it is.

    Raises ValueError for a block that it does not have, or if the branches meet already.
    """
    if any(change.recipe == "inside" for change in system.changes):
        raise ValueError("guidance acts inside this system already; its branches meet in one block")
    depth = len(system.need_model().blocks)
    if not -depth <= config.block < depth:
        raise ValueError(f"this model has blocks 0 to {depth - 1}, or -{depth} to -1 from the end, got {config.block}")
    return system.changed("inside", config, stepper=GuidedInside(stepper_of(system), config.block))


@dataclass(frozen=True)
class GuidedInside(StepperWrapper):
    """The steps of another stepper, with the branches blended after a block."""

    block: int = -1

    def step(self, system: System, state: State) -> State:
        model, guidance = system.need_model(), state.guidance
        blocks: list[Block] = list(model.blocks)
        blocks[self.block] = GuidedBlock(blocks[self.block], guidance)
        guided = system.with_model(model.with_blocks(blocks))
        first = FirstBranch(guidance.weights, guidance.drops)
        return replace(self.inner.step(guided, replace(state, guidance=first)), guidance=guidance)


class GuidedBlock(BlockWrapper):
    """A block after which all branches of a guidance go on from one blended state."""

    def __init__(self, block: Block, guidance: Guidance) -> None:
        super().__init__(block)
        self.guidance = guidance

    def forward(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        h = self.block(h, prepared, span, cache)
        alive = self.guidance.alive(span.schedule, span.first)
        blended = self.guidance.combine(h, alive, span.schedule, span.first)
        return blended.repeat(len(alive), 1, 1)


class FirstBranch(Guidance):
    """A guidance of whose branches the first one's prediction is taken, since they were blended before."""

    def combine(self, predictions: Tensor, alive: tuple[int, ...], schedule: Schedule, k: int) -> Tensor:
        return predictions.chunk(len(alive))[0]
